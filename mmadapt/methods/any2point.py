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
from mmadapt.ops.reference import layer_norm, linear

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

    def seen(self, x: Tensor, view: int, same: Tensor) -> Tensor:
        """What tokens x (B, T, C) see of those that share their cell, bool (B, T, T)."""
        normed = layer_norm(x, self.norm_weight[view], self.norm_bias[view])
        q, k, v = (
            linear(normed, self.qkv[view, place], self.qkv_bias[view, place])
            .unflatten(-1, (self.heads, -1))
            .transpose(1, 2)
            for place in range(3)
        )
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=same[:, None])
        return linear(found.transpose(1, 2).flatten(2), self.o[view], self.o_bias[view])


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
        around = self._regions(region_max(tokens, near) + region_mean(tokens, near), near, 0)
        seen, alike = [], []
        for view in range(VIEWS):
            same = cloud["cells"][:, view]
            own = first_of(same)
            mixed = tokens + self.shared.seen(tokens, view, same)
            seen.append(self._regions(region_mean(mixed, own), own, 1 + view))
            alike.append((F.cosine_similarity(seen[-1], around, dim=-1) + 1) / 2)
        weights = torch.stack(alike)  # (V, B, T)
        weights = weights / weights.sum(0).clamp(min=1e-6)
        change = self.share_of_views * (weights[..., None] * torch.stack(seen)).sum(0)
        return acc + F.pad(change, (0, 0, first, behind)).to(acc.dtype)

    def _regions(self, x: Tensor, first: Tensor, which: int) -> Tensor:
        """Batch norm and GELU of regions, each at its first token, then given to all its tokens."""
        if self.training:
            places = torch.arange(first.shape[1], device=first.device)
            held = (first == places)[..., None].to(x.dtype)  # (B, T, 1), tokens that hold a region
            count = held.sum().clamp(min=1)
            mean = (x * held).sum((0, 1)) / count
            variance = ((x - mean).square() * held).sum((0, 1)) / count
            with torch.no_grad():
                self.mean[which].lerp_(mean.to(self.mean.dtype), MOMENTUM)
                unbiased = variance * (count / (count - 1).clamp(min=1))
                self.variance[which].lerp_(unbiased.to(self.variance.dtype), MOMENTUM)
        else:
            mean, variance = self.mean[which], self.variance[which]
        normed = (x - mean) * (variance + EPSILON).rsqrt() * self.scale[which] + self.shift[which]
        activated = F.gelu(normed)
        return activated.gather(1, first[..., None].expand_as(activated))

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
