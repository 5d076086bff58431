"""Low-rank adaptation.

Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models, arXiv:2106.09685

    W' = W + s·B·A,   y' = y + s·B·(A·x),   A (R, inputs) random, B (outputs, R) zero, s = alpha / R

Kalajdzievski 2023, A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA, arXiv:2312.03732

    s = alpha / √R

A convolution's kernel (outputs, inputs, taps …) is such a W with inputs × taps columns: A is then a
kernel with R outputs and B a convolution of one tap.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from mmadapt.core.layer import Layer, empty, fill_uniform
from mmadapt.errors import AdapterError
from mmadapt.ops.reference import (
    add_by_row,
    by_row,
    low_rank,
    low_rank_convolution,
    low_rank_weight,
)

if TYPE_CHECKING:
    from mmadapt.adapter import LoRA
    from mmadapt.core.context import Context
    from mmadapt.core.site import SiteView


class LoRALayer(Layer):
    """Parameters: a (R, inputs, taps …), b (outputs, R).

    Serves a called linear or convolution and a weight's rows alike.
    """

    def __init__(self, adapter: LoRA, site: SiteView, generator: torch.Generator) -> None:
        super().__init__()
        if not site.parameter or site.holder is None:
            raise AdapterError(
                f"LoRA changes a weight, and {site.name} stands for none",
                "choose a site such as '*.layers[*].attn.q' or '*.layers[*].mlp.up'",
            )
        kernel = site.holder.get_parameter(site.parameter).shape
        if len(kernel) < 2:
            raise AdapterError(
                f"LoRA changes a matrix, and {site.name} stands for a vector of {kernel.numel()}",
                "mmadapt.Unlock trains vectors",
            )
        self.convolution = isinstance(site.holder, _ConvNd)
        if self.convolution:
            _check_convolution(site)
        inputs = kernel[1:].numel()
        if adapter.rank > min(site.width, inputs):
            raise AdapterError(
                f"LoRA rank {adapter.rank} exceeds the weight at {site.name}, which is "
                f"{site.width} × {inputs}",
                f"use a rank of at most {min(site.width, inputs)}",
            )
        if adapter.dropout and site.port == "weight":
            raise AdapterError(
                f"LoRA dropout acts on the input, which the `weight` port at {site.name} does not see",
                "use dropout=0.0 there",
            )
        self.scale = float(adapter.scale)
        self.dropout = float(adapter.dropout)
        self.a = empty(site, adapter.rank, *kernel[1:])
        self.b = empty(site, site.width, adapter.rank)
        fill_uniform(self.a, 1 / math.sqrt(inputs), generator)  # as PEFT and the authors do
        nn.init.zeros_(self.b)

    def after(self, acc: Tensor, y: Tensor, x: Tensor, context: Context, site: SiteView) -> Tensor:
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
        if not self.convolution:
            return acc + low_rank(x, self.a, self.b, self.scale)
        module: Any = site.holder
        return acc + low_rank_convolution(
            x, self.a, self.b, self.scale, module.stride, module.padding, module.dilation
        )

    @property
    def rowwise(self) -> bool:
        """Rows may choose among linear layers; a convolution has one kernel for the whole batch."""
        return not self.convolution

    def row_operands(self, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        b = tensors["b"].mT
        return tensors["a"].mT, b if self.scale == 1.0 else b * self.scale

    def after_rows(self, operands: Any, acc: Tensor, y: Tensor, x: Tensor) -> Tensor:
        a, b = operands
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
        hidden = torch.bmm(by_row(x, a.dtype), a)
        if acc.ndim == 3 and acc.dtype == b.dtype:
            return torch.baddbmm(acc, hidden, b)
        return add_by_row(acc, torch.bmm(hidden, b))

    def weight(self, weight: Tensor, context: Context, site: SiteView) -> Tensor:
        return low_rank_weight(weight, self.a, self.b, self.scale)

    def fold(
        self, weight: Tensor, bias: Tensor | None, site: SiteView
    ) -> tuple[Tensor, Tensor | None] | None:
        return low_rank_weight(weight, self.a, self.b, self.scale), bias


def _check_convolution(site: SiteView) -> None:
    module: Any = site.holder
    if module.transposed:
        raise AdapterError(
            f"LoRA has no form for the transposed convolution at {site.name}: its kernel's rows are "
            "inputs"
        )
    if module.groups > 1:
        raise AdapterError(
            f"LoRA at {site.name} would mix the {module.groups} groups of its convolution, which "
            "see different channels",
            "choose a convolution with groups=1",
        )
    if site.port == "out" and module.padding_mode != "zeros":
        raise AdapterError(
            f"LoRA at {site.name} pads with zeros, and the convolution pads in mode "
            f"{module.padding_mode!r}",
            f"use the `weight` port: at={site.role + ':weight'!r}",
        )
