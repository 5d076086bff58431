"""Any other model: its repeated blocks, found by looking at its modules; no forward is run.

The children of every list and `nn.Sequential` are grouped by class, and the class that stands for
the model's residual blocks is chosen by its share of the parameters. What is found is named by
what it is: `blocks[i]`, children with an established name (`blocks[i].attn`, `blocks[i].mlp`), and
each linear or convolution by its path inside the block (`blocks[i].mlp.fc1`; parts that are numbers
get an underscore: `blocks[i].block._0`). Which child ends a residual branch is not guessed.

The layout of a site says where its channels are: last in BTC and BHWC, second in BCT, BCHW and
BCDHW. A model without repeated blocks is described by hand: `mmadapt.Anatomy.from_paths`.
"""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmadapt.core.anatomy import Anatomy
from mmadapt.core.site import Span, parse_role
from mmadapt.errors import BackboneError, did_you_mean

if TYPE_CHECKING:
    from torch import nn

#: children of a block that keep their own name as a role
BRANCHES = ("attn", "attention", "self_attn", "mlp", "ffn", "feed_forward")

#: classes that read the weights of their own linears, whose calls a hook would wait for in vain
READERS = (
    "torch.nn.modules.activation.MultiheadAttention",
    "torchvision.models.swin_transformer.ShiftedWindowAttention",
)

#: module of a block's class -> layout of the block and of its children; elsewhere tokens are BTC
CHANNELS_LAST_GRIDS = {
    "torchvision.models.swin_transformer": ("BHWC", "BHWC"),
    "timm.models.swin_transformer": ("BHWC", "BTC"),
    "timm.models.swin_transformer_v2": ("BHWC", "BTC"),
    "timm.models.swin_transformer_v2_cr": ("BHWC", "BTC"),
}

_BANK = "_mmadapt"


def generic_anatomy(model: nn.Module) -> Anatomy | None:
    """The anatomy of a model with repeated blocks; None where there are none."""
    blocks = find_blocks(model)
    if not blocks:
        return None
    spans: dict[str, Span] = {}
    for index, (path, block) in enumerate(blocks):
        spans.update(_block_roles(f"blocks[{index}]", path, block))
    return _anatomy(spans)


def named(model: nn.Module, paths: Mapping[str, str]) -> Anatomy:
    """The anatomy of roles given by hand, as role -> path of a module; see `Anatomy.from_paths`."""
    spans: dict[str, Span] = {}
    for role, path in paths.items():
        parse_role(role.replace("[i]", "[0]"))
        found = 0
        for index in range(_length(model, path)) if "{i}" in path else (None,):
            concrete = path if index is None else path.replace("{i}", str(index))
            module = _submodule(model, concrete)
            span = _span_of(model, concrete, module)
            spans[role if index is None else role.replace("[i]", f"[{index}]")] = span
            found += 1
        if not found or ("{i}" in path) != ("[i]" in role):
            raise BackboneError(
                f"{role!r}: {path!r} stands for {found} modules",
                'write [i] in the role where {i} stands in the path: {"layers[i].mlp": "net.{i}.mlp"}',
            )
    return _anatomy(spans)


def no_blocks(model: nn.Module) -> BackboneError:
    """The error for a model whose class is unknown and which has no repeated blocks."""
    cls = type(model)
    example = next((name for name, _ in model.named_children()), "encoder")
    return BackboneError(
        f"no anatomy is known for {cls.__module__}.{cls.__qualname__}, and it has no repeated "
        "blocks from which one could be read",
        f'name the modules to adapt: mmadapt.Backbone(model, anatomy=mmadapt.Anatomy(family="mine", '
        f'spans={{…}})), or anatomy=mmadapt.Anatomy.from_paths(model, {{"my.role": "{example}"}})',
    )


# -- which modules are the blocks -----------------------------------------------------------------


