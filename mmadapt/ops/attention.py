"""Gated attention in float32, by fewer or faster kernels than the reference takes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mmadapt.ops import reference

#: queries from which on three kernels along them cost a CPU less than the fused one
_MANY = 32


def gated_attention(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, scale: float) -> Tensor:
    """`mmadapt.ops.reference.gated_attention`, where all tensors are float32 by other kernels."""
    return attend(q, *without_queries(k, v, gate, scale, q.shape[1]), scale)


def without_queries(
    k: Tensor, v: Tensor, gate: Tensor, scale: float, heads: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The part of it that can be kept between calls: keys, values, and the gate where it stays apart.

    In float32 the scale moves into k and the gate, in which the result is linear, into v. In other
    dtypes that would round the gate away, and the reference's softmax has a width of its own.
    """
    groups = heads // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    if k.dtype == v.dtype == gate.dtype == torch.float32:
        return k * scale, v * gate.view(-1, 1, 1), None
    return k, v, gate


def attend(q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, scale: float) -> Tensor:
    """The rest of it: heads side by side, (B, T, H·d)."""
    if gate is not None:
        return reference.gated_attention(q, k, v, gate, scale)
    if q.dtype != torch.float32:
        return reference.gated_attention(q, k, v, v.new_ones(1), 1.0)
    if k.shape[0] > 1:  # every row has keys of its own
        return F.scaled_dot_product_attention(q, k, v, scale=1.0).transpose(1, 2).flatten(2)
    rows, heads, length, width = q.shape
    q = q.transpose(1, 2).reshape(rows * length, heads, width).transpose(0, 1)
    return _one_row(q, k, v).transpose(0, 1).reshape(rows, length, heads * width)


def _one_row(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Heads (H, N, d) of N queries to the same K keys (1, H, K, d)."""
    if q.device.type != "cpu" or q.shape[1] < _MANY:
        return F.scaled_dot_product_attention(q[None], k, v, scale=1.0)[0]
    # K is small: a softmax down the columns runs along N, where a CPU's kernels are vectorised
    return torch.bmm(torch.bmm(k[0], q.mT).softmax(-2).mT, v[0])
