"""SAM-Med2D.

Cheng et al. 2023, SAM-Med2D, arXiv:2308.16184

    y + norm(n + relu(widen(relu(narrow(n·σ(relu(mean(n)·Sᵀ)·Eᵀ))))))

n is what the MLP reads, a grid (B, H, W, C). The norm's weight and bias start at zero, so that the
layer starts as the identity.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmadapt.adapter import Unlock
from mmadapt.core.layer import Layer, empty, fill_uniform
from mmadapt.errors import SiteError
from mmadapt.methods.unlock import UnlockLayer
from mmadapt.ops.reference import layer_norm, linear

if TYPE_CHECKING:
    from mmadapt.adapter import SAMMed2D
    from mmadapt.core.context import Context
    from mmadapt.core.site import SiteView


def layer_at(adapter: SAMMed2D, site: SiteView, generator: torch.Generator) -> Layer:
    """What SAM-Med2D has at a site: beside an MLP of the encoder, or a tensor that is trained."""
    if site.port == "weight":
        return UnlockLayer(Unlock(), site, generator)
    return SAMMed2DLayer(adapter, site, generator)


class SAMMed2DLayer(Layer):
    """Parameters: squeeze (H, C), expand (C, H), narrow (C, C, 3, 3), widen (C, C, 4, 4).

    And norm_weight and norm_bias (C,).
    """

    why_not_merge = "activations stand between its projections"

    def __init__(self, adapter: SAMMed2D, site: SiteView, generator: torch.Generator) -> None:
        super().__init__()
        if site.span.layout != "BHWC" or site.span.rows != "one" or not site.span.aligned:
            raise SiteError(
                f"SAMMed2D reads the whole grid of an image's tokens, and {site.name} has none",
                "attach it to the MLPs of a SAM: at='vision.layers[*].mlp'",
            )
        channels = site.width
        width = adapter.width_of(channels)
        self.squeeze, self.expand = empty(site, width, channels), empty(site, channels, width)
        self.narrow = empty(site, channels, channels, 3, 3)
        self.widen = empty(site, channels, channels, 4, 4)  # inputs first, as torch has it
        self.norm_weight, self.norm_bias = empty(site, channels), empty(site, channels)
        for tensor in (self.squeeze, self.expand, self.narrow, self.widen):
            fill_uniform(tensor, 1 / math.sqrt(tensor[0].numel()), generator)
        nn.init.constant_(self.norm_weight, float(adapter.start == "published"))
        nn.init.zeros_(self.norm_bias)

    def after(self, acc: Tensor, y: Tensor, x: Tensor, context: Context, site: SiteView) -> Tensor:
        n = x.to(self.squeeze.dtype)
        mean = n.mean(dim=(1, 2), keepdim=True)  # (B, 1, 1, C)
        gate = linear(F.relu(linear(mean, self.squeeze, None)), self.expand, None).sigmoid()
        maps = (n * gate).movedim(-1, 1)
        maps = F.relu(F.conv2d(maps, self.narrow, stride=2, padding=1))
        maps = F.relu(F.conv_transpose2d(maps, self.widen, stride=2, padding=1))
        maps = maps.movedim(1, -1)[:, : n.shape[1], : n.shape[2]]
        return acc + layer_norm(n + maps, self.norm_weight, self.norm_bias).to(acc.dtype)
