"""A bottleneck's parameters as the fused products want them, and their gradients from what those sum.

With W' = γ∘W and c = ΣW' over channels, LN(x)·Wᵀ + b = rstd·(x·W'ᵀ − mean·c) + W·β + b, so raw x goes
into the product. c is the sum of W' as it was rounded, which makes the mean cancel exactly. A scale a
channel goes into up and its bias, one number stays apart. Backwards, with a = du·rstd and
G = aᵀ(x − mean): dW = γ∘G + Σdu·βᵀ, dγ = Σ W∘G and dβ = Wᵀ·Σdu; with U = Σ dy·hᵀ: dup = s·U and
ds = ⟨up, U⟩ + bias·Σdy.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mmadapt.ops.plain import Folded, Sums


class Parameters(NamedTuple):
    """Of N adapters: down (N, H, C_in), up (N, C, H), norms (N, C_in), scale (N,) or (N, C)."""

    norm_weight: Tensor | None
    norm_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None
    up: Tensor
    up_bias: Tensor | None
    scale: Tensor | None


def fold(parameters: Parameters, dtype: torch.dtype) -> Folded:
    """The operands, matrices in `dtype` and the rest in float32 at least."""
    p = parameters
    wide = torch.promote_types(torch.float32, dtype)
    shift = None if p.down_bias is None else p.down_bias.to(wide)
    slope = None
    down = p.down
    if p.norm_weight is not None:
        assert p.norm_bias is not None
        down = (down.to(wide) * p.norm_weight.to(wide)[:, None]).to(dtype)
        slope = down.sum(-1, dtype=wide)
        moved = torch.matmul(p.down.to(wide), p.norm_bias.to(wide)[..., None])[..., 0]
        shift = moved if shift is None else moved + shift
    up, bias = p.up, None if p.up_bias is None else p.up_bias.to(wide)
    gain = None
    if p.scale is not None and p.scale.ndim == 2:
        channels = p.scale.to(wide)
        up = up.to(wide) * channels[..., None]
        bias = None if bias is None else bias * channels
    elif p.scale is not None:
        gain = p.scale.to(wide).contiguous()
    return Folded(
        down.to(dtype).contiguous(),
        slope,
        None if shift is None else shift.contiguous(),
        up.to(dtype).contiguous(),
        None if bias is None else bias.contiguous(),
        gain,
    )


def unfold(sums: Sums, parameters: Parameters, factor: float) -> Parameters:
    """The gradients to the parameters, each in its own dtype; None where there is none."""
    p, (of_down, of_up, of_dy, of_du) = parameters, sums
    wide = of_down.dtype
    d_norm_weight = d_norm_bias = None
    d_down = of_down
    if p.norm_weight is not None:
        assert p.norm_bias is not None
        down = p.down.to(wide)
        d_norm_weight = (down * of_down).sum(1)
        d_norm_bias = torch.matmul(of_du[:, None], down)[:, 0]
        d_down = p.norm_weight.to(wide)[:, None] * of_down
        d_down = d_down + of_du[..., None] * p.norm_bias.to(wide)[:, None]
    d_up, d_up_bias = factor * of_up, factor * of_dy
    d_scale = None
    if p.scale is not None:
        d_scale = (p.up.to(wide) * d_up).sum(-1)
        if p.up_bias is not None:
            d_scale = d_scale + p.up_bias.to(wide) * d_up_bias
        scale = p.scale.to(wide)
        if scale.ndim == 1:
            d_scale, scale = d_scale.sum(-1), scale[:, None]
        d_up, d_up_bias = d_up * scale[..., None], d_up_bias * scale
    found = (d_norm_weight, d_norm_bias, d_down, of_du, d_up, d_up_bias, d_scale)
    return Parameters(
        *(
            None if own is None or new is None else new.to(own.dtype)
            for own, new in zip(p, found, strict=True)
        )  # type: ignore[arg-type]
    )
