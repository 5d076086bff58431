"""Bottlenecks of few bits.

Jie et al. 2023, Revisiting the Parameter Efficiency of Adapters from the Perspective of Precision
Redundancy, arXiv:2307.16867

    y + s·act(x·Q(D)ᵀ)·Q(U)ᵀ,   Q(W) = σ·code((W − μ) / σ) + μ

μ and σ are the mean and deviation of the matrix and the codes are least in mean absolute error for a
normal variable. U starts from N(0, 0.001²) within two deviations, since Q has no meaning at zero.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmadapt.core.layer import Layer, empty, fill_normal, fill_uniform
from mmadapt.errors import AdapterError
from mmadapt.ops.reference import bottleneck, channel_axis, low_bit, normal_codes

if TYPE_CHECKING:
    from mmadapt.adapter import BiAdaptFormer
    from mmadapt.core.context import Context
    from mmadapt.core.site import SiteView


class BiAdaptFormerLayer(Layer):
    """Parameters: down (H, C_in), up (C, H), both before quantisation."""

    why_not_merge = "an activation stands between its two projections"

    def __init__(self, adapter: BiAdaptFormer, site: SiteView, generator: torch.Generator) -> None:
        super().__init__()
        if site.span.layout == "BD":
            raise AdapterError(
                f"BiAdaptFormer reads the input of {site.name}, which is not made of features",
                "choose a site such as '*.layers[*].mlp'",
            )
        self.bits = adapter.bits
        self.codes = normal_codes(adapter.bits)
        self.activation = adapter.activation
        self.scale = float(adapter.scale)
        self.axis = channel_axis(site.span.layout)
        self.down = empty(site, adapter.width, site.width_in)
        self.up = empty(site, site.width, adapter.width)
        fill_uniform(self.down, 1 / math.sqrt(site.width_in), generator)
        fill_normal(self.up, 0.001, generator, within=2.0)

    def after(self, acc: Tensor, y: Tensor, x: Tensor, context: Context, site: SiteView) -> Tensor:
        down, up = low_bit(self.down, self.codes), low_bit(self.up, self.codes)
        z = x if self.axis == -1 else x.movedim(self.axis, -1)
        delta = bottleneck(z, down, None, up, None, self.activation, self.scale)
        return acc + (delta if self.axis == -1 else delta.movedim(-1, self.axis))

    def describe(self) -> dict[str, Any]:
        numbers = self.down.numel() + self.up.numel()
        return {"bytes": self.bits * numbers / 8 + 2 * 8}
