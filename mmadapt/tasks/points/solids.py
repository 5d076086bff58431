"""Solids by formula: clouds on their surfaces, turned, cut and noisy, with proportions held out."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mmadapt.errors import DataError, did_you_mean
from mmadapt.tasks.points.cloud import unit_clouds

_Draw = Callable[..., Tensor]  # sizes -> uniform numbers from 0 to 1


@dataclass(frozen=True)
class Solids:
    """Clouds of solids and their kinds."""

    #: (B, N, 3), each centred and within the unit ball
    clouds: Tensor
    #: (B,), places in `names`
    labels: Tensor
    names: tuple[str, ...]

    def __repr__(self) -> str:
        count, points, _ = self.clouds.shape
        return f"Solids({count} clouds of {points} points, {len(self.names)} kinds)"


#: what a solid's height is times its width: proportions of one split are none of another's
SPLITS: dict[str, tuple[tuple[float, float], ...]] = {
    "train": ((0.8, 1.25),),
    "validation": ((0.7, 0.8), (1.25, 1.4)),
    "test": ((0.55, 0.7), (1.4, 1.65)),
}


def _ball(n: int, u: _Draw, f: float) -> Tensor:
    z, angle = 2 * u(n) - 1, 2 * math.pi * u(n)
    r = (1 - z * z).sqrt()
    return torch.stack([r * angle.cos(), r * angle.sin(), f * z], 1)


def _box(n: int, u: _Draw, f: float) -> Tensor:
    points = 2 * u(n, 3) - 1
    rows, face = torch.arange(n), (3 * u(n)).long().clamp(max=2)
    points[rows, face] = points[rows, face].sign()
    return points * torch.tensor([1.0, 1.0, f])


def _tube(n: int, u: _Draw, f: float) -> Tensor:
    angle = 2 * math.pi * u(n)
    return torch.stack([angle.cos(), angle.sin(), f * (2 * u(n) - 1)], 1)


def _cylinder(n: int, u: _Draw, f: float) -> Tensor:
    points = _tube(n, u, f)
    cap = u(n) < 0.35
    points[cap, :2] *= u(n).sqrt()[cap, None]
    points[cap, 2] = f * (2 * (u(n) < 0.5).float() - 1)[cap]
    return points


def _cone(n: int, u: _Draw, f: float) -> Tensor:
    width, angle = u(n).sqrt(), 2 * math.pi * u(n)
    return torch.stack([width * angle.cos(), width * angle.sin(), f * (1 - 2 * width)], 1)


def _pyramid(n: int, u: _Draw, f: float) -> Tensor:
    width, side = u(n).sqrt(), _box(n, u, 1.0)[:, :2]
    side = side / side.abs().amax(1, keepdim=True)
    return torch.cat([width[:, None] * side, f * (1 - 2 * width)[:, None]], 1)


def _torus(n: int, u: _Draw, f: float) -> Tensor:
    around, across = 2 * math.pi * u(n), 2 * math.pi * u(n)
    r = 1 + 0.35 * f * across.cos()
    return torch.stack([r * around.cos(), r * around.sin(), 0.35 * f * across.sin()], 1)


def _helix(n: int, u: _Draw, f: float) -> Tensor:
    t = 2 * u(n) - 1
    points = torch.stack([(4 * math.pi * t).cos(), (4 * math.pi * t).sin(), f * t], 1)
    return points + 0.06 * (u(n, 3) - 0.5)


def _saddle(n: int, u: _Draw, f: float) -> Tensor:
    x, y = (2 * u(n, 2) - 1).T
    return torch.stack([x, y, 0.7 * f * (x * x - y * y)], 1)


def _crossed(n: int, u: _Draw, f: float) -> Tensor:
    x, z = (2 * u(n, 2) - 1).T
    one, other = (torch.stack(v, 1) for v in ((x, 0 * x, f * z), (0 * x, x, f * z)))
    return torch.where(u(n, 1) < 0.5, one, other)


#: kind -> function (points, uniform numbers, height times width) -> (N, 3) on its surface
SOLIDS: dict[str, Callable[[int, _Draw, float], Tensor]] = {
    "ball": _ball,
    "box": _box,
    "tube": _tube,
    "cylinder": _cylinder,
    "cone": _cone,
    "pyramid": _pyramid,
    "torus": _torus,
    "helix": _helix,
    "saddle": _saddle,
    "crossed plates": _crossed,
}


def solids(
    each: int,
    split: str = "train",
    points: int = 256,
    noise: float = 0.03,
    cut: float = 0.1,
    turned: str = "upright",
    seed: int = 0,
) -> Solids:
    """`each` clouds of every kind in `SOLIDS`, with the proportions of one of `SPLITS`.

    A cloud is `points` of its surface, moved by normal `noise` (of half its width), without the share
    `cut` on one side of it, turned about the vertical z axis ("upright"), in any direction ("any")
    or not ("no"). The seed decides everything; torch's global generator is left alone.
    """
    _check(each, split, points, noise, cut, turned)
    draw = torch.Generator().manual_seed(seed)

    def u(*shape: int) -> Tensor:
        return torch.rand(shape, generator=draw)

    ranges, clouds = SPLITS[split], []
    for make in SOLIDS.values():
        for _ in range(each):
            low, high = ranges[int(len(ranges) * u(1))]
            factor = low + (high - low) * u(1).item()
            cloud = make(math.ceil(points / (1 - cut)), u, factor)
            cloud = cloud + noise * torch.randn(cloud.shape, generator=draw)
            cloud = cloud @ _rotation(turned, draw).T
            towards = F.normalize(torch.randn(3, generator=draw), dim=0)
            kept = (cloud @ towards).argsort()[:points]
            clouds.append(cloud[kept[torch.randperm(points, generator=draw)]])
    labels = torch.arange(len(SOLIDS)).repeat_interleave(each)
    return Solids(unit_clouds(torch.stack(clouds)), labels, tuple(SOLIDS))


def _rotation(turned: str, draw: torch.Generator) -> Tensor:
    if turned == "any":  # the orthogonal part of normal numbers favours no direction
        q, r = torch.linalg.qr(torch.randn(3, 3, generator=draw))
        q = q * r.diagonal().sign()
        return q * torch.linalg.det(q)
    angle = 2 * math.pi * torch.rand((), generator=draw) if turned == "upright" else torch.zeros(())
    cosine, sine = angle.cos().item(), angle.sin().item()
    return torch.tensor([[cosine, -sine, 0.0], [sine, cosine, 0.0], [0.0, 0.0, 1.0]])


def _check(each: Any, split: Any, points: Any, noise: Any, cut: Any, turned: Any) -> None:
    for name, value, low in (("each", each, 1), ("points", points, 2)):
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise DataError(f"{name} is {value!r}, expected a whole number from {low} on")
    for name, value, known in (
        ("split", split, list(SPLITS)),
        ("turned", turned, ["upright", "any", "no"]),
    ):
        if value not in known:
            raise DataError(f"{name} is {value!r}", did_you_mean(str(value), known))
    if not (0 <= noise < math.inf and 0 <= cut < 1):
        raise DataError(
            f"noise is {noise!r} and cut {cut!r}, expected noise from 0 on and cut from 0 to below 1"
        )
