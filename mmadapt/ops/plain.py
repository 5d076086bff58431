"""The fused bottleneck's forward and backward written out in torch, for devices without a kernel.

It takes the same folded operands and keeps as little as the kernels do; `mmadapt.kernels.launch`
has the same two functions. Shapes: x (T, C_in), y (T, C), N adapters of width H.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mmadapt.ops.reference import ACTIVATIONS


class Spec(NamedTuple):
    """What is not a tensor: `norm` whether LN acts, `same` whether the residual is x itself."""

    activation: str
    factor: float
    eps: float
    norm: bool
    same: bool


class Folded(NamedTuple):
    """Parameters as the products want them: norm and channels' scales are in them already."""

    down: Tensor  # (N, H, C_in)
    slope: Tensor | None  # (N, H) float32, sums of the rows of `down`; with a norm
    shift: Tensor | None  # (N, H) float32
    up: Tensor  # (N, C, H)
    bias: Tensor | None  # (N, C) float32
    gain: Tensor | None  # (N,) float32


class Sums(NamedTuple):
    """What the weights' gradients are made of, float32."""

    down: Tensor  # (N, H, C_in): Σ a·(x − mean)
    up: Tensor  # (N, C, H): Σ dy·h
    dy: Tensor  # (N, C)
    du: Tensor  # (N, H)


def forward(
    residual: Tensor | None, x: Tensor, folded: Folded, spec: Spec, ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y, and mean and 1 / deviation of x's rows (T, 2) or, without a norm, nothing (0,)."""
    added = x if spec.same else residual
    dtype = x.dtype if added is None else added.dtype
    statistics = _statistics(x, spec)
    y = x.new_zeros(len(x), folded.up.shape[1], dtype=dtype) if added is None else added.clone()
    for n, rows in _groups(ids, x, folded):
        seen = x if rows is None else x[rows]
        known = statistics if rows is None else statistics[rows] if spec.norm else statistics
        h = ACTIVATIONS[spec.activation](_entering(seen, known, folded, n)[1])
        change = h.to(folded.up.dtype) @ folded.up[n].mT
        if folded.bias is not None:
            change = change + folded.bias[n]
        change = change * _gain(folded, spec, n)
        if rows is None:
            y = (y + change).to(dtype)
        else:
            y[rows] = (y[rows] + change).to(dtype)
    return y, statistics


def backward(
    dy: Tensor,
    x: Tensor,
    statistics: Tensor,
    folded: Folded,
    spec: Spec,
    ids: Tensor | None,
    weights: bool,
) -> tuple[Tensor, Sums | None]:
    """dx and, with `weights`, the sums that the weights' gradients are made of."""
    dx = dy.to(x.dtype, copy=True) if spec.same else torch.zeros_like(x)
    wide = torch.promote_types(torch.float32, x.dtype)
    shapes = (folded.down.shape, folded.up.shape, folded.up.shape[:2], folded.down.shape[:2])
    sums = Sums(*(torch.zeros(shape, dtype=wide, device=x.device) for shape in shapes))
    for n, rows in _groups(ids, x, folded):
        seen, change = (x, dy) if rows is None else (x[rows], dy[rows])
        known = statistics if rows is None else statistics[rows] if spec.norm else statistics
        centred, u = _entering(seen, known, folded, n)
        h = ACTIVATIONS[spec.activation](u)
        dh = (change.to(folded.up.dtype) @ folded.up[n]).to(wide) * _gain(folded, spec, n)
        du = _through(spec.activation, u, dh)
        to_x = (du.to(folded.down.dtype) @ folded.down[n]).to(wide)
        a = du
        if spec.norm:
            assert folded.slope is not None
            mean, rstd = known.unbind(1)
            first = (du * folded.slope[n]).mean(1, keepdim=True) * (du.shape[1] / x.shape[1])
            second = (du * centred).mean(1, keepdim=True) * (du.shape[1] / x.shape[1])
            unitary = (seen.to(wide) - mean[:, None]) * rstd[:, None]
            to_x = rstd[:, None] * (to_x - first - unitary * second)
            a = du * rstd[:, None]
            seen = seen.to(wide) - mean[:, None]
        if rows is None:
            dx = (dx + to_x).to(x.dtype)
        else:
            dx[rows] = (dx[rows] + to_x).to(x.dtype)
        if weights:
            sums.down[n] = a.mT @ seen.to(wide)
            sums.up[n] = change.to(wide).mT @ h.to(wide)
            sums.dy[n] = change.to(wide).sum(0)
            sums.du[n] = du.sum(0)
    return dx, sums if weights else None


def _groups(ids: Tensor | None, x: Tensor, folded: Folded) -> list[tuple[int, Tensor | None]]:
    """Adapters and the places of their rows; None for all of them."""
    if ids is None:
        return [(0, None)]
    owner = ids.repeat_interleave(len(x) // len(ids))
    return [(n, (owner == n).nonzero()[:, 0]) for n in range(len(folded.down))]


def _statistics(x: Tensor, spec: Spec) -> Tensor:
    wide = torch.promote_types(torch.float32, x.dtype)
    if not spec.norm or not len(x):
        return x.new_empty((0, 2) if spec.norm else (0,), dtype=wide)
    variance, mean = torch.var_mean(x.to(wide), -1, correction=0)
    return torch.stack([mean, (variance + spec.eps).rsqrt()], 1)


def _entering(x: Tensor, statistics: Tensor, folded: Folded, n: int) -> tuple[Tensor, Tensor]:
    """The activation's input without and with its shift, (T, H) of float32 at least."""
    u = (x.to(folded.down.dtype) @ folded.down[n].mT).to(
        torch.promote_types(torch.float32, x.dtype)
    )
    if folded.slope is not None:
        mean, rstd = statistics.unbind(1)
        u = rstd[:, None] * (u - mean[:, None] * folded.slope[n])
    return u, u if folded.shift is None else u + folded.shift[n]


def _gain(folded: Folded, spec: Spec, n: int) -> Tensor | float:
    return spec.factor if folded.gain is None else spec.factor * folded.gain[n]


def _through(activation: str, u: Tensor, dh: Tensor) -> Tensor:
    """dh times the activation's derivative at u."""
    if activation == "identity":
        return dh
    if activation == "relu":
        return torch.ops.aten.threshold_backward(dh, u, 0)
    if activation in ("gelu", "gelu_new"):
        how = "tanh" if activation == "gelu_new" else "none"
        return torch.ops.aten.gelu_backward(dh, u, approximate=how)
    if activation == "silu":
        return torch.ops.aten.silu_backward(dh, u)
    if activation == "quick_gelu":
        gate = torch.sigmoid(1.702 * u)
        return dh * gate * (1 + 1.702 * u * (1 - gate))
    return torch.ops.aten.tanh_backward(dh, torch.tanh(u))
