"""A small generated world of coloured objects on patterned backgrounds, and a task outside it.

`tiny/clip` is trained on `scenes` only. Some combinations of its attributes are never shown in
training, so that what a backbone does with them says whether it has learned the attributes or
their combinations. `handwriting` holds real images: handwritten digits on photographs.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from torch.nn import functional as F

from mmadapt.tasks.scene_masks import DIGITS, OBJECTS, SHAPES, handwritten_masks, object_masks

COLOURS = (
    "red", "green", "blue", "yellow", "purple", "orange", "cyan", "pink", "white", "black",
)  # fmt: skip
PATTERNS = ("plain", "striped", "checkered", "dotted", "grainy")
SPLITS = ("seen", "held_out_pairs", "held_out_triples", "any")

RGB = torch.tensor(
    [
        (220, 40, 40), (50, 170, 60), (50, 80, 220), (235, 215, 50), (140, 60, 170),
        (240, 140, 30), (60, 200, 215), (245, 150, 190), (245, 245, 245), (20, 20, 20),
    ]
).div(255)  # (colours, 3)  # fmt: skip
# Photographs inside the scikit-image wheel: no copyright restrictions known, and no people.
PHOTOGRAPHS = (
    "coffee.png", "chelsea.png", "rocket.jpg", "brick.png", "grass.png", "gravel.png", "coins.png",
)  # fmt: skip
LEAST_CONTRAST = 0.38  # distance in RGB, each channel in [0, 1], under which nothing is drawn

# The two colours in which each object never appears in training, on any background.
HELD_OUT_COLOURS = {
    "circle": ("orange", "purple"),
    "square": ("black", "purple"),
    "triangle": ("blue", "purple"),
    "star": ("black", "pink"),
    "cross": ("white", "purple"),
    "ring": ("purple", "orange"),
    "heart": ("red", "cyan"),
    "diamond": ("white", "yellow"),
    "arrow": ("orange", "blue"),
    "moon": ("purple", "cyan"),
    "flower": ("blue", "purple"),
    "bar": ("pink", "red"),
    "zero": ("cyan", "purple"),
    "one": ("green", "purple"),
    "two": ("pink", "white"),
    "three": ("cyan", "green"),
    "four": ("red", "purple"),
    "five": ("blue", "black"),
    "six": ("purple", "red"),
    "seven": ("white", "purple"),
    "eight": ("yellow", "pink"),
    "nine": ("blue", "purple"),
}


def object_names() -> tuple[str, ...]:
    """The names of the objects as they stand in a caption, such as "circle" and "digit seven"."""
    return SHAPES + tuple(f"digit {name}" for name in DIGITS)


@functools.cache
def combinations(split: str) -> torch.Tensor:
    """The combinations of object, colour and background that a split may show.

    Returns a bool tensor of shape (objects, colours, backgrounds). "seen" is what training may
    show; "held_out_pairs" holds the (object, colour) pairs of `HELD_OUT_COLOURS`;
    "held_out_triples" a fifth of the remaining triples; "any" all three. A colour too close to
    its background is in none of them.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; expected one of {', '.join(SPLITS)}")
    visible = (torch.cdist(RGB, RGB) >= LEAST_CONTRAST).expand(len(OBJECTS), -1, -1)
    pair = torch.zeros(len(OBJECTS), len(COLOURS), 1, dtype=torch.bool)
    for name, colours in HELD_OUT_COLOURS.items():
        for colour in colours:
            pair[OBJECTS.index(name), COLOURS.index(colour)] = True
    object_, colour, background = torch.meshgrid(
        torch.arange(len(OBJECTS)), torch.arange(len(COLOURS)), torch.arange(len(COLOURS)),
        indexing="ij",
    )  # fmt: skip
    triple = (object_ + 2 * colour + background * (1 + object_ % 3)) % 5 == 0
    chosen = {
        "seen": ~pair & ~triple,
        "held_out_pairs": pair.expand(-1, -1, len(COLOURS)),
        "held_out_triples": ~pair & triple,
        "any": torch.ones_like(visible),
    }
    return visible & chosen[split]


