"""What stands in the generated scenes: coverage masks of shapes, printed digits and handwriting."""

from __future__ import annotations

import functools
import math
import os
from functools import partial

import numpy as np
import torch
from torch.nn import functional as F

SHAPES = (
    "circle", "square", "triangle", "star", "cross", "ring",
    "heart", "diamond", "arrow", "moon", "flower", "bar",
)  # fmt: skip
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
OBJECTS = SHAPES + DIGITS

# Several typefaces per digit, so that a digit is learned rather than a font.
FONTS = (
    "DejaVuSans", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSerif", "DejaVuSerif-Italic",
    "STIXGeneral", "STIXGeneralItalic", "STIXGeneralBol", "cmr10", "cmss10", "cmtt10", "cmti10",
    "cmb10",
)  # fmt: skip
MASK_SIZE = 64
_SUPERSAMPLED = 4 * MASK_SIZE


def object_masks(
    objects: torch.Tensor,
    generator: torch.Generator,
    *,
    size: int = 32,
    warp: float = 0.1,
    smallest: float = 0.6,
) -> torch.Tensor:
    """Draw objects, each with its own thickness, tilt, size, place and elastic warp.

    `warp` is the largest displacement as a fraction of half the image, `smallest` the smallest
    scale. Returns coverage in [0, 1], shape (len(objects), 1, size, size).
    """
    bank, first, variants = _mask_bank()
    count = len(objects)

    def uniform(low: float, high: float) -> torch.Tensor:
        return torch.rand(count, generator=generator) * (high - low) + low

    choice = first[objects] + (uniform(0, 1) * variants[objects]).long()
    angle, scale = uniform(-15, 15) * math.pi / 180, uniform(smallest, 1.0)
    aspect, shear = uniform(0.82, 1.22), uniform(-0.25, 0.25)
    cosine, sine = torch.cos(angle), torch.sin(angle)
    matrix = torch.zeros(count, 2, 3)
    matrix[:, 0, 0], matrix[:, 0, 1] = cosine * aspect / scale, (sine + shear) / scale
    matrix[:, 1, 0], matrix[:, 1, 1] = -sine / scale, cosine / (aspect * scale)
    shift = torch.stack([uniform(-1, 1), uniform(-1, 1)], 1) * (1.05 - scale)[:, None] * 0.7
    matrix[:, :, 2] = -(matrix[:, :, :2] @ shift[:, :, None])[:, :, 0]
    grid = F.affine_grid(matrix, [count, 1, size, size], align_corners=False)
    field = (torch.rand(count, 2, 4, 4, generator=generator) * 2 - 1) * warp
    field = field * uniform(0, 1)[:, None, None, None]
    field = F.interpolate(field, size=(size, size), mode="bicubic", align_corners=True)
    sampled = F.grid_sample(bank[choice], grid + field.permute(0, 2, 3, 1), align_corners=False)
    threshold = uniform(0.3, 0.62)[:, None, None, None]  # of a blurred mask: thick to thin
    return torch.sigmoid((sampled - threshold) * 12)


def handwritten_masks(
    split: str, labels: torch.Tensor, generator: torch.Generator, *, size: int = 32
) -> torch.Tensor:
    """Draw a handwritten digit for each label, with its own size and place.

    "train" draws from the first half of scikit-learn's `load_digits`, "test" from the second.
    Returns coverage in [0, 1], shape (len(labels), 1, size, size).
    """
    if split not in ("train", "test"):
        raise ValueError(f"split is {split!r}; expected 'train' or 'test'")
    scans, digits = _scans()
    first_half = torch.arange(len(digits)) < 897
    half = first_half if split == "train" else ~first_half
    count = len(labels)
    weights = (digits[None] == labels[:, None]) & half[None]
    chosen = torch.multinomial(weights.float(), 1, generator=generator)[:, 0]
    scale = torch.rand(count, generator=generator) * 0.35 + 0.7
    shift = (torch.rand(count, 2, generator=generator) * 2 - 1) * torch.tensor([0.25, 0.15])
    matrix = torch.zeros(count, 2, 3)
    matrix[:, 0, 0] = matrix[:, 1, 1] = 1 / scale
    matrix[:, :, 2] = -shift / scale[:, None]
    grid = F.affine_grid(matrix, [count, 1, size, size], align_corners=False)
    return F.grid_sample(scans[chosen], grid, align_corners=False)


