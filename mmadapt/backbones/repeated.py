"""The repeated blocks of a model, found by looking at its modules; no forward is run.

The children of every list and `nn.Sequential` are grouped by class, and the class that stands for
the model's residual blocks is chosen by its share of the parameters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

_BANK = "_mmadapt"


def find_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(path, module) of the repeated blocks, in the order of the model; empty where there are none.

    Among classes that hold more than half of the parameters of the largest such class, those with a
    norm come first, then those with most instances: Swin's blocks rather than its stages, a layer
    rather than its experts. Others among them that lie apart from these join in: an encoder's layers
    beside a decoder's.
    """
    groups = _groups(model)
    if not groups:
        return []
    flat = {cls: group for cls, group in groups.items() if not _nests(group)}
    groups = flat or groups  # a U-net's levels stand within each other, its units do not
    share = {cls: sum(_size(module) for _, module in group) for cls, group in groups.items()}
    most = max(share.values())
    large = [cls for cls in groups if 2 * share[cls] > most]
    normed = {cls: _has_norm(groups[cls][0][1]) for cls in large}
    large.sort(key=lambda cls: (normed[cls], len(groups[cls]), share[cls]), reverse=True)
    found: dict[str, nn.Module] = {}
    for cls in large:
        apart = all(not _nested(path, other) for path, _ in groups[cls] for other in found)
        if apart and normed[cls] == normed[large[0]]:
            found.update(groups[cls])
    for path, module in model.named_modules():  # those that no list holds, as a U-net's lowest unit
        if type(module) in large[:1] and not any(_nested(path, other) for other in found):
            found[path] = module
    return [(path, module) for path, module in model.named_modules() if path in found]


def _nests(group: list[tuple[str, nn.Module]]) -> bool:
    return any(one != other and _nested(one, other) for one, _ in group for other, _ in group)


def _nested(one: str, other: str) -> bool:
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


def _groups(model: nn.Module) -> dict[type, list[tuple[str, nn.Module]]]:
    """Children of lists and sequences by class, merged over lists; at least two of each."""
    from torch import nn

    groups: dict[type, dict[str, nn.Module]] = {}
    for path, holder in model.named_modules():
        if not isinstance(holder, (nn.ModuleList, nn.Sequential)) or _BANK in path.split("."):
            continue
        for name, child in holder.named_children():
            if _is_block(child):
                groups.setdefault(type(child), {})[f"{path}.{name}" if path else name] = child
    return {cls: list(found.items()) for cls, found in groups.items() if len(found) > 1}


def _is_block(module: nn.Module) -> bool:
    """A module with two weights or more that is no mere container."""
    from torch import nn

    plain = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
    if isinstance(module, plain) and not _is_residual_sequence(module):
        return False
    holders = [m for m in module.modules() if any(p.ndim > 1 for p in m.parameters(recurse=False))]
    return len(holders) > 1


def _is_residual_sequence(module: nn.Module) -> bool:
    """A class made from `nn.Sequential` with a forward of its own, as some residual blocks are."""
    from torch import nn

    return isinstance(module, nn.Sequential) and type(module).forward is not nn.Sequential.forward


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _has_norm(module: nn.Module) -> bool:
    return any("norm" in type(child).__name__.lower() for child in module.modules())
