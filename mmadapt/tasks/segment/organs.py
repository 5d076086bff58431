"""Generated stacks of slices that look like medical images, and nothing like `scenes`.

In each volume one tilted, lobed body, brighter or darker than what is around it, lies among fainter
ones. A slow bias field and speckle, drawn anew for each slice, lie over it all: what one slice hides
its neighbours show. No patient was involved.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional as F

DEPTH, SIDE = 12, 64
SPACING = (2.5, 1.0, 1.0)  # mm between slices, rows and columns
DISTRACTORS = 6
SPECKLE = 0.2


def volumes(n: int, *, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw volumes, the same ones for the same arguments.

    Returns slices, uint8 (n, 12, 64, 64); the body, bool of that shape; and one click each, (n, 2)
    as (x, y): a random pixel of the body where its slice is largest.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = [_volume(generator) for _ in range(n)]
    slices, masks, clicks = (np.stack(part) for part in zip(*drawn, strict=True))
    return slices, masks, clicks


def images(n: int, *, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The slices in which the bodies of `n` volumes are largest.

    Returns images, uint8 (n, 64, 64); masks, bool of that shape; clicks (n, 2) as (x, y).
    """
    slices, masks, clicks = volumes(n, seed=seed)
    largest = masks.sum((2, 3)).argmax(1)
    every = np.arange(n)
    return slices[every, largest], masks[every, largest], clicks


def fixed_ellipsoid(
    click: Sequence[float], shape: Sequence[int], across: float, along: float = 1.0
) -> np.ndarray:
    """The same ellipsoid for everybody, centred at the click: what any method has to beat.

    `shape` is (D, H, W) or (H, W), of which it is a disc; `across` is the radius in the plane in
    pixels, `along` the one through the slices, whose middle is that of the stack.
    """
    depth, (height, width) = shape[0] if len(shape) == 3 else 1, shape[-2:]
    z, y, x = np.meshgrid(np.arange(depth), np.arange(height), np.arange(width), indexing="ij")
    away = ((x - click[0]) ** 2 + (y - click[1]) ** 2) / across**2
    away = away + ((z - (depth - 1) / 2) / along) ** 2
    return (away < 1).reshape(tuple(shape))


def _volume(generator: torch.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    def noise(*sigmas: float) -> torch.Tensor:
        return _smooth(torch.randn(DEPTH, SIDE, SIDE, generator=generator), sigmas)

    tissue = 0.5 + noise(1.0, 4.0, 4.0)
    for _ in range(DISTRACTORS):
        centre = (uniform(0, DEPTH), uniform(0, SIDE), uniform(0, SIDE))
        radii = (uniform(1.5, 4), uniform(4, 10), uniform(4, 10))
        other = _body(centre, radii, generator)
        tissue = torch.where(other, tissue + uniform(-0.12, 0.12), tissue)
    middle, half = DEPTH / 2, SIDE / 2
    body = torch.zeros(0, dtype=torch.bool)
    while not body.any():
        body = _body(
            (middle + uniform(-1.5, 1.5), half + uniform(-14, 14), half + uniform(-14, 14)),
            (uniform(2.5, 5), uniform(7, 18), uniform(7, 18)),
            generator,
        )
    level = uniform(0.2, 0.3) * (1 if uniform(0, 1) < 0.5 else -1)
    tissue = torch.where(body, 0.5 + level + 0.5 * (tissue - 0.5), tissue)
    tissue = _smooth(tissue, (0.3, 0.8, 0.8))
    bias, speckle = noise(2.0, 14.0, 14.0), noise(0.0, 0.8, 0.8)
    seen = tissue * (1 + 0.15 * bias / bias.std()) * (1 + SPECKLE * speckle / speckle.std())
    slices = (seen.clamp(0, 1) * 255).round().to(torch.uint8)
    pixels = body[int(body.sum((1, 2)).argmax())].nonzero()
    row, column = pixels[int(torch.randint(len(pixels), (), generator=generator))].tolist()
    return slices.numpy(), body.numpy(), np.array([column, row], dtype=np.float64)


def _body(
    centre: tuple[float, float, float],
    radii: tuple[float, float, float],
    generator: torch.Generator,
) -> torch.Tensor:
    """Where an ellipsoid is, bool (D, H, W): its axis leans, its sections are turned and lobed."""

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    z, y, x = torch.meshgrid(*[torch.arange(n) for n in (DEPTH, SIDE, SIDE)], indexing="ij")
    dz = z - centre[0]
    dy, dx = y - centre[1] - uniform(-1.2, 1.2) * dz, x - centre[2] - uniform(-1.2, 1.2) * dz
    turn = uniform(0, math.pi)
    u = math.cos(turn) * dx + math.sin(turn) * dy
    v = math.cos(turn) * dy - math.sin(turn) * dx
    angle, swing = torch.atan2(v, u), torch.ones(())
    for waves, most in ((2, 0.2), (3, 0.12)):
        swing = swing + uniform(0, most) * torch.cos(waves * angle + uniform(0, 2 * math.pi))
    across = ((u / radii[1]) ** 2 + (v / radii[2]) ** 2) / swing**2
    return (dz / radii[0]) ** 2 + across < 1


def _smooth(values: torch.Tensor, sigmas: Sequence[float]) -> torch.Tensor:
    """Gaussians of these widths along the axes of (D, H, W), 0 for none; edges are repeated."""
    for axis, sigma in enumerate(sigmas):
        if not sigma:
            continue
        reach = math.ceil(2 * sigma)
        kernel = torch.exp(-(torch.arange(-reach, reach + 1) ** 2) / (2 * sigma**2))
        lines = values.movedim(axis, -1)
        flat = F.pad(lines.reshape(-1, 1, lines.shape[-1]), (reach, reach), mode="replicate")
        smoothed = F.conv1d(flat, (kernel / kernel.sum())[None, None])
        values = smoothed.view(lines.shape).movedim(-1, axis)
    return values
