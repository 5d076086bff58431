"""A layer that counts by a weight: what it changes is multiplied by it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mmadapt.core.context import Context
    from mmadapt.core.layer import Layer
    from mmadapt.core.site import SiteView


class Weighted:
    """Stands in a hook's plan for one layer, and goes `weight` of the way it goes."""

    def __init__(self, layer: Layer, weight: float) -> None:
        self.layer = layer
        self.share = weight
        self.taps, self.facts = layer.taps, layer.facts

    @property
    def training(self) -> bool:
        """Whether the layer is in train mode."""
        return self.layer.training

    def read_parameters(self) -> Iterator[nn.Parameter]:
        """Those of the layer."""
        return self.layer.read_parameters()

    def before(self, x: Tensor, context: Context, site: SiteView) -> Tensor:
        """Port `in`."""
        return torch.lerp(x, self.layer.before(x, context, site), self.share)

    def after(self, acc: Tensor, y: Tensor, x: Tensor, context: Context, site: SiteView) -> Tensor:
        """Port `out`."""
        return torch.lerp(acc, self.layer.after(acc, y, x, context, site), self.share)

    def weight(self, weight: Tensor, context: Context, site: SiteView) -> Tensor:
        """Port `weight`."""
        return torch.lerp(weight, self.layer.weight(weight, context, site), self.share)
