"""Compacter.

Karimi Mahabadi et al. 2021, Compacter: Efficient Low-Rank Hypercomplex Adapter Layers,
arXiv:2106.04647

    y + act(y·W_d + b_d)·W_u + b_u,   W = Σ_i A_i ⊗ (s_i·t_iᵀ),   i = 1 … n

A_i (n, n) belong to both projections, of all sites or of one. Drawn as published: A from N(0, 0.01²), s and t from
Glorot's uniform with gain √2; the default start sets t of W_u to zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mmadapt.core.layer import Layer, empty, fill_normal, fill_uniform
from mmadapt.errors import AdapterError
from mmadapt.ops.bottleneck import bottleneck
from mmadapt.ops.reference import channel_axis, kronecker_sum

if TYPE_CHECKING:
    from mmadapt.adapter import Compacter
    from mmadapt.core.context import Context
    from mmadapt.core.site import SiteView


class CompacterRule(Layer):
    """What all sites share. Parameters: rule (n, n, n)."""

    def __init__(
        self, adapter: Compacter, sites: Sequence[SiteView], generator: torch.Generator
    ) -> None:
        super().__init__()
        n = adapter.division
        self.rule = empty(sites[0], n, n, n)
        fill_normal(self.rule, 0.01, generator)


class CompacterLayer(Layer):
    """Parameters: down_s (n, C/n), down_t (n, H/n), up_s (n, H/n), up_t (n, C/n); down_bias (H,),
    up_bias (C,); rule (n, n, n) where it is not shared.
    """

    why_not_merge = "an activation stands between its two projections"

    def __init__(self, adapter: Compacter, site: SiteView, generator: torch.Generator) -> None:
        super().__init__()
        n, width = adapter.division, adapter.width
        if site.width % n:
            raise AdapterError(
                f"Compacter: division {n} does not divide the {site.width} channels at {site.name}"
            )
        self.activation = adapter.activation
        self.axis = channel_axis(site.span.layout)
        if not adapter.shared_rule:
            self.rule = empty(site, n, n, n)
            fill_normal(self.rule, 0.01, generator)
        self.down_s, self.down_t = empty(site, n, site.width // n), empty(site, n, width // n)
        self.up_s, self.up_t = empty(site, n, width // n), empty(site, n, site.width // n)
        self.down_bias, self.up_bias = empty(site, width), empty(site, site.width)
        for factor in (self.down_s, self.down_t, self.up_s, self.up_t):
            fill_uniform(factor, math.sqrt(2 * 6 / (factor.shape[1] + 1)), generator)
        if adapter.start == "zero":
            nn.init.zeros_(self.up_t)
        nn.init.zeros_(self.down_bias)
        nn.init.zeros_(self.up_bias)

    def after(self, acc: Tensor, y: Tensor, x: Tensor, context: Context, site: SiteView) -> Tensor:
        down = self._projection(self.down_s, self.down_t)  # (C, H)
        up = self._projection(self.up_s, self.up_t)  # (H, C)
        weights = (down.T, self.down_bias, up.T, self.up_bias)
        if self.axis == -1:
            return bottleneck(acc, y, *weights, self.activation, 1.0)
        delta = bottleneck(None, y.movedim(self.axis, -1), *weights, self.activation, 1.0)
        return acc + delta.movedim(-1, self.axis)

    def _projection(self, s: Tensor, t: Tensor) -> Tensor:
        rule = self.rule if self.shared is None else self.shared.rule
        with torch.autocast(s.device.type, enabled=False):
            return kronecker_sum(rule, s[:, :, None] * t[:, None, :])