@functools.cache
def _scans() -> tuple[torch.Tensor, torch.Tensor]:
    from sklearn.datasets import load_digits

    scans, digits = load_digits(return_X_y=True)
    ink = torch.tensor(scans, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    ink = F.interpolate(ink, size=(32, 32), mode="bicubic", align_corners=False)
    return torch.sigmoid((ink - 0.45) * 9), torch.tensor(digits, dtype=torch.int64)


@functools.cache
def _mask_bank() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Blurred masks (masks, 1, 64, 64), and each object's first mask and number of masks."""
    groups = [[_shape_mask(name)] for name in SHAPES]
    groups += [_digit_masks(str(digit)) for digit in range(10)]
    bank = torch.tensor(np.stack([mask for group in groups for mask in group]))[:, None]
    variants = torch.tensor([len(group) for group in groups])
    kernel = torch.exp(-(torch.arange(-4.0, 5.0) ** 2) / (2 * 1.5**2))
    kernel = kernel / kernel.sum()
    bank = F.conv2d(bank, kernel.view(1, 1, 1, -1), padding=(0, 4))
    bank = F.conv2d(bank, kernel.view(1, 1, -1, 1), padding=(4, 0))
    return bank, variants.cumsum(0) - variants, variants


def _reduced(image) -> np.ndarray:
    from PIL import Image

    small = image.resize((MASK_SIZE, MASK_SIZE), Image.Resampling.LANCZOS)
    return np.asarray(small, dtype=np.float32) / 255


def _digit_masks(text: str) -> list[np.ndarray]:
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    folder = os.path.join(matplotlib.get_data_path(), "fonts", "ttf")
    open_font = [ImageFont.load_default]
    open_font += [partial(ImageFont.truetype, os.path.join(folder, f"{f}.ttf")) for f in FONTS]
    masks = []
    for font_of_size in open_font:
        image = Image.new("L", (_SUPERSAMPLED, _SUPERSAMPLED), 0)
        draw = ImageDraw.Draw(image)
        _, top, _, bottom = draw.textbbox((0, 0), text, font=font_of_size(size=240))
        # every digit as tall as the shapes, whatever the typeface
        font = font_of_size(size=240 * 0.78 * _SUPERSAMPLED / (bottom - top))
        left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
        corner = ((_SUPERSAMPLED - left - right) / 2, (_SUPERSAMPLED - top - bottom) / 2)
        draw.text(corner, text, font=font, fill=255)
        masks.append(_reduced(image))
    return masks


def _shape_mask(name: str) -> np.ndarray:
    from PIL import Image, ImageDraw

    image = Image.new("L", (_SUPERSAMPLED, _SUPERSAMPLED), 0)
    draw = ImageDraw.Draw(image)
    centre, radius = _SUPERSAMPLED / 2, 0.4 * _SUPERSAMPLED

    def box(left, top, right, bottom):  # in radii around the centre
        return [centre + radius * side for side in (left, top, right, bottom)]

    if name in ("circle", "ring", "moon"):
        draw.ellipse(box(-1, -1, 1, 1), fill=255)
        if name == "ring":
            draw.ellipse(box(-0.58, -0.58, 0.58, 0.58), fill=0)
        if name == "moon":
            draw.ellipse(box(-0.35, -0.95, 1.45, 0.95), fill=0)
    elif name == "cross":
        draw.rectangle(box(-0.32, -1, 0.32, 1), fill=255)
        draw.rectangle(box(-1, -0.32, 1, 0.32), fill=255)
    else:
        corners = np.asarray(_corners(name)) * radius + centre
        draw.polygon([tuple(corner) for corner in corners], fill=255)
    return _reduced(image)


def _corners(name: str):
    """The corners (x, y) of a polygon in radii around the centre, y downwards."""

    def polar(count: int, radius):
        turns = np.arange(count) / count * 2 * np.pi
        return [(radius(t) * np.sin(t), -radius(t) * np.cos(t)) for t in turns]

    if name == "heart":
        t = np.linspace(0, 2 * np.pi, 120)
        y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
        return np.stack([np.sin(t) ** 3, -y / 16], 1)
    return {
        "square": lambda: [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
        "bar": lambda: [(-1.05, -0.33), (1.05, -0.33), (1.05, 0.33), (-1.05, 0.33)],
        "diamond": lambda: [(0, -1.1), (0.8, 0), (0, 1.1), (-0.8, 0)],
        "triangle": lambda: polar(3, lambda t: 1.15),
        "star": lambda: polar(10, lambda t: 1.15 if round(t / (np.pi / 5)) % 2 == 0 else 0.48),
        "flower": lambda: polar(160, lambda t: 0.72 + 0.38 * np.cos(5 * t)),
        "arrow": lambda: [
            (-1, -0.28), (0.1, -0.28), (0.1, -0.75), (1.1, 0),
            (0.1, 0.75), (0.1, 0.28), (-1, 0.28),
        ],
    }[name]()  # fmt: skip
