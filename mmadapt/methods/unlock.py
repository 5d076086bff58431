"""Backbone tensors that are trained themselves.

Ben Zaken et al. 2022, BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked
Language-models, arXiv:2106.10199, trains biases; others norms, or a whole decoder.

    W' = W + Δ,   Δ zero at the start
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mmadapt.core.layer import Layer, empty

if TYPE_CHECKING:
    from mmadapt.adapter import Unlock
    from mmadapt.core.context import Context
    from mmadapt.core.site import SiteView


class UnlockLayer(Layer):
    """Parameters: change, shaped as the role's rows of the weight."""

    def __init__(self, adapter: Unlock, site: SiteView, generator: torch.Generator) -> None:
        super().__init__()
        assert site.holder is not None  # a `weight` port has one
        shape = site.holder.get_parameter(site.parameter).shape
        self.change = empty(site, site.rows[1] - site.rows[0], *shape[1:])
        nn.init.zeros_(self.change)

    def weight(self, weight: Tensor, context: Context, site: SiteView) -> Tensor:
        return (weight.to(self.change.dtype) + self.change).to(weight.dtype)

    def fold(
        self, weight: Tensor, bias: Tensor | None, site: SiteView
    ) -> tuple[Tensor, Tensor | None] | None:
        return self.weight(weight, None, site), bias  # type: ignore[arg-type]
