"""Any other model: its repeated blocks, named by what they are.

`blocks[i]`, children with an established name (`blocks[i].attn`, `blocks[i].mlp`), and each linear,
convolution and norm by its path inside the block (`blocks[i].mlp.fc1`; parts that are numbers get an
underscore: `blocks[i].block._0`). A model without repeated blocks is described by hand:
`mmadapt.Anatomy.from_paths`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmadapt.backbones.parts import block_roles, span_of
from mmadapt.backbones.repeated import find_blocks
from mmadapt.core.anatomy import Anatomy
from mmadapt.core.site import Span, parse_role
from mmadapt.errors import BackboneError, did_you_mean

if TYPE_CHECKING:
    from torch import nn

_BANK = "_mmadapt"


def generic_anatomy(model: nn.Module) -> Anatomy | None:
    """The anatomy of a model with repeated blocks; None where there are none."""
    blocks = find_blocks(model)
    if not blocks:
        return None
    spans: dict[str, Span] = {}
    for index, (path, block) in enumerate(blocks):
        spans.update(block_roles(f"blocks[{index}]", path, block))
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
            span = span_of(model, concrete, module)
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


# -- roles given by hand ----------------------------------------------------------------------------


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
