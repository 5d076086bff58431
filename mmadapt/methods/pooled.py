"""Methods on pooled features and logits.

Gao et al. 2021, CLIP-Adapter: Better Vision-Language Models with Feature Adapters, arXiv:2110.04544

    f' = r·relu(relu(f·W1)·W2) + (1 − r)·f

Zhang et al. 2022, Tip-Adapter: Training-free Adaption of CLIP for Few-shot Classification,
arXiv:2207.09519

    logits' = logits + α·exp(−β·(1 − f̂·Kᵀ))·L,   K: unit features of the shots, L: their classes
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmadapt.core.layer import Layer, empty, fill_uniform
from mmadapt.errors import AdapterError
from mmadapt.ops.reference import cache_votes, clip_adapter

if TYPE_CHECKING:
    from mmadapt.adapter import ClipAdapter, TipAdapter
    from mmadapt.core.context import Context
    from mmadapt.core.site import SiteView


class ClipAdapterLayer(Layer):
    """Parameters: first (D/r, D), second (D, D/r); ratio () too, with an identity start."""

    def __init__(self, adapter: ClipAdapter, site: SiteView, generator: torch.Generator) -> None:
        super().__init__()
        hidden, rest = divmod(site.width, adapter.reduction)
        if rest or hidden == 0:
            raise AdapterError(
                f"ClipAdapter: reduction {adapter.reduction} does not divide the {site.width} "
                f"channels at {site.name}"
            )
        self.first = empty(site, hidden, site.width)
        self.second = empty(site, site.width, hidden)
        fill_uniform(self.first, 1 / math.sqrt(site.width), generator)
        fill_uniform(self.second, 1 / math.sqrt(hidden), generator)
        self.learned = adapter.start == "identity"
        self.ratio: Tensor | float = float(adapter.ratio)
        if self.learned:
            del self.ratio
            self.ratio = empty(site)
            nn.init.zeros_(self.ratio)

    def after(self, acc: Tensor, y: Tensor, x: Tensor, context: Context, site: SiteView) -> Tensor:
        return acc + clip_adapter(y, self.first, self.second, self.ratio)

    def describe(self) -> dict[str, Any]:
        return {"ratio": float(torch.as_tensor(self.ratio).detach())}


class TipAdapterLayer(Layer):
    """keys (N, D), a parameter with `train_keys`; buffers labels (N,) int64, residual, sharpness."""

    keys: Tensor
    labels: Tensor
    residual: Tensor
    sharpness: Tensor

    def __init__(self, adapter: TipAdapter, site: SiteView, generator: torch.Generator) -> None:
        super().__init__()
        if site.span.layout != "BK":
            raise AdapterError(
                f"TipAdapter votes for the class of each row, and {site.name} gives logits "
                f"{', '.join(site.span.layout)}",
                "use the logits of a classifier of rows, such as mmadapt.tasks.few_shot builds",
            )
        self.classes = site.width
        keys = torch.zeros_like(empty(site, adapter.entries, site.width_in))
        if adapter.train_keys:
            self.keys = nn.Parameter(keys)
        else:
            self.register_buffer("keys", keys.detach())
        labels = torch.full((adapter.entries,), -1, dtype=torch.int64, device=keys.device)
        self.register_buffer("labels", labels)  # −1: an empty slot, which casts no vote
        # buffers, since the validation search sets them after the cache is filled
        self.register_buffer("residual", keys.detach().new_tensor(float(adapter.residual)))
        self.register_buffer("sharpness", keys.detach().new_tensor(float(adapter.sharpness)))

    def after(self, acc: Tensor, y: Tensor, x: Tensor, context: Context, site: SiteView) -> Tensor:
        votes = cache_votes(x, self.keys, self.labels, self.classes, self.sharpness)
        return acc + self.residual.to(acc.dtype) * votes

    def describe(self) -> dict[str, Any]:
        filled = int((self.labels >= 0).sum())
        return {
            "residual": float(self.residual),
            "sharpness": float(self.sharpness),
            "filled": float(filled),
        }