def find_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(path, module) of the repeated blocks, in the order of the model; empty where there are none.

    Among classes that hold more than half of the parameters of the largest such class, those with a
    norm come first, then those with most instances: Swin's blocks rather than its stages, a layer
    rather than its experts.
    """
    groups = _groups(model)
    if not groups:
        return []
    share = {cls: sum(_size(module) for _, module in group) for cls, group in groups.items()}
    most = max(share.values())
    large = [cls for cls in groups if 2 * share[cls] > most]
    best = max(large, key=lambda cls: (_has_norm(groups[cls][0][1]), len(groups[cls]), share[cls]))
    return groups[best]


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


# -- what a block offers ----------------------------------------------------------------------------


def _block_roles(role: str, path: str, block: nn.Module) -> dict[str, Span]:
    """Roles of one block: itself, its named branches, its linears and convolutions."""
    _, inside = _layouts(block)
    whole = _whole(path, block)
    spans = {} if whole is None else {role: whole}
    for name, child in block.named_children():
        if name in BRANCHES and any(True for _ in child.parameters()):
            branch = _branch(path, name, child, whole, inside)
            if branch is not None:
                spans[f"{role}.{name}"] = branch
    for name, span in _weight_roles(path, block, inside):
        spans[f"{role}.{name}"] = span
    return spans


def _layouts(block: nn.Module) -> tuple[str, str]:
    """Layout of a block's input and output, and of the linears inside it."""
    if type(block).__module__ in CHANNELS_LAST_GRIDS:
        return CHANNELS_LAST_GRIDS[type(block).__module__]
    if _starts_with_convolution(block):
        own = _conv_layout(block)
        return own, {"BCT": "BTC", "BCHW": "BHWC", "BCDHW": "BDHWC"}[own]
    return "BTC", "BTC"


def _starts_with_convolution(module: nn.Module) -> bool:
    """Whether the first weight or batch norm inside belongs to a convolution network."""
    from torch import nn
    from torch.nn.modules.batchnorm import _BatchNorm
    from torch.nn.modules.conv import _ConvNd

    for child in module.modules():
        if isinstance(child, (_ConvNd, _BatchNorm)):
            return True
        if isinstance(child, nn.Linear):
            return False
    return False


def _conv_layout(module: nn.Module) -> str:
    from torch import nn

    for child in module.modules():
        for kind, layout in ((nn.Conv1d, "BCT"), (nn.Conv2d, "BCHW"), (nn.Conv3d, "BCDHW")):
            if isinstance(child, kind):
                return layout
    return "BCHW"


def _whole(path: str, module: nn.Module) -> Span | None:
    """A module's own call; its width is that of its norm, or of its last weight's output."""
    layout, _ = _layouts(module)
    weights, x = _weights(module), _first_argument(module)
    norm = _direct_norm(module) if layout.endswith("C") else ""
    if norm:
        return Span(path, x=x, channels=f"{path}.{norm}.weight", layout=layout)
    if not weights:
        return None
    first = module.get_submodule(weights[0])
    depthwise = getattr(first, "groups", 1) > 1  # keeps the width, and does not show its inputs
    return Span(
        path,
        x=x,
        channels=f"{path}.{weights[-1]}.weight@0",
        channels_in="" if depthwise else f"{path}.{weights[0]}.weight@1",
        layout=layout,
    )


def _direct_norm(block: nn.Module) -> str:
    """The first child that normalises channels, which then has the width of the residual stream."""
    for name, child in block.named_children():
        weight = getattr(child, "weight", None)
        if "norm" in type(child).__name__.lower() and weight is not None and weight.ndim == 1:
            return name
    return ""


def _branch(path: str, name: str, child: nn.Module, block: Span | None, inside: str) -> Span | None:
    """A named child: as wide as its block where a norm tells the block's width."""
    layout = _conv_layout(child) if _starts_with_convolution(child) else inside
    if block is not None and "@" not in block.channels:
        channels = block.channels
    elif _weights(child):
        channels = ".".join(filter(None, (path, name, _weights(child)[-1], "weight@0")))
    else:
        return None
    return Span(f"{path}.{name}", x=_first_argument(child), channels=channels, layout=layout)


def _weights(module: nn.Module) -> list[str]:
    """Paths of the linears and convolutions inside, in order; "" for the module itself."""
    from torch import nn

    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return [name for name, child in module.named_modules() if isinstance(child, kinds)]


