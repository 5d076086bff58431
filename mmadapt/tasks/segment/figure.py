"""Pictures of masks and prompts: over an image, over a stack of slices, before and after training.

Each function returns a matplotlib figure and shows nothing. Masks have the colours of Okabe and Ito,
which colour-blind readers can tell apart, and an outline; what is given, truth and prompts, is black
and white and told apart by shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy

from mmadapt.core.figure import TINTS, drawn
from mmadapt.errors import DataError
from mmadapt.tasks.segment import canvas
from mmadapt.tasks.segment.metrics import dice

BEFORE, AFTER = TINTS[:2]


@drawn
def overlay(
    image: Any,
    masks: Any = None,
    points: Any = None,
    labels: Any = None,
    box: Any = None,
    names: Sequence[str] | None = None,
    title: str = "",
) -> Any:
    """One image with its masks and prompts, as a matplotlib figure.

    The image is (H, W) of any numbers, drawn from black to white, or (H, W, 3) uint8. Masks are
    (H, W) or (K, H, W) of 0 and 1; `names`, one a mask, make a legend. Points (N, 2) are (x, y) in
    pixels with labels 1 (a plus) or 0 (a cross); the box is (x1, y1, x2, y2). Raises `DataError` for
    anything of another shape.
    """
    picture = _picture(image)
    several = _stack(masks, picture.shape[:2], "an image")
    _check_names(names, len(several), "masks")
    height, width = picture.shape[:2]
    figure, ((axes,),) = canvas.grid(1, 1, 5.0, height / width)
    canvas.draw(axes, picture, several, _range(picture))
    canvas.prompts(axes, picture.shape[:2], points, labels, box)
    canvas.legend(figure, names)
    axes.set_title(title)
    return figure


@drawn
def slices(
    volume: Any,
    masks: Any = None,
    truth: Any = None,
    spacing: Sequence[float] | None = None,
    prompted: int | None = None,
    points: Any = None,
    labels: Any = None,
    box: Any = None,
    names: Sequence[str] | None = None,
    count: int = 12,
    columns: int = 6,
) -> Any:
    """Slices of a stack side by side, with masks, as a matplotlib figure.

    The volume is (D, H, W) of any numbers, on one scale from black to white, or (D, H, W, 3) uint8;
    masks are (D, H, W) or (K, D, H, W), and the truth (D, H, W) is a dashed outline. `spacing` is mm along (D, H, W): pixels then have their true
    aspect, and titles say where a slice lies. Points, labels and box are those of the slice
    `prompted`, which is always among the `count` slices shown, evenly spaced, and has a frame.
    """
    stack, step = numpy.asarray(volume), _spacing(spacing)
    if stack.ndim not in (3, 4) or (stack.ndim == 4 and stack.shape[3] != 3):
        raise DataError(
            f"the volume is {stack.shape}, expected (D, H, W), or (D, H, W, 3) in colour",
            "overlay draws a single image",
        )
    pictures = [_picture(one) for one in stack]
    several = _stack(masks, stack.shape[:3], "a volume")
    dashed = _stack(truth, stack.shape[:3], "a volume")
    _check_names(names, len(several), "masks")
    depth, height, width = stack.shape[:3]
    given = not (points is None and labels is None and box is None)
    if given and prompted is None:
        raise DataError("there are prompts and no slice for them", "prompted=the slice they are on")
    if prompted is not None and not 0 <= prompted < depth:
        raise DataError(f"slice {prompted} was prompted, and there are 0 to {depth - 1}")
    shown = _chosen(depth, count, prompted)
    columns = min(columns, len(shown))
    aspect = step[1] / step[2]
    figure, grid = canvas.grid(-(-len(shown) // columns), columns, 1.7, aspect * height / width)
    limits = _range(stack) if stack.ndim == 3 else None
    for axes, place in zip((a for row in grid for a in row), shown, strict=False):
        canvas.draw(axes, pictures[place], several[:, place], limits, aspect)
        for own in dashed[:, place]:
            canvas.outline(axes, own, "white", "--", behind="black", width=1.0)
        where = "" if spacing is None else f" · {place * step[0]:g} mm"
        axes.set_title(f"slice {place}{where}", fontsize=8, pad=3)
        if place == prompted:
            if given:
                canvas.prompts(axes, (height, width), points, labels, box, scale=60)
            axes.title.set_fontweight("bold")
            canvas.frame(axes)
    for axes in [a for row in grid for a in row][len(shown) :]:
        axes.set_visible(False)
    canvas.legend(figure, names)
    return figure


@drawn
def before_after(
    images: Any,
    truth: Any,
    before: Any,
    after: Any,
    points: Any = None,
    labels: Any = None,
    names: Sequence[str] | None = None,
) -> Any:
    """A row an image: the prompts, then the answer before and after training with its Dice.

    Images (N, H, W) or (N, H, W, 3), or a list of images of several sizes; truth, before and after
    are one mask for each. The truth is a dashed outline. `points` holds (P, 2) and `labels` (P,) for
    every image; `names` stand at the left.
    """
    pictures = [_picture(image) for image in images]
    if not pictures:
        raise DataError("there are no images to draw", "give at least one")
    columns = {"truth": truth, "before": before, "after": after}
    for word, several in {**columns, "points": points, "labels": labels}.items():
        if several is not None and len(several) != len(pictures):
            raise DataError(f"{word} has {len(several)} entries for {len(pictures)} images")
    if points is not None and labels is None:
        raise DataError("there are points and no labels", "give labels, 1 or 0, for every image")
    _check_names(names, len(pictures), "images")
    found = {
        word: [
            _single(mask, picture, word) for mask, picture in zip(several, pictures, strict=True)
        ]
        for word, several in columns.items()
    }
    height, width = pictures[0].shape[:2]
    figure, grid = canvas.grid(len(pictures), 3, 2.2, height / width)
    for place, (picture, row) in enumerate(zip(pictures, grid, strict=True)):
        own = found["truth"][place]
        nothing = numpy.zeros((0, *own.shape), bool)
        canvas.draw(row[0], picture, nothing, _range(picture))
        for axes, word, colour in ((row[1], "before", BEFORE), (row[2], "after", AFTER)):
            mask = found[word][place]
            canvas.draw(axes, picture, mask[None], _range(picture), colours=(colour,))
            axes.set_title(f"{word}: Dice {dice(mask, own):.2f}", fontsize=9, pad=3)
        for axes in row:
            canvas.outline(axes, own, "white", "--", behind="black")
        row[0].set_title("prompt and truth" if points is not None else "truth", fontsize=9, pad=3)
        if points is not None:
            canvas.prompts(row[0], own.shape, points[place], labels[place], None, scale=90)
        if names is not None:
            row[0].set_ylabel(names[place], fontsize=9)
    return figure


# -- what is accepted -----------------------------------------------------------------------------


def _picture(image: Any) -> numpy.ndarray:
    """(H, W) of numbers or (H, W, 3) uint8."""
    array = numpy.asarray(image)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.dtype.kind not in "buif" or not array.size or array.ndim not in (2, 3):
        raise DataError(
            f"an image is {array.shape} of {array.dtype}, expected (H, W) or (H, W, 3)",
            "slices draws a stack of them",
        )
    if array.ndim == 3 and (array.shape[2] != 3 or array.dtype != numpy.uint8):
        raise DataError(
            f"an image is {array.shape} of {array.dtype}, expected (H, W, 3) of uint8",
            "transpose channels to the end; segment.window brings values to 0 to 255",
        )
    if array.dtype.kind == "f" and not numpy.isfinite(array).all():
        raise DataError("an image holds values that are not finite numbers")
    return array


def _range(picture: numpy.ndarray) -> tuple[float, float]:
    """What is black and what is white."""
    if picture.dtype == numpy.uint8:
        return 0.0, 255.0
    return float(picture.min()), float(picture.max())


def _stack(masks: Any, shape: tuple[int, ...], what: str) -> numpy.ndarray:
    """Masks as bool (K, *shape); K is 0 for none."""
    if masks is None:
        return numpy.zeros((0, *shape), bool)
    array = _array(masks)
    if array.shape == shape:
        array = array[None]
    if array.ndim != len(shape) + 1 or array.shape[1:] != shape:
        raise DataError(
            f"the masks are {array.shape} over {what} of {shape}, expected {shape} or (K, "
            f"{str(shape)[1:]}",
            "one mask of 0 and 1 for every object, in the pixels of what is drawn",
        )
    return _binary(array, "a mask")


def _single(mask: Any, picture: numpy.ndarray, word: str) -> numpy.ndarray:
    array = _array(mask)
    if array.shape != picture.shape[:2]:
        raise DataError(
            f"{word} holds a mask {array.shape} for an image {picture.shape[:2]}",
            "one mask an image: Masks.best of an answer",
        )
    return _binary(array, word)


def _array(value: Any) -> numpy.ndarray:
    if hasattr(value, "detach"):
        value = value.detach().cpu()
    return numpy.asarray([_array(one) for one in value] if isinstance(value, list) else value)


def _binary(array: numpy.ndarray, what: str) -> numpy.ndarray:
    if array.dtype != bool and not numpy.isin(array, (0, 1)).all():
        raise DataError(
            f"{what} holds values from {array.min():g} to {array.max():g}, expected 0 and 1",
            "logits > 0 is a mask, labels == 2 another",
        )
    return array.astype(bool)


def _spacing(spacing: Sequence[float] | None) -> tuple[float, ...]:
    values = (1.0, 1.0, 1.0) if spacing is None else tuple(float(value) for value in spacing)
    if len(values) != 3 or not all(0 < value < float("inf") for value in values):
        raise DataError(f"spacing is {spacing!r}, expected 3 lengths above 0, along (D, H, W)")
    return values


def _check_names(names: Sequence[str] | None, count: int, what: str) -> None:
    if names is not None and len(names) != count:
        raise DataError(f"there are {len(names)} names for {count} {what}")


def _chosen(depth: int, count: int, prompted: int | None) -> list[int]:
    """At most `count` slices, evenly spaced, one of them `prompted`."""
    if count < 1:
        raise DataError(f"count is {count!r}, expected at least 1 slice")
    shown = numpy.unique(numpy.linspace(0, depth - 1, min(count, depth)).round().astype(int))
    if prompted is not None:
        shown[numpy.abs(shown - prompted).argmin()] = prompted
    return [int(place) for place in shown]
