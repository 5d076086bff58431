"""Any2Point: from a cloud of points to tokens, and from tokens to classes.

Tang et al. 2024, arXiv:2404.07989; its tokenizer is Point-PN's (Zhang et al. 2023, Parameter is Not All
You Need, arXiv:2303.08134):

    three times: half of the centres, their neighbours, [neighbour ‖ centre] + waves of what lies
    between, pairs of 1 × 1 convolutions around which it goes as well, the maximum of the neighbours
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmadapt.core.layer import Layer, empty, fill_normal
from mmadapt.core.parts import PatchPositions, WordPositions, Words
from mmadapt.errors import AdapterError, DataError
from mmadapt.methods.any2point import EPSILON, MOMENTUM
from mmadapt.methods.drawn import Drawn
from mmadapt.ops.points import (
    along_line,
    farthest_points,
    neighbours,
    pick,
    positions_at,
    projected,
    rows_at,
    together,
    waves,
)
from mmadapt.ops.reference import linear

if TYPE_CHECKING:
    from mmadapt.adapter import Any2Point
    from mmadapt.core.context import Context
    from mmadapt.core.site import SiteView

#: pairs of convolutions in each of the three rounds
PAIRS = (2, 1, 1)


class PointTokens(Drawn):
    """Clouds (B, N, 3) to a class token and tokens (B, 1 + T, C).

    Parameters: stem (C / 8, 3); for every pair of convolutions down and up with biases; a batch norm
    (scale, shift, and the buffers mean and variance) behind each; first and first_position (C,).
    """

    additive = False
    why_not_merge = "it takes points where the backbone takes something else"

    def __init__(self, adapter: Any2Point, site: SiteView, generator: torch.Generator) -> None:
        super().__init__()
        width = site.width
        if width % 8:
            raise AdapterError(f"Any2Point: {width} channels are no multiple of 8")
        assert adapter.neighbours and adapter.voxel and adapter.cell  # its own check has set them
        self.tokens, self.count = adapter.tokens, adapter.neighbours
        self.voxel, self.cell = adapter.voxel, adapter.cell
        self.distance, self.direction = adapter.distance, adapter.direction
        self._weight(site, generator, "stem", width // 8, 3, bias=False)
        for place, (outputs, pairs) in enumerate(zip((4, 2, 1), PAIRS, strict=True)):
            channels = width // outputs
            inner = adapter.neck if place == len(PAIRS) - 1 else channels // 2
            for pair in range(pairs):
                self._weight(site, generator, f"round{place}_down{pair}", inner, channels)
                self._weight(site, generator, f"round{place}_up{pair}", channels, inner)
        self.first, self.first_position = empty(site, width), empty(site, width)
        for tensor in (self.first, self.first_position):
            fill_normal(tensor, 0.02, generator)

    def _weight(
        self,
        site: SiteView,
        generator: torch.Generator,
        name: str,
        outputs: int,
        inputs: int,
        bias: bool = True,
    ) -> None:
        """Register a 1 × 1 convolution drawn as torch draws its own, and the batch norm behind it."""
        self.draw(site, generator, name, (outputs, inputs), bias=bias)
        for word, start in (("scale", 1.0), ("shift", 0.0)):
            tensor = empty(site, outputs)
            nn.init.constant_(tensor, start)
            self.register_parameter(f"{name}_{word}", tensor)
            kept = torch.full_like(tensor, start, requires_grad=False)
            self.register_buffer(f"{name}_{'variance' if start else 'mean'}", kept)

    def around(
        self,
        call: Callable[..., Any],
        args: tuple,
        kwargs: dict[str, Any],
        context: Context,
        site: SiteView,
    ) -> Tensor:
        points = context.get("points")
        points = first_given(args, kwargs) if points is None else points
        check_cloud(points, 4 * self.tokens)
        assert site.span.parts is not None  # the role is there for its positions
        parts = site.span.parts(site.module)
        centres, tokens = self._tokens(points.to(self.first.dtype))
        own = self.first_position.to(tokens.dtype).expand(len(points), 1, -1)
        first = self.first.to(tokens.dtype).expand(len(points), 1, -1)
        if isinstance(parts, WordPositions):
            positions, cells = self._on_lines(centres, parts)
            last = parts.causal
        else:
            positions, cells = self._on_images(centres, parts)
            last = False
        positions = _joined(own, positions, last)
        x = _joined(first, tokens, last)
        near = together((centres / self.voxel).floor())
        context.tell(
            cloud={"positions": positions, "near": near, "cells": together(cells), "last": last}
        )
        if not isinstance(parts, WordPositions):
            return x.to(parts.grid.dtype)
        x = (x + positions).to(parts.table.dtype)  # blocks add them, but words come with theirs
        return x if parts.norm is None else parts.norm(x)

    def _on_images(self, centres: Tensor, parts: PatchPositions) -> tuple[Tensor, Tensor]:
        """Positions (B, T, C) and the cells (B, 6, T, 2) of virtual images."""
        assert self.distance is not None  # checked for the tower
        height, width = parts.size
        places = projected(centres, -self.distance, height, width)  # (B, 6, T, 2)
        side = places.new_tensor([width / parts.grid.shape[1], height / parts.grid.shape[0]])
        positions = positions_at(parts.grid, places, height, width).mean(1)
        return positions, (places / (self.cell * side)).floor()

    def _on_lines(self, centres: Tensor, parts: WordPositions) -> tuple[Tensor, Tensor]:
        """Positions (B, T, C) and the cells (B, 6, T, 1) of virtual lines."""
        assert self.direction is not None  # checked for the tower
        places = along_line(centres, self.direction, len(parts.table))  # (B, 6, T)
        return rows_at(parts.table, places).mean(1), (places / self.cell).floor()[..., None]

    def _tokens(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Centres (B, T, 3) and their features (B, T, C)."""
        features = F.relu(self._convolved(points, "stem"))
        for place, pairs in enumerate(PAIRS):
            chosen = farthest_points(points, self.tokens * 2 ** (len(PAIRS) - 1 - place))
            centres = pick(points, chosen)
            near = neighbours(centres, points, min(self.count, points.shape[1]))
            between = pick(points, near) - centres[:, :, None]  # (B, M, k, 3)
            between = between / between.abs().amax((2, 3), keepdim=True).clamp(min=1e-6)
            own = pick(features, chosen)[:, :, None].expand(-1, -1, near.shape[2], -1)
            z = torch.cat([pick(features, near), own], -1)
            z = z + waves(between, z.shape[-1]).to(z.dtype)
            for pair in range(pairs):
                inner = F.relu(self._convolved(z, f"round{place}_down{pair}"))
                z = F.relu(z + self._convolved(inner, f"round{place}_up{pair}"))
            points, features = centres, z.amax(2)
        return points, features

    def _convolved(self, z: Tensor, name: str) -> Tensor:
        """A 1 × 1 convolution and its batch norm, over the last axis."""
        held = {**self._parameters, **self._buffers}
        found = linear(z, self.get_parameter(name), held.get(f"{name}_bias"))
        normed = F.batch_norm(
            found.flatten(0, -2),
            held[f"{name}_mean"],
            held[f"{name}_variance"],
            held[f"{name}_scale"],
            held[f"{name}_shift"],
            self.training,
            MOMENTUM,
            EPSILON,
        )
        return normed.view_as(found)


