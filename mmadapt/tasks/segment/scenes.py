"""Generated scenes with a mask for every object: what `tiny/sam` is trained on.

Coloured, patterned things lie over each other on a patterned ground. Half of them are shapes of
`mmadapt.tasks.scene_masks`, half are smooth blobs. Some shapes are never shown in training.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch.nn import functional as F

from mmadapt.errors import DataError
from mmadapt.tasks.scene_masks import OBJECTS, SHAPES, object_masks
from mmadapt.tasks.scenes import LEAST_CONTRAST, PATTERNS, exposed, patterned, to_bytes

SIDE = 64
THINGS = 2  # in a scene
SCALE, LEAST_AREA = (0.6, 1.0), 250  # of the image's side; visible pixels, of less no mask is given
HELD_OUT_SHAPES = ("heart", "arrow")  # never shown in training
KINDS = ("seen", "held_out_shapes")


def scenes(n: int, *, seed: int, kind: str = "seen") -> tuple[np.ndarray, np.ndarray]:
    """Draw scenes of two things each, the same ones for the same arguments.

    Returns images, uint8 (n, 64, 64, 3), and the visible part of each thing, bool (n, 2, 64, 64),
    false throughout where fewer than 250 pixels are seen. `kind` is "seen" for what training may
    show, or "held_out_shapes" for scenes of hearts and arrows, which it does not.
    """
    generator = torch.Generator().manual_seed(seed)
    images, masks = [], []
    for start in range(0, n, 128):  # bounds the memory, and is part of what the seed means
        drawn, visible = draw_scenes(min(128, n - start), generator, kind=kind)
        images.append(to_bytes(drawn))
        masks.append(visible.numpy())
    return np.concatenate(images), np.concatenate(masks)


def draw_scenes(
    count: int,
    generator: torch.Generator,
    *,
    kind: str = "seen",
    scale: tuple[float, float] = SCALE,
    least: int = LEAST_AREA,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Images in [0, 1], (count, 3, 64, 64), and visible masks, bool (count, 2, 64, 64).

    `scale` is the range of sizes, 1 for a thing about as large as the image; a mask of fewer than
    `least` pixels is left empty.
    """
    things = THINGS * count
    placed = _place(_outlines(things, generator, kind), generator, scale)
    coverage = placed.view(count, THINGS, SIDE, SIDE)
    colours = _colours(count, generator)
    pattern = torch.randint(len(PATTERNS), (count * (THINGS + 1),), generator=generator)
    fills = patterned(pattern, colours.flatten(0, 1), generator, size=SIDE)
    fills = fills.view(count, THINGS + 1, 3, SIDE, SIDE)
    images, visible = fills[:, 0], torch.zeros(count, THINGS, SIDE, SIDE, dtype=torch.bool)
    for place in range(THINGS):
        own = coverage[:, place, None]
        images = images * (1 - own) + fills[:, place + 1] * own
        visible[:, :place] &= ~(own > 0.5)
        visible[:, place] = own[:, 0] > 0.5
    visible &= visible.sum((2, 3), keepdim=True) >= least
    return exposed(images, generator), visible


def _outlines(count: int, generator: torch.Generator, kind: str) -> torch.Tensor:
    """Coverage in [0, 1] of one thing that fills the image, (count, 1, 64, 64)."""
    if kind not in KINDS:
        raise DataError(f"kind is {kind!r}, expected one of {', '.join(KINDS)}")
    unseen = kind == "held_out_shapes"
    names = [name for name in SHAPES if (name in HELD_OUT_SHAPES) == unseen]
    choice = torch.randint(len(names), (count,), generator=generator)
    objects = torch.tensor([OBJECTS.index(name) for name in names])[choice]
    shapes = object_masks(objects, generator, size=SIDE, smallest=0.9)
    if unseen:
        return shapes
    blob = torch.rand(count, 1, 1, 1, generator=generator) < 0.5
    return torch.where(blob, _blobs(count, generator), shapes)


def _blobs(count: int, generator: torch.Generator) -> torch.Tensor:
    """Discs whose radius swings with the angle, (count, 1, 64, 64)."""
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, SIDE)] * 2, indexing="ij")
    radius, angle = (x * x + y * y).sqrt(), torch.atan2(y, x)
    edge = torch.full((count, SIDE, SIDE), 0.7)
    for waves in (2, 3, 5):
        swing = torch.rand(count, 1, 1, generator=generator) * 0.18 / waves
        phase = torch.rand(count, 1, 1, generator=generator) * 2 * math.pi
        edge = edge + swing * torch.cos(waves * angle + phase)
    return torch.sigmoid((edge - radius) * 30)[:, None]


def _place(
    outlines: torch.Tensor, generator: torch.Generator, sizes: tuple[float, float]
) -> torch.Tensor:
    """Turn, shrink and move each thing; it may reach over the border."""
    count = len(outlines)

    def uniform(low: float, high: float) -> torch.Tensor:
        return torch.rand(count, generator=generator) * (high - low) + low

    angle, scale, aspect = uniform(0, 2 * math.pi), uniform(*sizes), uniform(0.7, 1.0)
    cosine, sine = torch.cos(angle), torch.sin(angle)
    matrix = torch.zeros(count, 2, 3)
    matrix[:, 0, 0], matrix[:, 0, 1] = cosine / scale, sine / scale
    matrix[:, 1, 0], matrix[:, 1, 1] = -sine / (scale * aspect), cosine / (scale * aspect)
    shift = torch.stack([uniform(-0.55, 0.55), uniform(-0.55, 0.55)], 1)
    matrix[:, :, 2] = -(matrix[:, :, :2] @ shift[:, :, None])[:, :, 0]
    grid = F.affine_grid(matrix, list(outlines.shape), align_corners=False)
    return F.grid_sample(outlines, grid, align_corners=False)


def _colours(count: int, generator: torch.Generator) -> torch.Tensor:
    """Colours of ground and things, (count, 3, 3), none close to another of its scene.

    A fifth of the scenes are grey.
    """
    number = THINGS + 1
    found = torch.rand(count, number, 3, generator=generator)
    grey = torch.rand(count, 1, generator=generator) < 0.2
    apart = torch.where(grey, 0.2 * 3**0.5, LEAST_CONTRAST)
    for place in range(number):
        for _ in range(30):
            new = torch.rand(count, 3, generator=generator)
            new = torch.where(grey, new[:, :1], new)
            if place:
                distance = (found[:, :place] - new[:, None]).norm(dim=2).amin(1)
                near = (found[:, :place] - found[:, place, None]).norm(dim=2).amin(1)
                better = (near < apart[:, 0]) & (distance > near)
            else:
                better = torch.ones(count, dtype=torch.bool)
            found[:, place] = torch.where(better[:, None], new, found[:, place])
            if not place:
                break
    return found