def draw_attributes(
    count: int,
    generator: torch.Generator,
    *,
    split: str = "seen",
    same_colour: bool = False,
    same_background: bool = False,
    plain: float = 0.2,
) -> torch.Tensor:
    """Draw the attributes of scenes, every object equally often.

    `same_colour` gives all scenes one colour and `same_background` one background and pattern,
    which leaves only the object to tell them apart. `plain` is the fraction of plain backgrounds.
    Returns an int64 tensor of shape (count, 4): object, colour, pattern, background.
    """
    allowed = combinations(split).clone()
    keep = torch.ones(len(COLOURS), len(COLOURS), dtype=torch.bool)
    while same_colour or same_background:
        one = torch.randint(len(COLOURS), (2,), generator=generator)
        keep = torch.ones(len(COLOURS), len(COLOURS), dtype=torch.bool)
        if same_colour:
            keep &= (torch.arange(len(COLOURS)) == one[0])[:, None]
        if same_background:
            keep &= (torch.arange(len(COLOURS)) == one[1])[None]
        if (allowed & keep).flatten(1).any(1).sum() >= 2:  # at least two objects to tell apart
            break
    triples = (allowed & keep).nonzero()
    per_object = torch.bincount(triples[:, 0], minlength=len(OBJECTS))
    weights = 1.0 / per_object[triples[:, 0]]
    drawn = triples[torch.multinomial(weights, count, replacement=True, generator=generator)]
    pattern = torch.randint(1, len(PATTERNS), (count,), generator=generator)
    pattern[torch.rand(count, generator=generator) < plain] = 0
    if same_background:
        pattern[:] = pattern[0].clone()
    return torch.stack([drawn[:, 0], drawn[:, 1], pattern, drawn[:, 2]], 1)


def scenes(
    n: int, *, seed: int, split: str = "seen", size: int = 32
) -> tuple[np.ndarray, np.ndarray]:
    """Draw scenes of one object each, the same ones for the same arguments.

    Returns images, uint8 of shape (n, size, size, 3), and attributes, int64 of shape (n, 4):
    the indices of the object, its colour, the pattern and the background's colour in `OBJECTS`,
    `COLOURS`, `PATTERNS` and `COLOURS`. `split` says which combinations; see `combinations`.
    """
    generator = torch.Generator().manual_seed(seed)
    images, attributes = [], []
    for start in range(0, n, 256):  # bounds the memory, and is part of what the seed means
        drawn = draw_attributes(min(256, n - start), generator, split=split)
        masks = object_masks(drawn[:, 0], generator, size=size)
        images.append(to_bytes(compose(masks, drawn, generator)))
        attributes.append(drawn)
    return np.concatenate(images), torch.cat(attributes).numpy()