class CloudCall(Layer):
    """The model's own call, on a cloud. No parameters."""

    additive = False
    why_not_merge = "it takes points where the backbone takes something else"

    def __init__(self, adapter: Any2Point, site: SiteView) -> None:
        super().__init__()
        self.tokens = adapter.tokens

    def around(
        self,
        call: Callable[..., Any],
        args: tuple,
        kwargs: dict[str, Any],
        context: Context,
        site: SiteView,
    ) -> Any:
        return called(call, args, kwargs, context, site, self.tokens)


class CloudHead(Drawn):
    """The model's own call, which gives classes of clouds.

    Parameters: one (H, 2·C), two (H, H) and three (classes, H), with biases.
    """

    additive = False
    why_not_merge = "it gives classes where the backbone gives tokens"

    def __init__(self, adapter: Any2Point, site: SiteView, generator: torch.Generator) -> None:
        super().__init__()
        assert adapter.classes is not None  # else there is no such layer
        self.tokens, wide = adapter.tokens, adapter.head_width
        shapes = {
            "one": (wide, 2 * site.width),
            "two": (wide, wide),
            "three": (adapter.classes, wide),
        }
        for name, shape in shapes.items():
            self.draw(site, generator, name, shape)

    def around(
        self,
        call: Callable[..., Any],
        args: tuple,
        kwargs: dict[str, Any],
        context: Context,
        site: SiteView,
    ) -> Tensor:
        found = called(call, args, kwargs, context, site, self.tokens)
        # in a stack a head has made logits of them already
        x = context.get("last_tokens") if isinstance(found, Tensor) else found[0]
        context.tell(last_tokens=x)
        last = context.get("cloud", {}).get("last", False)
        own, tokens = (x[:, -1], x[:, :-1]) if last else (x[:, 0], x[:, 1:])
        z = torch.cat([tokens.amax(1), own], -1)
        for name in ("one", "two", "three"):
            z = self.project(z, name)
            z = z if name == "three" else F.relu(z)
        return z


