"""New output layers.

Alain and Bengio 2016, Understanding Intermediate Layers Using Linear Classifier Probes,
arXiv:1610.01644

    logits = f·Wᵀ + b   or   LayerNorm(f)·Wᵀ + b,   W and b zero at the start
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmadapt.core.layer import Layer, empty
from mmadapt.errors import AdapterError
from mmadapt.ops.reference import channel_axis, layer_norm, linear

if TYPE_CHECKING:
    from mmadapt.adapter import Head
    from mmadapt.core.context import Context
    from mmadapt.core.site import SiteView


class HeadLayer(Layer):
    """Parameters: matrix (K, D), bias (K,); with a norm norm_weight (D,) and norm_bias (D,)."""

    additive = False
    why_not_merge = "it takes the place of an output layer, whose shape is another"

    def __init__(self, adapter: Head, site: SiteView, generator: torch.Generator) -> None:
        super().__init__()
        layout = site.span.layout
        if "[" in site.role or channel_axis(layout) != -1:
            raise AdapterError(
                f"Head takes the place of an output, and the backbone goes on computing with "
                f"{site.name}",
                "choose its outputs: 'logits', or pooled features (see mmadapt.sites); "
                "mmadapt.Anatomy.from_paths names a module that has no role, such as a pooler",
            )
        self.reads_input = layout.endswith("K")  # a classifier's own output is of no use
        features = site.width_in if self.reads_input else site.width
        assert adapter.classes is not None  # given, or counted
        self.matrix, self.bias = (
            empty(site, adapter.classes, features),
            empty(site, adapter.classes),
        )
        nn.init.zeros_(self.matrix)
        nn.init.zeros_(self.bias)
        self.norm = adapter.norm
        if self.norm:
            self.norm_weight, self.norm_bias = empty(site, features), empty(site, features)
            nn.init.ones_(self.norm_weight)
            nn.init.zeros_(self.norm_bias)

    def after(self, acc: Tensor, y: Tensor, x: Tensor, context: Context, site: SiteView) -> Tensor:
        features = x if self.reads_input else y
        dtype = features.dtype
        if self.norm:
            features = layer_norm(features, self.norm_weight, self.norm_bias)
        return linear(features, self.matrix, self.bias).to(dtype)

    def describe(self) -> dict[str, Any]:
        return {"classes": float(len(self.bias))}