def to_bytes(images: torch.Tensor) -> np.ndarray:
    """Turn images in [0, 1], shape (n, 3, height, width), into uint8 (n, height, width, 3)."""
    return (images.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def compose(
    masks: torch.Tensor,
    attributes: torch.Tensor,
    generator: torch.Generator,
    foreground: torch.Tensor | None = None,
) -> torch.Tensor:
    """Paint masks of shape (n, 1, size, size) onto backgrounds.

    `attributes` has shape (n, 4) as `draw_attributes` returns it; `foreground`, of shape (n, 3)
    and in [0, 1], replaces the colours it names. Returns images in [0, 1], (n, 3, size, size).
    """
    count, size = len(masks), masks.shape[-1]
    colour = RGB[attributes[:, 1]] if foreground is None else foreground
    colour = colour + torch.randn(count, 3, generator=generator) * 0.03
    behind = backgrounds(attributes[:, 2], attributes[:, 3], generator, size=size)
    return exposed(behind * (1 - masks) + colour[:, :, None, None] * masks, generator)


def exposed(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Give images in [0, 1], shape (n, 3, size, size), a random exposure and sensor noise."""
    exposure = 1 + torch.randn(len(images), 1, 1, 1, generator=generator) * 0.08
    noise = torch.randn(images.shape, generator=generator) * 0.03
    return (images * exposure + noise).clamp(0, 1)


def backgrounds(
    patterns: torch.Tensor, colours: torch.Tensor, generator: torch.Generator, *, size: int = 32
) -> torch.Tensor:
    """Draw backgrounds, the pattern a slightly darker or lighter shade of the colour.

    Takes indices of shape (n,); returns images in about [0, 1], shape (n, 3, size, size).
    """
    return patterned(patterns, RGB[colours], generator, size=size)


def patterned(
    patterns: torch.Tensor, colours: torch.Tensor, generator: torch.Generator, *, size: int = 32
) -> torch.Tensor:
    """Fill images with patterns, indices (n,), in colours (n, 3) in [0, 1].

    Returns images in about [0, 1], shape (n, 3, size, size).
    """
    count = len(patterns)

    def uniform(low: float, high: float) -> torch.Tensor:
        return (torch.rand(count, generator=generator) * (high - low) + low)[:, None, None]

    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    period, phase, angle = uniform(4, 9), uniform(0, 9), uniform(0, math.pi)
    along = x * torch.cos(angle) + y * torch.sin(angle)
    cell = period * 0.7
    across, down = (x + phase) % period - period / 2, (y + phase) % period - period / 2
    strength = torch.stack(
        [
            torch.zeros(count, size, size),
            (torch.sin(2 * math.pi * along / period + phase) > 0).float(),
            ((x + phase) // cell + (y + phase) // cell) % 2,
            (across**2 + down**2 < (period * 0.3) ** 2).float(),
            torch.rand(count, size, size, generator=generator),
        ],
        1,
    )[torch.arange(count), patterns][:, None]
    base = colours[:, :, None, None]
    towards = torch.where(base.mean(1, keepdim=True) > 0.5, -1.0, 1.0)
    return base + strength * towards * uniform(0.06, 0.16)[:, None]


def handwriting(
    split: str, n: int, *, seed: int, background: str = "photographs"
) -> tuple[np.ndarray, np.ndarray]:
    """Set real handwritten digits on photographs or scenes, the same ones for the same arguments.

    The digits are scikit-learn's `load_digits` (8 x 8 scans), each in one random colour; the
    photographs come with scikit-image. "train" and "test" share no scan and no part of a
    photograph. `background` is "photographs" or "scenes". Returns images, uint8 of shape
    (n, 32, 32, 3), and labels 0 to 9, int64 of shape (n,).
    """
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (n,), generator=generator)
    masks = handwritten_masks(split, labels, generator)
    if background == "scenes":
        images = compose(masks, draw_attributes(n, generator, split="any"), generator)
    elif background == "photographs":
        behind = photograph_crops(split, n, generator)
        ink = _visible_ink(behind, generator)[:, :, None, None]
        images = exposed(behind * (1 - masks) + ink * masks, generator)
    else:
        raise ValueError(f"background is {background!r}; expected 'photographs' or 'scenes'")
    return to_bytes(images), labels.numpy()


def _visible_ink(behind: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Random colours (n, 3) far from the mean colour of what is behind them."""
    mean = behind.mean((2, 3))
    ink = torch.rand(len(behind), 3, generator=generator)
    for _ in range(20):
        faint = (ink - mean).norm(dim=1) < 0.6
        ink = torch.where(faint[:, None], torch.rand(len(ink), 3, generator=generator), ink)
    return ink


def photograph_crops(
    split: str,
    n: int,
    generator: torch.Generator,
    *,
    names: tuple[str, ...] = PHOTOGRAPHS,
    size: int = 32,
) -> torch.Tensor:
    """Cut squares of 48 to 112 pixels out of scikit-image's photographs and shrink them.

    "train" cuts from the left part of each photograph, "test" from the right. Returns images in
    [0, 1], shape (n, 3, size, size), number i from photograph `names[i % len(names)]`.
    """
    crops = []
    for i in range(n):
        half = _photograph_half(names[i % len(names)], split)
        height, width = half.shape[1:]
        side = int(torch.randint(48, min(112, height, width) + 1, (), generator=generator))
        top = int(torch.randint(height - side + 1, (), generator=generator))
        left = int(torch.randint(width - side + 1, (), generator=generator))
        crop = half[None, :, top : top + side, left : left + side]
        crops.append(F.interpolate(crop, size=(size, size), mode="bilinear", antialias=True))
    return torch.cat(crops).clamp(0, 1)


@functools.cache
def _photograph_half(name: str, split: str) -> torch.Tensor:
    """The left ("train") or right ("test") part of a photograph, (3, height, width) in [0, 1]."""
    from importlib.resources import files

    from PIL import Image

    with (files("skimage") / "data" / name).open("rb") as file:
        whole = np.array(Image.open(file).convert("RGB"), dtype=np.float32) / 255
    middle = whole.shape[1] // 2
    half = whole[:, : middle - 8] if split == "train" else whole[:, middle + 8 :]
    return torch.from_numpy(half).permute(2, 0, 1)


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Vary images in ways that leave what they show: tilt, size, place, and which colours.

    Takes and returns images in [0, 1], shape (n, 3, height, width). The colour channels of each
    image are shuffled, and half of the images are inverted.
    """
    count = len(images)

    def uniform(low: float, high: float) -> torch.Tensor:
        return torch.rand(count, generator=generator) * (high - low) + low

    angle, scale, shear = (
        uniform(-12, 12) * math.pi / 180,
        uniform(0.85, 1.15),
        uniform(-0.15, 0.15),
    )
    matrix = torch.zeros(count, 2, 3)
    matrix[:, 0, 0], matrix[:, 0, 1] = torch.cos(angle) / scale, torch.sin(angle) / scale + shear
    matrix[:, 1, 0], matrix[:, 1, 1] = -torch.sin(angle) / scale, torch.cos(angle) / scale
    matrix[:, :, 2] = torch.stack([uniform(-0.2, 0.2), uniform(-0.2, 0.2)], 1)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    images = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    channels = torch.rand(count, 3, generator=generator).argsort(1)
    images = images[torch.arange(count)[:, None], channels]
    inverted = torch.rand(count, 1, 1, 1, generator=generator) < 0.5
    return torch.where(inverted, 1 - images, images)
