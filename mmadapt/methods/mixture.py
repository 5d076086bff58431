"""Mixtures of adapters.

Cappellazzo et al. 2024, Efficient Fine-tuning of Audio Spectrogram Transformers via Soft Mixture of
Adapters, arXiv:2402.00828

    dense:  y + Σ_n g_n(x)·A_n(x),   g = softmax(x·Rᵀ + b)
    soft:   y + C·A(Dᵀ·x),   D = softmax of x·Φ over tokens, C = softmax of x·Φ over slots

A_n(z) = act(z·D_nᵀ + b_n)·U_nᵀ + c_n are bottlenecks, slots p of them seen by each (Puigcerver et al.
2023, From Sparse to Soft Mixtures of Experts, arXiv:2308.00951). U_n and the biases start at zero.
Padding is dispatched to no slot.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mmadapt.core.layer import Layer, empty, fill_normal, fill_uniform, require_aligned
from mmadapt.errors import AdapterError
from mmadapt.methods.conv_time import frame_mask, refuse_cached
from mmadapt.ops.reference import ACTIVATIONS, linear
from mmadapt.ops.sound import soft_dispatch

if TYPE_CHECKING:
    from mmadapt.adapter import DenseMoA, SoftMoA
    from mmadapt.core.context import Context
    from mmadapt.core.site import SiteView


class _Experts(Layer):
    """The bottlenecks. Parameters: down (N, H, C_in), down_bias (N, H), up (N, C, H), up_bias (N, C)."""

    why_not_merge = "activations stand between its projections"

    def __init__(
        self, adapter: DenseMoA | SoftMoA, site: SiteView, generator: torch.Generator
    ) -> None:
        super().__init__()
        what = type(adapter).__name__
        if site.span.layout != "BTC":
            raise AdapterError(
                f"{what} routes tokens, and {site.name} is laid out {site.span.layout}",
                "choose a site such as 'audio.layers[*].mlp'",
            )
        require_aligned(site, what)
        experts, width = adapter.experts, adapter.width
        self.activation = adapter.activation
        self.down = empty(site, experts, width, site.width_in)
        self.down_bias = empty(site, experts, width)
        self.up = empty(site, experts, site.width, width)
        self.up_bias = empty(site, experts, site.width)
        fill_uniform(self.down, 1 / math.sqrt(site.width_in), generator)
        for parameter in (self.down_bias, self.up, self.up_bias):
            nn.init.zeros_(parameter)


class DenseMoALayer(_Experts):
    """Parameters: those of the experts, router (N, C_in), router_bias (N,)."""

    def __init__(self, adapter: DenseMoA, site: SiteView, generator: torch.Generator) -> None:
        super().__init__(adapter, site, generator)
        self.router = empty(site, adapter.experts, site.width_in)
        self.router_bias = empty(site, adapter.experts)
        fill_uniform(self.router, 1 / math.sqrt(site.width_in), generator)
        nn.init.zeros_(self.router_bias)

    def after(self, acc: Tensor, y: Tensor, x: Tensor, context: Context, site: SiteView) -> Tensor:
        experts, width, _ = self.down.shape
        gates = linear(x, self.router, self.router_bias).softmax(-1)  # (B, T, N)
        hidden = linear(x, self.down.flatten(0, 1), self.down_bias.flatten())
        hidden = ACTIVATIONS[self.activation](hidden).unflatten(-1, (experts, width))
        hidden = (gates[..., None] * hidden).flatten(-2)  # all experts side by side
        delta = linear(hidden, self.up.transpose(0, 1).flatten(1), None)
        return acc + (delta + linear(gates, self.up_bias.mT, None)).to(acc.dtype)


class SoftMoALayer(_Experts):
    """Parameters: those of the experts, slots (C_in, N·p)."""

    facts = ("mask",)

    def __init__(self, adapter: SoftMoA, site: SiteView, generator: torch.Generator) -> None:
        super().__init__(adapter, site, generator)
        refuse_cached(site, "SoftMoA")
        self.slots = empty(site, site.width_in, adapter.experts * adapter.slots)
        fill_normal(self.slots, math.sqrt(2 / sum(self.slots.shape)), generator)

    def after(self, acc: Tensor, y: Tensor, x: Tensor, context: Context, site: SiteView) -> Tensor:
        mask = frame_mask(context, x, site)
        logits = linear(x, self.slots.mT, None)  # (B, T, N·p)
        dispatch, combine = soft_dispatch(logits, mask), logits.softmax(-1)
        if mask is not None:  # no weight is left for padding, whatever it holds
            x = torch.where(mask[..., None], x, x.new_zeros(()))
        seen = dispatch.mT.to(self.down.dtype) @ x.to(self.down.dtype)
        seen = seen.unflatten(1, (len(self.down), -1))  # (B, N, p, C_in)
        hidden = ACTIVATIONS[self.activation](seen @ self.down.mT + self.down_bias[:, None])
        made = (hidden @ self.up.mT + self.up_bias[:, None]).flatten(1, 2)  # (B, N·p, C)
        return acc + (combine.to(made.dtype) @ made).to(acc.dtype)
