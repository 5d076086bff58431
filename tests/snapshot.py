"""What must not change: everything of a model that a test can see, and how to compare it."""

from __future__ import annotations

import torch
from torch import Tensor

from mmadapt.core.snapshot import (  # noqa: F401
    flags,
    hook_tables,
    randomise,
    state,
    values,
)


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
