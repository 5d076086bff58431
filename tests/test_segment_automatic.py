"""Prompts without a click: points from a coarse mask, and the network that guesses it."""

from __future__ import annotations

import math
from typing import Any

import numpy
import pytest
import torch
from backbones import BACKBONES

import mmadapt as mm
from mmadapt.tasks import segment

Refused = mm.errors.DataError

#: the smallest of timm's that has features at five scales
TINY = "test_efficientnet"


def coarse(**options: Any) -> segment.CoarseMask:
    torch.manual_seed(3)
    return segment.CoarseMask(TINY, width=8, **options)


# -- points -----------------------------------------------------------------------------------------


def test_the_most_probable_points_are_taken() -> None:
    mask = numpy.zeros((4, 6))
    mask[1, 5], mask[3, 0], mask[2, 2] = 0.95, 0.9, 0.5
    points, labels = segment.dense_points(mask, count=3)
    assert points.tolist() == [[5, 1], [0, 3], [2, 2]]  # (x, y)
    assert labels.tolist() == [1, 0, 0]  # above 0.9, not at it
    assert segment.dense_points(mask, count=2, threshold=0.4)[1].tolist() == [1, 1]
    assert len(segment.dense_points(mask, count=99)[0]) == 24


@pytest.mark.parametrize(
    ("shape", "grid"), [((8, 8), 4), ((7, 10), 3), ((5, 9), 5), ((40, 50), 16)]
)
def test_each_cell_gives_its_most_probable_point(shape: tuple[int, int], grid: int) -> None:
    mask = torch.rand(shape)
    points, labels = segment.dense_points(mask, grid=grid)
    assert len(points) == grid * grid
    found = set()
    for (x, y), label in zip(points.astype(int).tolist(), labels.tolist(), strict=True):
        assert label == int(mask[y, x] > 0.9)
        cell = (y * grid // shape[0], x * grid // shape[1])
        own = [
            mask[row, column]
            for row in range(shape[0])
            for column in range(shape[1])
            if (row * grid // shape[0], column * grid // shape[1]) == cell
        ]
        assert mask[y, x] == max(own)
        found.add(cell)
    assert len(found) == grid * grid


def test_a_grid_finer_than_the_mask_takes_every_pixel() -> None:
    points, _ = segment.dense_points(numpy.full((3, 5), 0.5))
    assert sorted(map(tuple, points.tolist())) == [(x, y) for x in range(5) for y in range(3)]


@pytest.mark.parametrize(
    ("mask", "options", "said"),
    [
        (torch.randn(4, 4) * 9, {}, r"from -\d.* expected probabilities \(H, W\)"),
        (torch.full((4, 4), math.nan), {}, "expected probabilities"),
        (torch.zeros(1, 4, 4), {}, r"shape \(1, 4, 4\)"),
        (torch.zeros(0, 4), {}, r"shape \(0, 4\)"),
        (torch.zeros(4, 4), {"count": 3, "grid": 2}, "count is 3 and grid is 2"),
        (torch.zeros(4, 4), {"count": 0}, "count is 0"),
        (torch.zeros(4, 4), {"grid": 2.0}, "grid is 2.0"),
    ],
)
def test_what_is_no_coarse_mask_is_refused(mask: Any, options: Any, said: str) -> None:
    with pytest.raises(Refused, match=said):
        segment.dense_points(mask, **options)


# -- the network --------------------------------------------------------------------------------------


def scenes(count: int, side: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """Bright boxes on noise, and where they are."""
    draw = torch.Generator().manual_seed(2)
    pixels = 0.3 * torch.randn(count, 3, side, side, generator=draw)
    masks = torch.zeros(count, side, side)
    for place in range(count):
        masks[place, 6 : 18 + place, 8:24] = 1
    return pixels + 2 * masks[:, None], masks


@pytest.mark.parametrize("size", [(32, 32), (40, 56)])
def test_a_coarse_mask_is_as_large_as_its_image(size: tuple[int, int]) -> None:
    assert coarse()(torch.randn(2, 3, *size)).shape == (2, *size)


def test_a_coarse_mask_is_learned() -> None:
    model = coarse()
    pixels, masks = scenes(4)
    history = mm.fit(
        model,
        (pixels, masks),
        loss=segment.coarse_loss,
        steps=40,
        batch_size=4,
        lr=0.01,
        progress=False,
    )
    assert history.losses[-1] < 0.4 * history.losses[0]
    assert {name.partition(".")[0] for name, _ in model.named_parameters()} == {
        "features",
        "narrow",
        "mix",
    }
    with pytest.raises(Refused, match=r"masks \(4, 31, 32\)"):
        segment.coarse_loss(model, (pixels, masks[:, 1:]))


def test_the_usual_features_are_efficientnets() -> None:
    with torch.device("meta"):
        model = segment.CoarseMask()
    assert model.features.feature_info.channels() == [16, 24, 40, 112, 320]
    assert model.narrow[0].weight.shape == (64, 16, 1, 1)


# -- together -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["hf_sam", "segment_anything", "hf_sam2"])
def test_an_image_is_segmented_without_a_click(name: str) -> None:
    sam = segment.Segmenter(BACKBONES[name].fresh())
    network = coarse().train()
    statistics = {key: value.clone() for key, value in network.state_dict().items()}
    image = (numpy.random.RandomState(0).rand(24, 40, 3) * 255).astype(numpy.uint8)
    auto = segment.AutoPrompted(sam, network, grid=3, threshold=0.5)
    found = auto.predict(image)
    guess = auto.guess(image)
    assert guess.shape == (24, 40)
    assert 0 <= float(guess.min()) < float(guess.max()) <= 1
    points, labels = segment.dense_points(guess, grid=3, threshold=0.5)
    expected = sam.predict(sam.encode(image), points=points, labels=labels)
    assert torch.equal(found.logits, expected.logits)
    assert auto.predict(image, several=True).logits.shape == (3, 24, 40)
    assert network.training
    assert all(torch.equal(network.state_dict()[key], v) for key, v in statistics.items())


def test_the_guess_leaves_the_padding_out() -> None:
    """A network that answers with the brightness of a pixel guesses where the image is bright."""
    sam = segment.Segmenter(BACKBONES["hf_sam"].fresh())

    class Brightness(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = torch.nn.Parameter(torch.ones(()))

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return self.factor * pixels.mean(1)

    image = numpy.zeros((16, 32, 3), numpy.uint8)
    image[2:6, 20:28] = 255
    network: Any = Brightness()
    guess = segment.AutoPrompted(sam, network).guess(image)
    assert guess[3:5, 22:26].min() > 0.8
    assert guess[10:, :16].max() < 0.3
    points, _ = segment.dense_points(guess, count=1)
    assert 19 <= points[0, 0] <= 28
    assert 1 <= points[0, 1] <= 6
