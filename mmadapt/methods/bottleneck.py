"""Bottleneck adapters.

Houlsby et al. 2019, Parameter-Efficient Transfer Learning for NLP, arXiv:1902.00751
He et al. 2022, Towards a Unified View of Parameter-Efficient Transfer Learning, arXiv:2110.04366

    y + s·(act(z·Dᵀ + b_d)·Uᵀ + b_u),   z = y (sequential) or x (parallel)

U and both biases start at zero, so that the layer starts as the identity; D is drawn as
torch's linear layers draw it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mmadapt.core.layer import Layer, empty, fill_uniform
from mmadapt.errors import AdapterError
from mmadapt.ops.reference import bottleneck

if TYPE_CHECKING:
    from mmadapt.adapter import Bottleneck
    from mmadapt.core.context import Context
    from mmadapt.core.site import SiteView


class BottleneckLayer(Layer):
    """Parameters: down (H, C_in), down_bias (H,), up (C, H), up_bias (C,)."""

    def __init__(self, adapter: Bottleneck, site: SiteView, generator: torch.Generator) -> None:
        super().__init__()
        self.parallel = adapter.placement == "parallel"
        self.activation = adapter.activation
        self.scale = float(adapter.scale)
        if self.parallel and site.span.layout == "BD":
            raise AdapterError(
                f"a parallel Bottleneck reads the input of {site.name}, which is not made of features",
                'use placement="sequential" there',
            )
        channels = site.width_in if self.parallel else site.width
        self.down = empty(site, adapter.width, channels)
        self.down_bias = empty(site, adapter.width)
        self.up = empty(site, site.width, adapter.width)
        self.up_bias = empty(site, site.width)
        fill_uniform(self.down, 1 / math.sqrt(channels), generator)
        for parameter in (self.down_bias, self.up, self.up_bias):
            nn.init.zeros_(parameter)

    def after(self, acc: Tensor, y: Tensor, x: Tensor, context: Context, site: SiteView) -> Tensor:
        z = x if self.parallel else y
        return acc + bottleneck(
            z, self.down, self.down_bias, self.up, self.up_bias, self.activation, self.scale
        )
