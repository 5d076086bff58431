"""Any2Point: what guides a frozen transformer's blocks over clouds of points.

Tang et al. 2024, Any2Point: Empowering Any-modality Large Models for Efficient 3D Understanding,
arXiv:2404.07989

    block:   x ← x + pos,  …  f = mlp(norm(x)),  x ← x + f + s·A(f)
             x₃ = g(max + mean of x over each voxel),   x_v = g(mean of x + attn_v(x) over each cell)
             x ← x + c·Σ_v w_v·x_v,   w_v ∝ (cos(x_v, x₃) + 1) / 2

g is a batch norm over regions and a GELU; pos are the backbone's own positions where a token falls on
six virtual images, or lines of text, averaged. The class token has a trained position and no regions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmadapt.adapter import Bottleneck, Unlock
from mmadapt.core.layer import Layer, empty, fill_uniform
from mmadapt.errors import CheckError
from mmadapt.methods.bottleneck import BottleneckLayer
from mmadapt.methods.unlock import UnlockLayer
from mmadapt.ops.points import first_of, region_max, region_mean

if TYPE_CHECKING:
    from mmadapt.adapter import Any2Point
    from mmadapt.core.context import Context
    from mmadapt.core.site import SiteView

#: virtual images of a cloud
VIEWS = 6
MOMENTUM, EPSILON = 0.1, 1e-5


def layer_at(adapter: Any2Point, site: SiteView, generator: torch.Generator) -> Layer:
    """What Any2Point has at a site: it depends on the role and the port."""
    from mmadapt.methods.any2point_ends import CloudCall, CloudHead, PointTokens

    if site.port == "weight":
        return UnlockLayer(Unlock(), site, generator)
    if site.port == "in":
        return PositionLayer()
    if site.role.endswith(".mlp"):
        assert adapter.width is not None  # its own check has set it
        plain = Bottleneck(
            adapter.width,
            activation="quick_gelu",
            scale=float(adapter.scale),
            dropout=float(adapter.dropout),
        )
        return BottleneckLayer(plain, site, generator)
    if site.role == "model":
        head = adapter.classes is not None
        return CloudHead(adapter, site, generator) if head else CloudCall(adapter, site)
    if site.role.endswith(".embeddings"):
        return PointTokens(adapter, site, generator)
    return GuidedLayer(adapter, site, generator)


class ViewAttention(Layer):
    """The attention of each view, which all blocks share.

    Parameters: norm_weight and norm_bias (6, C); qkv (6, 3, I, C) and o (6, C, I), with biases.
    """

    def __init__(
        self, adapter: Any2Point, sites: Sequence[SiteView], generator: torch.Generator
    ) -> None:
        super().__init__()
        site = next(site for site in sites if site.role == f"{adapter.tower}.layers[0]")
        channels, inner = site.width, adapter.view_width
        self.heads = adapter.view_heads
        self.norm_weight, self.norm_bias = (
            empty(site, VIEWS, channels),
            empty(site, VIEWS, channels),
        )
        nn.init.ones_(self.norm_weight)
        nn.init.zeros_(self.norm_bias)
        self.qkv, self.qkv_bias = (
            empty(site, VIEWS, 3, inner, channels),
            empty(site, VIEWS, 3, inner),
        )
        self.o, self.o_bias = empty(site, VIEWS, channels, inner), empty(site, VIEWS, channels)
        for tensor in (self.qkv, self.o):
            fill_uniform(tensor, 1 / math.sqrt(tensor.shape[-1]), generator)
        for tensor in (self.qkv_bias, self.o_bias):
            nn.init.zeros_(tensor)

    def seen(self, x: Tensor, same: Tensor) -> Tensor:
        """What tokens x (B, T, C) see in every view of those that share their cell, (V, B, T, C).

        `same`: bool (V, B, T, T).
        """
        normed = F.layer_norm(x, x.shape[-1:])  # alike for all views, which then scale it
        normed = torch.addcmul(
            self.norm_bias[:, None], normed.flatten(0, 1), self.norm_weight[:, None]
        )
        weight, bias = self.qkv.flatten(1, 2), self.qkv_bias.flatten(1)[:, None]
        qkv = torch.baddbmm(bias, normed, weight.mT)  # (V, B·T, 3·I)
        q, k, v = (
            part.unflatten(1, x.shape[:2])
            .unflatten(-1, (self.heads, -1))
            .transpose(2, 3)
            .flatten(0, 1)
            for part in qkv.chunk(3, -1)
        )
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=same.flatten(0, 1)[:, None])
        found = found.transpose(1, 2).reshape(VIEWS, -1, self.o.shape[-1])
        return torch.baddbmm(self.o_bias[:, None], found, self.o.mT).unflatten(1, x.shape[:2])


class PositionLayer(Layer):
    """Positions before every block. No parameters."""

    why_not_merge = "it depends on where the points are"

    def before(self, x: Tensor, context: Context, site: SiteView) -> Tensor:
        return x + cloud_of(context, site)["positions"].to(x.dtype)


class GuidedLayer(Layer):
    """What the virtual images and the surroundings of tokens say of them, behind a block.

    Parameters: scale and shift (7, C) of batch norms, first that of the surroundings; buffers mean and
    variance (7, C).
    """

    why_not_merge = "it depends on where the points are"
    shared: ViewAttention
    mean: Tensor
    variance: Tensor

    def __init__(self, adapter: Any2Point, site: SiteView, generator: torch.Generator) -> None:
        super().__init__()
        assert adapter.share is not None  # its own check has set it
        self.share_of_views = float(adapter.share)
        self.scale, self.shift = (
            empty(site, 1 + VIEWS, site.width),
            empty(site, 1 + VIEWS, site.width),
        )
        nn.init.ones_(self.scale)
        nn.init.zeros_(self.shift)
        self.register_buffer("mean", torch.zeros_like(self.shift, requires_grad=False))
        self.register_buffer("variance", torch.ones_like(self.scale, requires_grad=False))

    def after(self, acc: Tensor, y: Tensor, x: Tensor, context: Context, site: SiteView) -> Tensor:
        cloud = cloud_of(context, site)
        count = cloud["near"].shape[-1]
        behind = int(cloud["last"])  # where the class token stands
        first = y.shape[1] - count - behind
        tokens = y[:, first : first + count].to(self.scale.dtype)
        near = first_of(cloud["near"])
        around = region_max(tokens, near) + region_mean(tokens, near)
        around = self._regions(around[None], near[None], slice(0, 1))[0]
        same = cloud["cells"].transpose(0, 1)  # (V, B, T, T)
        own = first_of(same)
        mixed = tokens + self.shared.seen(tokens, same)
        means = region_mean(mixed.flatten(0, 1), own.flatten(0, 1)).view_as(mixed)
        seen = self._regions(means, own, slice(1, None))
        weights = (F.cosine_similarity(seen, around, dim=-1) + 1) / 2  # (V, B, T)
        weights = weights / weights.sum(0).clamp(min=1e-6)
        change = self.share_of_views * (weights[..., None] * seen).sum(0)
        return acc + F.pad(change, (0, 0, first, behind)).to(acc.dtype)

    def _regions(self, x: Tensor, first: Tensor, which: slice) -> Tensor:
        """Batch norm and GELU of regions, each at its first token, then given to all its tokens.

        x (K, B, T, C) and first (K, B, T), of K of the norms.
        """
        if self.training:
            places = torch.arange(first.shape[-1], device=first.device)
            held = (first == places)[..., None].to(
                x.dtype
            )  # (K, B, T, 1), tokens that hold a region
            count = held.sum((1, 2)).clamp(min=1)
            mean = (x * held).sum((1, 2)) / count
            variance = ((x - mean[:, None, None]).square() * held).sum((1, 2)) / count
            with torch.no_grad():
                self.mean[which].lerp_(mean.to(self.mean.dtype), MOMENTUM)
                unbiased = variance * (count / (count - 1).clamp(min=1))
                self.variance[which].lerp_(unbiased.to(self.variance.dtype), MOMENTUM)
        else:
            mean, variance = self.mean[which], self.variance[which]
        scale = (variance + EPSILON).rsqrt() * self.scale[which]
        shift = self.shift[which] - mean * scale
        activated = F.gelu(torch.addcmul(shift[:, None, None], x, scale[:, None, None]))
        return activated.gather(2, first[..., None].expand_as(activated))

    def describe(self) -> dict[str, Any]:
        return {"share": self.share_of_views}


def cloud_of(context: Context, site: SiteView) -> dict[str, Any]:
    """positions (B, 1 + T, C), near (B, T, T), cells (B, 6, T, T) and last of this forward pass.

    `last`: whether the class token stands behind the others.
    """
    cloud = context.get("cloud")
    if cloud is None:
        raise CheckError(
            f"{site.name} was reached by a call that did not begin with points",
            "call the whole model with clouds (B, N, 3)",
        )
    return cloud
