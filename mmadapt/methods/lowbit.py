"""Bottlenecks of few bits.

Jie et al. 2023, Revisiting the Parameter Efficiency of Adapters from the Perspective of Precision
Redundancy, arXiv:2307.16867

    y + s·act(x·Q(D)ᵀ)·Q(U)ᵀ,   Q(W) = σ·code((W − μ) / σ) + μ

μ and σ are the mean and deviation of the matrix and the codes are least in mean absolute error for a
normal variable. U starts from N(0, 0.001²) within two deviations, since Q has no meaning at zero.

A file holds which code each element has, μ and σ. W = σ·code + μ is then all that is known of the
latent weights, so a loaded layer starts from weights that lie on their codes and keeps μ and σ.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmadapt.core.layer import Layer, empty, fill_normal, fill_uniform, require_aligned
from mmadapt.errors import AdapterError, AdapterFileError
from mmadapt.ops.bottleneck import bottleneck
from mmadapt.ops.reference import (
    channel_axis,
    low_bit,
    nearest_codes,
    normal_codes,
    pack_bits,
    standardised,
    unpack_bits,
)

if TYPE_CHECKING:
    from mmadapt.adapter import BiAdaptFormer
    from mmadapt.core.context import Context
    from mmadapt.core.site import SiteView


class BiAdaptFormerLayer(Layer):
    """Parameters: down (H, C_in), up (C, H), both before quantisation.

    Buffers, once sealed: mean () and deviation () of each as the file had them; −1 for a deviation
    says that the weights' own hold.
    """

    why_not_merge = "an activation stands between its two projections"

    def __init__(self, adapter: BiAdaptFormer, site: SiteView, generator: torch.Generator) -> None:
        super().__init__()
        if site.span.layout == "BD":
            raise AdapterError(
                f"BiAdaptFormer reads the input of {site.name}, which is not made of features",
                "choose a site such as '*.layers[*].mlp'",
            )
        require_aligned(site, "BiAdaptFormer")
        self.bits = adapter.bits
        self.codes = normal_codes(adapter.bits)
        self.activation = adapter.activation
        self.scale = float(adapter.scale)
        self.axis = channel_axis(site.span.layout)
        self.down = empty(site, adapter.width, site.width_in)
        self.up = empty(site, site.width, adapter.width)
        fill_uniform(self.down, 1 / math.sqrt(site.width_in), generator)
        fill_normal(self.up, 0.001, generator, within=2.0)
        for word in ("down", "up"):
            self.register_buffer(f"{word}_mean", torch.zeros_like(empty(site)).detach())
            self.register_buffer(f"{word}_deviation", -torch.ones_like(empty(site)).detach())

    def after(self, acc: Tensor, y: Tensor, x: Tensor, context: Context, site: SiteView) -> Tensor:
        down = low_bit(self.down, self.codes, *self._statistics("down"))
        up = low_bit(self.up, self.codes, *self._statistics("up"))
        if self.axis == -1:
            return bottleneck(acc, x, down, None, up, None, self.activation, self.scale)
        z = x.movedim(self.axis, -1)
        delta = bottleneck(None, z, down, None, up, None, self.activation, self.scale)
        return acc + delta.movedim(-1, self.axis)

    def _statistics(self, word: str) -> tuple[Tensor, Tensor]:
        """Mean and deviation () of one matrix: the file's, or its own; branch-free for compilers."""
        weight, mean, deviation = (getattr(self, word + end) for end in ("", "_mean", "_deviation"))
        sealed = deviation >= 0
        return torch.where(sealed, mean, weight.mean()), torch.where(
            sealed, deviation, weight.std()
        )

    def _chosen(self, word: str) -> Tensor:
        """Which code each element of one matrix has, int64 of its shape."""
        return nearest_codes(standardised(getattr(self, word), *self._statistics(word)), self.codes)

    @torch.no_grad()
    def to_file(self) -> dict[str, Tensor]:
        found = {}
        for word in ("down", "up"):
            found[f"{word}_codes"] = pack_bits(self._chosen(word), self.bits)
            found[f"{word}_mean"], found[f"{word}_deviation"] = self._statistics(word)
        return found

    @torch.no_grad()
    def from_file(self, tensors: dict[str, Tensor]) -> None:
        for word in ("down", "up"):
            weight = getattr(self, word)
            mean = tensors[f"{word}_mean"].to(weight.dtype)
            deviation = tensors[f"{word}_deviation"].to(weight.dtype)
            chosen = unpack_bits(tensors[f"{word}_codes"], self.bits, weight.numel())
            code = torch.tensor(self.codes, dtype=weight.dtype)[chosen].view(weight.shape)
            weight.copy_(code * (deviation + 1e-5) + mean)  # `standardised` finds the code again
            getattr(self, f"{word}_mean").copy_(mean)
            getattr(self, f"{word}_deviation").copy_(deviation)
            found = self._chosen(word).flatten().cpu()
            if not (deviation >= 0 and mean.isfinite() and torch.equal(found, chosen)):
                raise AdapterFileError(
                    f"{word}: a mean of {float(mean):g} and a deviation of {float(deviation):g} "
                    "give its codes no values",
                    "nothing was loaded; save it again, in float32",
                )

    def describe(self) -> dict[str, Any]:
        numbers = self.down.numel() + self.up.numel()
        return {"bytes": self.bits * numbers / 8 + 2 * 8}
