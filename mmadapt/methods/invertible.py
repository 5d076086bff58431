"""Invertible adapters.

Pfeiffer et al. 2020, MAD-X: An Adapter-Based Framework for Multi-Task Cross-Lingual Transfer,
arXiv:2005.00052; the coupling is that of Dinh et al. 2014, NICE, arXiv:1410.8516

    y1 = x1 + F(x2),  y2 = x2 + G(y1);   inverse: x2 = y2 − G(y1),  x1 = y1 − F(x2)

x1 and x2 are the first and the second half of the channels, F(z) = act(z·Dᵀ + b_d)·Uᵀ + b_u and G
alike. U and both biases start at zero, so that map and inverse start as the identity.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mmadapt.core.layer import Layer, empty, fill_uniform
from mmadapt.errors import AdapterError
from mmadapt.ops.bottleneck import couple
from mmadapt.ops.reference import channel_axis

if TYPE_CHECKING:
    from mmadapt.adapter import Invertible
    from mmadapt.core.context import Context
    from mmadapt.core.site import SiteView


class Coupling(Layer):
    """What both sites share. Parameters, for channels C = c1 + c2: f_down (f, c2), f_up (c1, f),
    g_down (g, c1), g_up (c2, g), each with a bias.
    """

    def __init__(
        self, adapter: Invertible, sites: Sequence[SiteView], generator: torch.Generator
    ) -> None:
        super().__init__()
        if len(sites) != 2:
            raise AdapterError(
                f"Invertible stands at two sites, and {len(sites)} were chosen: "
                f"{', '.join(site.name for site in sites[:4])}{' …' if len(sites) > 4 else ''}",
                'name where states enter and leave: at=("text.layers[0]:in", "text.layers[-1]:out")',
            )
        widths = [site.width_in if site.port == "in" else site.width for site in sites]
        if widths[0] != widths[1]:
            raise AdapterError(
                f"Invertible undoes at {sites[1].name} what it did at {sites[0].name}, and they have "
                f"{widths[1]} and {widths[0]} channels",
                "choose two sites of one width with at=",
            )
        if widths[0] < 2:
            raise AdapterError(f"Invertible couples two halves of the channels at {sites[0].name}")
        self.entry = sites[0].name
        self.activation = adapter.activation
        first = widths[0] // 2
        second = widths[0] - first
        self.f_down, self.f_down_bias, self.f_up, self.f_up_bias = _bottleneck(
            adapter, sites[0], second, first, generator
        )
        self.g_down, self.g_down_bias, self.g_up, self.g_up_bias = _bottleneck(
            adapter, sites[0], first, second, generator
        )

    def run(self, z: Tensor, inverse: bool) -> Tensor:
        """z (…, C) through the coupling or back."""
        f = (self.f_down, self.f_down_bias, self.f_up, self.f_up_bias)
        g = (self.g_down, self.g_down_bias, self.g_up, self.g_up_bias)
        return couple(z, f, g, self.activation, inverse)


def _bottleneck(
    adapter: Invertible, site: SiteView, inputs: int, outputs: int, generator: torch.Generator
) -> tuple[nn.Parameter, ...]:
    width = max(1, inputs // adapter.reduction)
    down, down_bias = empty(site, width, inputs), empty(site, width)
    up, up_bias = empty(site, outputs, width), empty(site, outputs)
    fill_uniform(down, 1 / math.sqrt(inputs), generator)
    for parameter in (down_bias, up, up_bias):
        nn.init.zeros_(parameter)
    return down, down_bias, up, up_bias


class InvertibleLayer(Layer):
    """The coupling at the first of its two sites, the inverse at the second; owns no tensor."""

    additive = False
    why_not_merge = "activations stand in its coupling"

    def __init__(self, adapter: Invertible, site: SiteView, generator: torch.Generator) -> None:
        super().__init__()
        if site.span.layout == "BD":
            raise AdapterError(
                f"Invertible changes hidden states, and {site.name} has pooled features",
                "choose sites such as 'text.layers[0]:in'",
            )
        self.axis = channel_axis(site.span.layout)

    def before(self, x: Tensor, context: Context, site: SiteView) -> Tensor:
        return self._run(x, site)

    def after(self, acc: Tensor, y: Tensor, x: Tensor, context: Context, site: SiteView) -> Tensor:
        return self._run(y, site)

    def _run(self, z: Tensor, site: SiteView) -> Tensor:
        inverse = site.name != self.shared.entry
        if self.axis == -1:
            return self.shared.run(z, inverse)
        return self.shared.run(z.movedim(self.axis, -1), inverse).movedim(-1, self.axis)
