"""Bottlenecks that convolve along time.

`ConvAdapter`: Cappellazzo et al. 2023, Parameter-Efficient Transfer Learning of Audio Spectrogram
Transformers, arXiv:2312.03694

    y + s·(silu(norm(conv(glu(norm(x)·Dᵀ + b_d))))·Uᵀ + b_u)

conv takes each channel by itself. The authors norm over the batch behind it; a LayerNorm here keeps
clips apart.

`ConvPass1d`: Guo et al. 2023, Audio-Visual Deception Detection: DOLOS Dataset and
Parameter-Efficient Crossmodal Learning, arXiv:2303.12745

    y + s·(g(conv(g(x·Dᵀ + b_d)))·Uᵀ + b_u),   g(z) = z·σ(1.702 z)

conv mixes the channels. U and its bias start at zero in both; padding is zero before conv.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmadapt.core.layer import Layer, empty, fill_uniform, require_aligned
from mmadapt.errors import AdapterError, CheckError
from mmadapt.ops.reference import layer_norm, linear, quick_gelu
from mmadapt.ops.sound import along_time

if TYPE_CHECKING:
    from mmadapt.adapter import ConvAdapter, ConvPass1d
    from mmadapt.core.context import Context
    from mmadapt.core.site import SiteView


class _TimeLayer(Layer):
    """What both share: where they may stand, and the convolution."""

    facts = ("mask", "tokens")
    why_not_merge = "activations stand between its projections"
    kernel: nn.Parameter
    kernel_bias: nn.Parameter
    causal: bool

    def _convolve(self, z: Tensor, context: Context, site: SiteView) -> Tensor:
        first, rows = site.span.prefix or 0, site.span.grid_rows or 1
        tokens = context.get("tokens", z.shape[1])
        if z.shape[1] != tokens or (tokens - first) % rows:
            raise CheckError(
                f"{z.shape[1]} tokens came to {site.name}, and the backbone has {tokens} in rows of "
                f"{rows}, so it cannot be told which stand side by side in time",
                "no prompts in the same block as a convolution along time",
            )
        mask = frame_mask(context, z, site)
        return along_time(z, self.kernel, self.kernel_bias, mask, first, rows, self.causal)


class ConvAdapterLayer(_TimeLayer):
    """Parameters: norm_weight, norm_bias (C,), down (2·H, C), down_bias (2·H,), kernel (H, 1, taps),
    kernel_bias (H,), inner_weight, inner_bias (H,), up (C, H), up_bias (C,).
    """

    def __init__(self, adapter: ConvAdapter, site: SiteView, generator: torch.Generator) -> None:
        super().__init__()
        require_time(site, "ConvAdapter")
        self.parallel = adapter.placement == "parallel"
        if self.parallel:
            require_aligned(site, "a parallel ConvAdapter")
        self.causal, self.scale, self.dropout = adapter.causal, adapter.scale, adapter.dropout
        channels = site.width_in if self.parallel else site.width
        width = adapter.width
        self.norm_weight, self.norm_bias = empty(site, channels), empty(site, channels)
        self.down, self.down_bias = empty(site, 2 * width, channels), empty(site, 2 * width)
        self.kernel, self.kernel_bias = empty(site, width, 1, adapter.kernel), empty(site, width)
        self.inner_weight, self.inner_bias = empty(site, width), empty(site, width)
        self.up, self.up_bias = empty(site, site.width, width), empty(site, site.width)
        fill_uniform(self.down, 1 / math.sqrt(channels), generator)
        fill_uniform(self.kernel, 1 / math.sqrt(adapter.kernel), generator)
        for parameter in (self.norm_weight, self.inner_weight):
            nn.init.ones_(parameter)
        biases = (self.norm_bias, self.down_bias, self.kernel_bias, self.inner_bias)
        for parameter in (*biases, self.up, self.up_bias):
            nn.init.zeros_(parameter)

    def after(self, acc: Tensor, y: Tensor, x: Tensor, context: Context, site: SiteView) -> Tensor:
        z = layer_norm(x if self.parallel else y, self.norm_weight, self.norm_bias)
        hidden = F.glu(linear(z, self.down, self.down_bias), -1)
        hidden = self._convolve(hidden, context, site)
        hidden = F.silu(layer_norm(hidden, self.inner_weight, self.inner_bias))
        if self.dropout and self.training:
            hidden = F.dropout(hidden, self.dropout)
        return acc + (self.scale * linear(hidden, self.up, self.up_bias)).to(acc.dtype)


class ConvPass1dLayer(_TimeLayer):
    """Parameters: down (H, C_in), down_bias (H,), kernel (H, H, taps), kernel_bias (H,), up (C, H),
    up_bias (C,).
    """

    def __init__(self, adapter: ConvPass1d, site: SiteView, generator: torch.Generator) -> None:
        super().__init__()
        require_time(site, "ConvPass1d")
        require_aligned(site, "ConvPass1d")
        self.causal, self.scale, self.dropout = adapter.causal, adapter.scale, adapter.dropout
        width, taps = adapter.width, adapter.kernel
        self.down, self.down_bias = empty(site, width, site.width_in), empty(site, width)
        self.kernel, self.kernel_bias = empty(site, width, width, taps), empty(site, width)
        self.up, self.up_bias = empty(site, site.width, width), empty(site, site.width)
        fill_uniform(self.down, 1 / math.sqrt(site.width_in), generator)
        fill_uniform(self.kernel, 1 / math.sqrt(width * taps), generator)
        for parameter in (self.down_bias, self.kernel_bias, self.up, self.up_bias):
            nn.init.zeros_(parameter)

    def after(self, acc: Tensor, y: Tensor, x: Tensor, context: Context, site: SiteView) -> Tensor:
        hidden = quick_gelu(linear(x, self.down, self.down_bias))
        hidden = quick_gelu(self._convolve(hidden, context, site))
        if self.dropout and self.training:
            hidden = F.dropout(hidden, self.dropout)
        return acc + (self.scale * linear(hidden, self.up, self.up_bias)).to(acc.dtype)


def require_time(site: SiteView, what: str) -> None:
    """Refuse a site whose tokens do not stand along time."""
    span = site.span
    if span.layout != "BTC" or (span.prefix is not None and span.grid_rows is None):
        raise AdapterError(
            f"{what} convolves along time, and {site.name} does not hold frames",
            "choose a site such as 'audio.layers[*].mlp'; mmadapt.Convpass is for images",
        )
    refuse_cached(site, what)


def refuse_cached(site: SiteView, what: str) -> None:
    """Refuse a decoder's site for a layer that reads several tokens at once."""
    if site.role.startswith("text."):
        raise AdapterError(
            f"{what} at {site.name} would not see the tokens that a decoder has already cached",
            "choose a site of an audio encoder, or mmadapt.Bottleneck, which takes each token alone",
        )


def frame_mask(context: Context, z: Tensor, site: SiteView) -> Tensor | None:
    """Which tokens of z (B, T, C) are no padding, bool (B, T); None: all of them."""
    mask = context.get("mask")
    if mask is None:
        return None
    if tuple(mask.shape) != tuple(z.shape[:2]):
        raise CheckError(
            f"the mask is {tuple(mask.shape)}, and {tuple(z.shape[:2])} tokens came to {site.name}",
            "give mmadapt.context(model, mask=…) as (clips, tokens of the encoder), not samples",
        )
    return mask.bool()