#: what says of words which they are, or where
_OF_WORDS = ("attention_mask", "position_ids", "token_type_ids")


def called(
    call: Callable[..., Any],
    args: tuple,
    kwargs: dict[str, Any],
    context: Context,
    site: SiteView,
    tokens: int,
) -> Any:
    """The backbone's output for a cloud: ids it can read stand for it, where it looks at them."""
    for name in _OF_WORDS:
        if kwargs.get(name) is not None:
            raise DataError(f"{name} is given beside a cloud of points", "leave it out")
    points = first_given(args, kwargs)
    if site.span.parts is None or points is context.get("ids"):  # in a stack they stand already
        return call(*args, **kwargs)
    words: Words = site.span.parts(site.module)
    check_cloud(points, 4 * tokens)
    ids = words.ids(len(points), 1 + tokens).to(points.device)
    others = {name: value for name, value in kwargs.items() if value is not points}
    context.tell(points=points, ids=ids)
    found = call(**{**others, words.keyword: ids})
    context.tell(points=None, ids=None)  # compiled code keeps a context from call to call
    return found


def first_given(args: tuple, kwargs: dict[str, Any]) -> Any:
    """The first argument that is not None."""
    return next((value for value in (*args, *kwargs.values()) if value is not None), None)


def _joined(first: Tensor, tokens: Tensor, last: bool) -> Tensor:
    return torch.cat([tokens, first] if last else [first, tokens], 1)


def check_cloud(points: Any, least: int) -> None:
    """Refuse what is no batch of clouds, or too small ones."""
    if not isinstance(points, Tensor) or points.ndim != 3 or points.shape[-1] != 3:
        seen = tuple(points.shape) if isinstance(points, Tensor) else type(points).__name__
        raise DataError(
            f"the input is {seen}, expected clouds of points (B, N, 3)",
            "cloud[None] adds the batch axis; for what the backbone took before: "
            "with mmadapt.disabled(model): …",
        )
    if not points.is_floating_point() or points.shape[1] < least:
        raise DataError(
            f"clouds of {points.shape[1]} points of {points.dtype}, expected at least {least} of a "
            "floating-point type",
            "sample more points, or attach Any2Point with fewer tokens=",
        )
    if torch.compiler.is_compiling():  # values cannot be looked at
        return
    strange = ~points.detach().isfinite()
    if strange.any():
        first = tuple(strange.nonzero()[0].tolist())
        raise DataError(
            f"{int(strange.sum())} coordinates are NaN or infinite, the first at {first} of (B, N, 3)",
            "leave those points out, so that every cloud keeps as many",
        )
    farthest = float(points.detach().norm(dim=-1).max())
    if farthest > 1.5:
        raise DataError(
            f"a point lies {farthest:.3g} from the origin, expected clouds within the unit ball",
            "mmadapt.tasks.points.unit_clouds(points) centres and scales them",
        )
