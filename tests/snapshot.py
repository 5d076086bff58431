"""What must not change: everything of a model that a test can see, and how to compare it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

BANK = "_mmadapt"

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


def assert_same_values(before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    """Bit-equal, name by name and in the same order."""
    assert list(before) == list(after)
    for name, value in before.items():
        assert torch.equal(value, after[name]), name


def assert_equal(left: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> None:
    """Bit-equal outputs."""
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert torch.equal(one, other), f"off by {float((one - other).abs().max()):.3g}"


def assert_close(left: tuple[Tensor, ...], right: tuple[Tensor, ...], relative: float) -> None:
    """Largest difference at most `relative` of the largest value."""
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert one.shape == other.shape
        bound = relative * float(other.detach().abs().max().clamp(min=1e-12))
        assert float((one - other).detach().abs().max()) <= bound


def differ(left: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> bool:
    """Whether at least one output visibly differs: without it an equality would prove nothing."""
    return any(
        a.shape != b.shape
        or float((a - b).detach().abs().max()) > 1e-3 * float(b.detach().abs().max())
        for a, b in zip(left, right, strict=True)
    )


def randomise(attachment: Any, amount: float = 0.3, seed: int = 5) -> Any:
    """Add noise to every trained tensor and open every gate, so that no layer is the identity."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in attachment.parameters():
            noise = amount * torch.randn(parameter.shape, generator=draw)
            parameter.add_(noise if parameter.ndim else 0.5 + noise.abs())
    return attachment
