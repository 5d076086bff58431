"""Pictures of masks: what is drawn where, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy
import pytest
import torch
from matplotlib.colors import to_hex, to_rgb

import mmadapt as mm
from mmadapt.core.figure import TINTS
from mmadapt.tasks import segment

Refused = mm.errors.DataError
H, W = 12, 20
GREY = numpy.random.RandomState(0).randint(0, 256, (H, W)).astype(numpy.uint8)
RGB = numpy.dstack([GREY, GREY // 2, GREY])


def disc(row: float, column: float, radius: float) -> numpy.ndarray:
    rows, columns = numpy.mgrid[:H, :W]
    return (rows - row) ** 2 + (columns - column) ** 2 <= radius**2


ONE, OTHER = disc(4, 5, 3), disc(8, 14, 2)
EMPTY = numpy.zeros((H, W), bool)


def outlines(axes: Any) -> list[tuple[str, str, numpy.ndarray]]:
    """Colour, style and vertices of every contour line."""
    from matplotlib.contour import ContourSet

    found = []
    for artist in axes.collections:
        if isinstance(artist, ContourSet):
            vertices = numpy.concatenate([path.vertices for path in artist.get_paths()])
            style = "-" if artist.get_linestyle()[0][1] is None else "--"
            found.append((to_hex(artist.get_edgecolor()[0]), style, vertices))
    return found


def clicks(axes: Any) -> list[tuple[list[float], list[float]]]:
    """Places and fill of every drawn point."""
    from matplotlib.collections import PathCollection

    return [
        (place.tolist(), artist.get_facecolor()[0, :3].tolist())
        for artist in axes.collections
        if type(artist) is PathCollection
        for place in artist.get_offsets()
    ]


def test_a_mask_is_a_tint_where_it_is_and_an_outline_along_its_pixels() -> None:
    figure = segment.overlay(GREY, [ONE, OTHER], names=["liver", "kidney"], title="two")
    (axes,) = figure.axes
    picture, *tints = axes.images
    assert numpy.array_equal(picture.get_array(), GREY)
    assert picture.get_clim() == (0, 255)
    for tint, mask, colour in zip(tints, (ONE, OTHER), TINTS, strict=False):
        drawn = tint.get_array()
        assert numpy.array_equal(drawn[..., 3] > 0, mask)
        assert drawn[mask][0].tolist() == pytest.approx([*to_rgb(colour), 0.35])
    for (colour, _, line), mask, wanted in zip(outlines(axes), (ONE, OTHER), TINTS, strict=False):
        assert colour == wanted.lower()
        rows, columns = mask.nonzero()
        assert line.min(0) == pytest.approx([columns.min() - 0.5, rows.min() - 0.5], abs=0.13)
        assert line.max(0) == pytest.approx([columns.max() + 0.5, rows.max() + 0.5], abs=0.13)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["liver", "kidney"]
    assert axes.get_title() == "two"
    assert axes.get_ylim() == (H - 0.5, -0.5)  # rows count down


def test_a_mask_that_fills_the_image_has_an_outline_and_an_empty_one_has_none() -> None:
    (axes,) = segment.overlay(RGB, ~EMPTY).axes
    ((_, _, line),) = outlines(axes)
    assert line.min() == pytest.approx(-0.5, abs=0.13)
    (axes,) = segment.overlay(RGB, EMPTY).axes
    assert not outlines(axes)
    assert not segment.overlay(RGB).legends


def test_prompts_are_told_apart_by_shape_and_shade() -> None:
    figure = segment.overlay(RGB, points=[(5, 4), (18, 1)], labels=[1, 0], box=(1, 2, 10, 9))
    (axes,) = figure.axes
    assert clicks(axes) == [([5.0, 4.0], [1.0, 1.0, 1.0]), ([18.0, 1.0], [0.0, 0.0, 0.0])]
    markers = [c.get_paths()[0].vertices.tolist() for c in axes.collections]
    assert markers[0] != markers[1]
    for patch in axes.patches:
        assert patch.get_bbox().extents.tolist() == [1, 2, 10, 9]
    assert [to_hex(p.get_edgecolor()) for p in axes.patches] == ["#000000", "#ffffff"]


def test_tensors_and_numbers_of_any_range_are_drawn() -> None:
    hounsfield = GREY.astype(numpy.int16) * 8 - 1000
    (axes,) = segment.overlay(torch.from_numpy(hounsfield), torch.from_numpy(ONE)).axes
    assert axes.images[0].get_clim() == (hounsfield.min(), hounsfield.max())
    assert (axes.images[1].get_array()[..., 3] > 0).sum() == ONE.sum()


def test_slices_are_on_one_scale_in_true_aspect_and_say_where_they_lie() -> None:
    volume = numpy.stack([GREY.astype(numpy.float32) * k for k in range(9)])
    masks = numpy.stack([ONE if k > 4 else EMPTY for k in range(9)])
    figure = segment.slices(
        volume,
        masks,
        truth=masks[::-1],
        spacing=(2.5, 0.9, 0.6),
        prompted=5,
        points=[(5, 4)],
        labels=[1],
        names=["liver"],
        count=5,
        columns=3,
    )
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert [a.get_title() for a in shown] == [
        f"slice {k} · {2.5 * k:g} mm" for k in (0, 2, 5, 6, 8)
    ]
    assert len(figure.axes) == 6  # the last of two rows of three is left blank
    assert {a.images[0].get_clim() for a in shown} == {(0.0, float(volume.max()))}
    assert {a.get_aspect() for a in shown} == {0.9 / 0.6}
    assert [bool(clicks(a)) for a in shown] == [False, False, True, False, False]
    assert [a.spines["top"].get_visible() for a in shown] == [False, False, True, False, False]
    styles = [[style for colour, style, _ in outlines(a) if colour != "#000000"] for a in shown]
    assert styles == [["--"], ["--"], ["-"], ["-"], ["-"]]
    for axes, place in zip(shown, (0, 2, 5, 6, 8), strict=True):
        assert numpy.array_equal(axes.images[0].get_array(), volume[place])
        assert numpy.array_equal(axes.images[1].get_array()[..., 3] > 0, masks[place])
    colour = numpy.stack([RGB] * 2)
    assert [a.get_title() for a in segment.slices(colour).axes] == ["slice 0", "slice 1"]
    assert segment.slices(colour).axes[0].get_aspect() == 1


def test_before_and_after_have_their_dice_and_the_truth_around_both() -> None:
    moved = disc(4, 6, 3)
    figure = segment.before_after(
        [GREY, RGB],
        [ONE, OTHER],
        [EMPTY, OTHER],
        [moved, ONE],
        points=[[(5, 4)], [(14, 8), (1, 1)]],
        labels=[[1], [1, 0]],
        names=["first", "second"],
    )
    dice = segment.dice(moved, ONE)
    assert 0.5 < dice < 1
    assert [axes.get_title() for axes in figure.axes] == [
        "prompt and truth",
        "before: Dice 0.00",
        f"after: Dice {dice:.2f}",
        "prompt and truth",
        "before: Dice 1.00",
        "after: Dice 0.00",
    ]
    assert [len(clicks(axes)) for axes in figure.axes] == [1, 0, 0, 2, 0, 0]
    assert [axes.get_ylabel() for axes in figure.axes] == ["first", "", "", "second", "", ""]
    for place, truth in ((0, ONE), (3, OTHER)):
        for axes in figure.axes[place : place + 3]:
            dashed = [line for colour, style, line in outlines(axes) if style == "--"]
            rows, columns = truth.nonzero()
            assert len(dashed) == 1
            assert dashed[0].mean(0) == pytest.approx([columns.mean(), rows.mean()], abs=0.5)
    drawn = figure.axes[2].images[1].get_array()
    assert numpy.array_equal(drawn[..., 3] > 0, moved)
    assert drawn[moved][0, :3].tolist() == pytest.approx(to_rgb(TINTS[1]))
    plain = segment.before_after([GREY], [ONE], [ONE], [ONE])
    assert plain.axes[0].get_title() == "truth"


VOLUME = numpy.zeros((4, H, W), numpy.uint8)


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: segment.overlay(VOLUME), r"an image is \(4, 12, 20\) of uint8, expected \(H, W"),
        (lambda: segment.overlay(RGB / 255), "of float64, expected .* uint8"),
        (lambda: segment.overlay(numpy.full((3, 3), numpy.nan)), "not finite"),
        (lambda: segment.overlay(VOLUME[None]), r"expected \(H, W\) or \(H, W, 3\)"),
        (
            lambda: segment.overlay(GREY, ONE.T),
            r"\(20, 12\) over an image of \(12, 20\), expected \(12, 20\) or \(K, 12, 20\)",
        ),
        (lambda: segment.overlay(GREY, 3.0 * ONE - 1), "values from -1 to 2, expected 0 and 1"),
        (lambda: segment.overlay(GREY, ONE, names=["a", "b"]), "2 names for 1 masks"),
        (lambda: segment.overlay(GREY, points=[(5, 4)]), "1 points have no labels"),
        (
            lambda: segment.overlay(GREY, points=[(4, 15)], labels=[1]),
            "outside of an image 20 wide",
        ),
        (lambda: segment.slices(GREY), r"the volume is \(12, 20\), expected \(D, H, W\)"),
        (lambda: segment.slices(VOLUME, ONE), r"\(12, 20\) over a volume of \(4, 12, 20\)"),
        (lambda: segment.slices(VOLUME, truth=ONE), r"\(12, 20\) over a volume of"),
        (lambda: segment.slices(VOLUME, spacing=(1, 0, 1)), "3 lengths above 0"),
        (lambda: segment.slices(VOLUME, points=[(1, 1)], labels=[1]), "no slice for them"),
        (lambda: segment.slices(VOLUME, prompted=4), "slice 4 was prompted, and there are 0 to 3"),
        (lambda: segment.slices(VOLUME, count=0), "count is 0"),
        (lambda: segment.before_after([], [], [], []), "no images to draw"),
        (
            lambda: segment.before_after([GREY], [ONE], [ONE, ONE], [ONE]),
            "before has 2 entries for 1 images",
        ),
        (
            lambda: segment.before_after([GREY], [ONE], [ONE], [ONE.T]),
            r"after holds a mask \(20, 12\) for an image \(12, 20\)",
        ),
        (
            lambda: segment.before_after([GREY], [ONE], [ONE], [ONE], points=[[(1, 1)]]),
            "points and no labels",
        ),
    ],
)
def test_what_cannot_be_drawn_is_refused(draw: Any, message: str) -> None:
    with pytest.raises(Refused, match=message):
        draw()


def test_neither_the_task_nor_a_figure_opens_a_window() -> None:
    """matplotlib is imported by the first figure, and pyplot never."""
    code = (
        "import sys, numpy; from mmadapt.tasks import segment\n"
        "assert 'matplotlib' not in sys.modules\n"
        "segment.overlay(numpy.zeros((4, 4)))\n"
        "assert 'matplotlib.figure' in sys.modules and 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
