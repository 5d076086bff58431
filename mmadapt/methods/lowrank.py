"""Low-rank adaptation.

Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models, arXiv:2106.09685

    W' = W + s·B·A,   y' = y + s·B·(A·x),   A (R, inputs) random, B (outputs, R) zero, s = alpha / R
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmadapt.core.layer import Layer, empty, fill_uniform
from mmadapt.errors import AdapterError
from mmadapt.ops.reference import low_rank, low_rank_weight

if TYPE_CHECKING:
    from mmadapt.adapter import LoRA
    from mmadapt.core.context import Context
    from mmadapt.core.site import SiteView


class LoRALayer(Layer):
    """Parameters: a (R, inputs), b (outputs, R); serves a called linear and a weight's rows alike."""

    def __init__(self, adapter: LoRA, site: SiteView, generator: torch.Generator) -> None:
        super().__init__()
        if not site.parameter:
            raise AdapterError(
                f"LoRA changes a weight, and {site.name} stands for none",
                "choose a site such as '*.layers[*].attn.q' or '*.layers[*].mlp.up'",
            )
        if adapter.rank > min(site.width, site.width_in):
            raise AdapterError(
                f"LoRA rank {adapter.rank} exceeds the weight at {site.name}, which is "
                f"{site.width} × {site.width_in}",
                f"use a rank of at most {min(site.width, site.width_in)}",
            )
        if adapter.dropout and site.port == "weight":
            raise AdapterError(
                f"LoRA dropout acts on the input, which the `weight` port at {site.name} does not see",
                "use dropout=0.0 there",
            )
        self.scale = float(adapter.scale)
        self.dropout = float(adapter.dropout)
        self.a = empty(site, adapter.rank, site.width_in)
        self.b = empty(site, site.width, adapter.rank)
        fill_uniform(self.a, 1 / math.sqrt(site.width_in), generator)  # as PEFT and the authors do
        nn.init.zeros_(self.b)

    def after(self, acc: Tensor, y: Tensor, x: Tensor, context: Context, site: SiteView) -> Tensor:
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
        return acc + low_rank(x, self.a, self.b, self.scale)

    def weight(self, weight: Tensor, context: Context, site: SiteView) -> Tensor:
        return low_rank_weight(weight, self.a, self.b, self.scale)
