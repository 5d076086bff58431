"""3DSAM-adapter: from a volume to tokens, clicks, and from features to masks of a volume.

Gong et al. 2023, arXiv:2306.13465. z(h, w, d) = Σ_t K_t·patch(slice d·p + t)(h, w) + P(h, w) + E(d);
necks behind every quarter of the blocks; clicks are sampled from the deepest features, and meet
learned queries to which the features then attend; the decoder joins all four and the volume itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mmadapt.core.layer import empty, fill_normal
from mmadapt.errors import AdapterError
from mmadapt.methods.drawn import Drawn
from mmadapt.methods.three_d_sam_inputs import check_volume
from mmadapt.ops.reference import linear
from mmadapt.ops.volume import grid_places, places_of, resized_positions, sample

if TYPE_CHECKING:
    from mmadapt.adapter import ThreeDSAM
    from mmadapt.core.context import Context
    from mmadapt.core.parts import GridEncoder
    from mmadapt.core.site import SiteView

#: depths at which features are taken
LEVELS = 4
#: layers of the prompt encoder, and the width of its perceptrons in channels
LAYERS, INNER = 2, 8


class VolumeEncoderLayer(Drawn):
    """Volumes (B, 1 or 3, D, H, W) to four features (B, F, d, h, w).

    Parameters: slices (C, p), slices_bias (C,), planes (planes, C); of the four necks reduce
    (4, F, C), mix (4, F, F, 3, 3, 3) and two norms (4, F).
    """

    additive = False
    why_not_merge = "it takes volumes where the backbone takes images"

    def __init__(self, adapter: ThreeDSAM, site: SiteView, generator: torch.Generator) -> None:
        super().__init__()
        self.released = adapter.variant == "released"
        self.zoom, self.recompute = adapter.zoom, adapter.recompute
        parts: GridEncoder = site.span.parts(site.module)  # type: ignore[misc]
        weight: Any = parts.patch.weight
        channels, _, patch = weight.shape[:3]
        if patch % adapter.zoom:
            raise AdapterError(
                f"ThreeDSAM: zoom is {adapter.zoom}, and a patch is {patch} pixels",
                f"choose a divisor of {patch}: a token is then patch / zoom voxels a side",
            )
        if len(parts.blocks) < LEVELS // 2:
            raise AdapterError(f"{len(parts.blocks)} block has no depths to take features at")
        self.draw(site, generator, "slices", (channels, patch))
        if not self.released:  # the mean of the slices
            nn.init.constant_(self.get_parameter("slices"), 1 / patch)
            nn.init.zeros_(self.get_parameter("slices_bias"))
        self.planes = empty(site, adapter.planes, channels)
        nn.init.constant_(self.planes, 1.0 if self.released else 0.0)
        width = site.width
        self.draw(site, generator, "reduce", (width, channels), (LEVELS,), bias=False)
        self.draw_norm(site, "norm1", LEVELS, width)
        self.draw(site, generator, "mix", (width, width, 3, 3, 3), (LEVELS,), bias=False)
        self.draw_norm(site, "norm2", LEVELS, width)

    def around(
        self,
        call: Callable[..., Any],
        args: tuple,
        kwargs: dict[str, Any],
        context: Context,
        site: SiteView,
    ) -> list[Tensor]:
        parts: GridEncoder = site.span.parts(site.module)  # type: ignore[misc]
        tokens = self._tokens(args[0] if args else next(iter(kwargs.values())), parts)
        planes = tokens.shape[1]
        context.tell(planes=planes)
        x: Any = tokens.flatten(0, 1)
        features = []
        ends = [max(1, round(len(parts.blocks) * (n + 1) / LEVELS)) for n in range(LEVELS)]
        for place, block in enumerate(parts.blocks, 1):
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
            for level in range(LEVELS):
                if ends[level] == place:
                    features.append(self._neck(level, x.unflatten(0, (-1, planes))))
        return features

    def _tokens(self, volume: Tensor, parts: GridEncoder) -> Tensor:
        """Tokens (B, d, h, w, C) of a volume, with their positions."""
        weight: Any = parts.patch.weight
        channels, patch = weight.shape[1], weight.shape[2]
        side = self.planes.shape[0] * patch // self.zoom if self.released else 0
        check_volume(volume, channels, patch // self.zoom, side)
        zoomed = F.interpolate(volume.to(weight.dtype), scale_factor=self.zoom, mode="trilinear")
        zoomed = zoomed.expand(-1, channels, -1, -1, -1)
        maps = parts.patch(zoomed.transpose(1, 2).flatten(0, 1))  # (B·D, C, h, w)
        maps = maps.to(self.planes.dtype).unflatten(0, (len(volume), -1, patch))
        tokens = torch.einsum("bdpchw,cp->bdhwc", maps, self.get_parameter("slices"))
        tokens = tokens + self.get_parameter("slices_bias")
        depth, height, width = tokens.shape[1:4]
        if parts.positions is not None:
            flat = resized_positions(parts.positions, height, width)
            tokens = tokens + flat[:, None].to(tokens.dtype)
        along = self.planes
        if depth != len(along):
            along = F.interpolate(along.T[None], depth, mode="linear")[0].T
        return (tokens + along[:, None, None]).to(weight.dtype)

    def _neck(self, level: int, grid: Tensor) -> Tensor:
        reduced = linear(grid, self.get_parameter("reduce")[level], None)
        reduced = self.normed(reduced, "norm1", level).movedim(-1, 1)
        mixed = F.conv3d(reduced, self.get_parameter("mix")[level], padding=1)
        return self.normed(mixed.movedim(1, -1), "norm2", level).movedim(-1, 1)


class ClickLayer(Drawn):
    """The deepest features (B, F, d, h, w) after they have seen the clicks.

    Parameters, of its two layers: queries (2, Q, F); of the attentions self, image and (general)
    clicks, I wide inside, qkv (2, 3, I, F) and o (2, F, I); four norms (2, F); up (2, 8·F, F) and down
    (2, F, 8·F); biases. In the general variant also kinds (2, F), of clicks beside and on the object,
    and a buffer, the frequencies (3, F / 2) of places.
    """

    additive = False
    why_not_merge = "what it does depends on the clicks"

    def __init__(self, adapter: ThreeDSAM, site: SiteView, generator: torch.Generator) -> None:
        super().__init__()
        self.released = adapter.variant == "released"
        self.heads, width = adapter.heads, site.width
        if width % (2 * self.heads):
            raise AdapterError(
                f"ThreeDSAM: {self.heads} heads do not divide half of the {width} channels of clicks",
                "choose heads= among the divisors of that half",
            )
        several = (LAYERS,)
        self.queries = empty(site, LAYERS, adapter.queries, width)
        fill_normal(self.queries, 1.0, generator)
        inner = {"self": width, "image": width // 2}
        if not self.released:
            inner["clicks"] = width // 2
        for name, size in inner.items():
            self.draw(site, generator, f"{name}_qkv", (size, width), (LAYERS, 3))
            self.draw(site, generator, f"{name}_o", (width, size), several)
        for place in range(1, 5):
            self.draw_norm(site, f"norm{place}", LAYERS, width)
        self.draw(site, generator, "up", (INNER * width, width), several)
        self.draw(site, generator, "down", (width, INNER * width), several)
        if not self.released:
            self.kinds = empty(site, 2, width)
            fill_normal(self.kinds, 1.0, generator)
            self.frequencies: Tensor
            self.register_buffer("frequencies", self.kinds.new_empty(3, width // 2))
            fill_normal(self.frequencies, 1.0, generator)

    def around(
        self,
        call: Callable[..., Any],
        args: tuple,
        kwargs: dict[str, Any],
        context: Context,
        site: SiteView,
    ) -> Tensor:
        deepest, points, labels, size = args
        deepest = deepest.to(self.queries.dtype)
        grid = deepest.shape[2:]
        places = places_of(points.to(deepest.dtype), size)
        padding: Literal["zeros", "border"] = "zeros" if self.released else "border"
        clicks = sample(deepest, places, padding)  # (B, N, F)
        image = deepest.flatten(2).transpose(1, 2)  # (B, d·h·w, F)
        where = there = None
        if not self.released:
            clicks = clicks + F.embedding(labels.clamp(min=0), self.kinds).to(clicks.dtype)
            where, there = self._waves(places), self._waves(grid_places(grid, deepest))
        given = F.pad(labels >= 0, (self.queries.shape[1], 0), value=True)  # (B, Q + N)
        for layer in range(LAYERS):
            mask = given[:, None, None]
            image, clicks = self._layer(layer, image, clicks, where, there, mask)
        return image.transpose(1, 2).unflatten(2, grid)

    def _layer(
        self,
        layer: int,
        image: Tensor,
        clicks: Tensor,
        where: Tensor | None,
        there: Tensor | None,
        given: Tensor,
    ) -> tuple[Tensor, Tensor]:
        own = self.queries[layer]
        tokens = torch.cat([own.to(clicks.dtype).expand(len(clicks), -1, -1), clicks], 1)
        placed, seen = tokens, image
        if where is not None and there is not None:
            placed = tokens + F.pad(where, (0, 0, len(own), 0))
            seen = image + there
        change = self._attend("self", layer, placed, placed, tokens, given)
        change = self.normed(change, "norm1", layer)
        if not self.released:
            change = change + self._attend("clicks", layer, placed + change, seen, image)
        tokens = self.normed(tokens + change, "norm2", layer)
        queries, clicks = tokens.split([len(own), clicks.shape[1]], 1)
        inner = self.project(F.relu(self.project(queries, "up", layer)), "down", layer)
        queries = self.normed(queries + inner, "norm3", layer)
        image = image + self._attend("image", layer, seen, queries, queries)
        return self.normed(image, "norm4", layer), clicks

    def _attend(
        self, name: str, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        q, k, v = (
            self.project(x, f"{name}_qkv", layer, place)
            .unflatten(-1, (self.heads, -1))
            .transpose(1, 2)
            for place, x in enumerate((q, k, v))
        )
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.project(found.transpose(1, 2).flatten(2), f"{name}_o", layer)

    def _waves(self, places: Tensor) -> Tensor:
        """Places (…, 3) as sines and cosines (…, F), as SAM encodes its own."""
        angles = 2 * math.pi * places @ self.frequencies.to(places.dtype)
        return torch.cat([angles.sin(), angles.cos()], -1)


class VolumeMaskLayer(Drawn):
    """Logits (B, classes, D, H, W) of four features and the volume.

    Parameters: of the four levels first (4, F / 2, F, 3, 3, 3) and second (4, F / 2, F / 2, 3, 3, 3);
    join (F / 2, 2·F + 1, 3, 3, 3) and last (classes, F / 2, 3, 3, 3).
    """

    additive = False
    why_not_merge = "it is a mask decoder of its own"

    def __init__(self, adapter: ThreeDSAM, site: SiteView, generator: torch.Generator) -> None:
        super().__init__()
        half, taps = site.width // 2, (3, 3, 3)
        for name, (outputs, inputs), several in (
            ("first", (half, site.width), (LEVELS,)),
            ("second", (half, half), (LEVELS,)),
            ("join", (half, LEVELS * half + 1), ()),
            ("last", (adapter.classes, half), ()),
        ):
            self.draw(site, generator, name, (outputs, inputs, *taps), several, bias=False)

    def around(
        self,
        call: Callable[..., Any],
        args: tuple,
        kwargs: dict[str, Any],
        context: Context,
        site: SiteView,
    ) -> Tensor:
        features, volume = args
        fine = [2 * length for length in features[0].shape[2:]]
        joined = []
        for level, z in enumerate(features):
            for name in ("first", "second"):
                z = _block(z, self.get_parameter(name)[level])
            joined.append(F.interpolate(z, fine, mode="trilinear", align_corners=True))
        grey = volume.mean(1, keepdim=True).to(joined[0].dtype)
        joined.append(F.interpolate(grey, fine, mode="trilinear"))
        z = _block(torch.cat(joined, 1), self.get_parameter("join"))
        z = F.conv3d(z, self.get_parameter("last"), padding=1)
        return F.interpolate(z, volume.shape[2:], mode="trilinear")


def _block(z: Tensor, kernel: Tensor) -> Tensor:
    return F.relu(F.instance_norm(F.conv3d(z.to(kernel.dtype), kernel, padding=1)))