def _weight_roles(path: str, block: nn.Module, layout: str) -> Iterator[tuple[str, Span]]:
    """Role (below the block's) and span of every linear and convolution inside a block."""
    for name in _weights(block):
        parent, _, _ = name.rpartition(".")
        where = f"{path}.{name}" if name else path
        if _reads_weights(block.get_submodule(parent)):
            holder = f"{path}.{parent}" if parent else path
            yield _legal(name), Span(holder, ("weight",), weight=f"{where}.weight", layout=layout)
        else:
            yield _legal(name), _weight_span(where, block.get_submodule(name), layout)
    for name, child in block.named_modules():  # a packed projection is no module
        if isinstance(getattr(child, "in_proj_weight", None), _parameter()):
            where = f"{path}.{name}" if name else path
            for place, word in enumerate("qkv"):
                span = Span(where, ("weight",), weight=f"{where}.in_proj_weight", block=(place, 3))
                yield _legal(f"{name}.{word}"), span


def _parameter() -> type:
    from torch import nn

    return nn.Parameter


def _weight_span(path: str, module: nn.Module, layout: str) -> Span:
    """A linear by all ports. A convolution by its weight only: at `out`, channels are not last."""
    from torch import nn

    if isinstance(module, nn.Linear):
        return Span(
            path, ("out", "in", "weight"), x="0|input", weight=f"{path}.weight", layout=layout
        )
    return Span(
        path, ("weight",), x="0|input", weight=f"{path}.weight", layout=_conv_layout(module)
    )


def _legal(path: str) -> str:
    """A dotted path as a role: parts that are numbers get an underscore."""
    return ".".join(
        f"_{part}" if part[:1].isdigit() else re.sub(r"\W", "_", part) for part in path.split(".")
    )


def _first_argument(module: nn.Module) -> str:
    """Where a module's call has its input: "0|name of the first parameter of its forward"."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):
        return "0|input"
    return f"0|{next((p.name for p in parameters if p.kind in kinds), 'input')}"


def _reads_weights(module: nn.Module) -> bool:
    return any(f"{cls.__module__}.{cls.__qualname__}" in READERS for cls in type(module).__mro__)


# -- roles given by hand ----------------------------------------------------------------------------


def _span_of(model: nn.Module, path: str, module: nn.Module) -> Span:
    """The span of a module named by hand: a weight's, or a whole call with its widths."""
    from torch import nn

    if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        parent = path.rpartition(".")[0]
        if _reads_weights(model.get_submodule(parent)):
            return Span(parent, ("weight",), weight=f"{path}.weight")
        return _weight_span(path, module, "BTC")
    whole = _whole(path, module)
    if whole is not None:
        return whole
    if getattr(module, "weight", None) is not None:  # a norm or an embedding: its last axis
        layout, _ = _layouts(module)
        return Span(path, x=_first_argument(module), channels=f"{path}.weight@-1", layout=layout)
    raise BackboneError(
        f"{path!r} is a {type(module).__name__} without a weight, so its channels are unknown",
        "name the module before or after it, or write its mmadapt.Span with channels=",
    )


def _length(model: nn.Module, path: str) -> int:
    return len(list(_submodule(model, path.partition(".{i}")[0]).children()))


def _submodule(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        names = [name for name, _ in model.named_modules() if name]
        raise BackboneError(
            f"{type(model).__name__} has no module at {path!r}", did_you_mean(path, names)
        ) from None


# -- facts ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Facts:
    """Class, shapes and sites of a model; picklable, since a bank keeps it."""

    sites: str

    def __call__(self, model: nn.Module) -> dict[str, Any]:
        shapes = (
            f"{name} {tuple(parameter.shape)}"
            for name, parameter in model.named_parameters()
            if _BANK not in name.split(".")
        )
        return {"class": type(model).__qualname__, "shapes": _digest(shapes), "sites": self.sites}


def _anatomy(spans: dict[str, Span]) -> Anatomy:
    sites = _digest(f"{role} {span.module} {span.weight}" for role, span in spans.items())
    return Anatomy(family="generic", spans=spans, towers={"model": ""}, facts=_Facts(sites))


def _digest(lines: Any) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
