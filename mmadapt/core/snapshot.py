"""What must not change: everything of a model that can be seen from outside, and how to compare it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from mmadapt.core.bank import BANK

_TABLES = [
    name
    for name in vars(nn.Module())
    if name.endswith(("_hooks", "_with_kwargs", "_always_called"))
]


def hook_tables(model: nn.Module) -> dict[str, list[tuple[int, int]]]:
    """Per module of the backbone and table, ids and objects of the hooks, in order, if any."""
    found = {}
    for path, module in model.named_modules():
        if BANK in path.split("."):
            continue
        for table in _TABLES:
            entries = getattr(module, table, None)
            if entries:
                found[f"{path}.{table}"] = [(key, id(value)) for key, value in entries.items()]
    return found


def values(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer of the backbone, the non-persistent ones too, as copies."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {k: v.detach().clone() for k, v in named if BANK not in k.split(".")}


def flags(model: nn.Module) -> dict[str, bool]:
    """requires_grad of every tensor and the training flag of every module of the backbone."""
    tensors = {k: p.requires_grad for k, p in model.named_parameters() if BANK not in k.split(".")}
    modules = {f"{k}()": m.training for k, m in model.named_modules() if BANK not in k.split(".")}
    return {**tensors, **modules}


def state(model: nn.Module) -> tuple[Any, ...]:
    """All of it: keys, hook tables, flags, and the names of every module's own attributes."""
    attributes = {
        path: (sorted(vars(module)), list(module._modules), list(module._parameters))
        for path, module in model.named_modules()
    }
    return list(model.state_dict()), hook_tables(model), flags(model), attributes


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    """Names of the tensors that are not bit for bit what they were, or not there."""
    return [
        name
        for name in {**before, **after}
        if name not in before or name not in after or not torch.equal(before[name], after[name])
    ]


def distance(left: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> float:
    """The largest difference relative to the largest value, over all tensors; 0 where bits are equal.

    Infinite where shapes differ, or a difference is not finite.
    """
    if [t.shape for t in left] != [t.shape for t in right]:
        return math.inf
    found = 0.0
    for one, other in zip(left, right, strict=True):
        if one.numel() and not torch.equal(one, other):
            size = float(other.detach().abs().max().clamp(min=1e-12))
            off = float((one - other).detach().abs().max()) / size
            found = max(found, off if math.isfinite(off) else math.inf)
    return found


def randomise(attachment: Any, amount: float = 0.3, seed: int = 5) -> Any:
    """Add noise to every trained tensor and open every gate, so that no layer is the identity."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in attachment.parameters():
            noise = amount * torch.randn(parameter.shape, generator=draw)
            parameter.add_((noise if parameter.ndim else 0.5 + noise.abs()).to(parameter))
    return attachment
