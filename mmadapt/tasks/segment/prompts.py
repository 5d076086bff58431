"""Prompts: points, a box and a mask, in the image's own pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy

from mmadapt.errors import DataError


@dataclass(frozen=True)
class Prompts:
    """What is asked about one object.

    Points (N, 2) are (x, y) in pixels, x to the right and y down, from 0 to width − 1 and height − 1;
    labels (N,) are 1 on the object and 0 beside it. The box is (x1, y1, x2, y2). The mask (h, w)
    holds low-resolution logits, as `Masks.low` of an earlier answer does.
    """

    points: numpy.ndarray | None = None
    labels: numpy.ndarray | None = None
    box: numpy.ndarray | None = None
    mask: numpy.ndarray | None = None


def check_prompts(
    size: tuple[int, int],
    points: Any = None,
    labels: Any = None,
    box: Any = None,
    mask: Any = None,
    mask_size: tuple[int, int] | None = None,
) -> Prompts:
    """Prompts for an image of `size` (height, width), or a `DataError` that says what is wrong.

    `mask_size` is what the model takes, four times its grid.
    """
    if points is None and labels is not None:
        raise DataError("there are labels and no points", "give a point (x, y) for every label")
    if points is None and box is None and mask is None:
        raise DataError(
            "there is no prompt", "give points with labels, a box (x1, y1, x2, y2) or a mask"
        )
    at = None if points is None else _coordinates(points, size, "point", 2)
    kinds = None if at is None else _labels(labels, len(at))
    around = None if box is None else _box(box, size)
    low = None if mask is None else numpy.asarray(mask, dtype=numpy.float32)
    if low is not None:
        if mask_size is not None and low.shape != mask_size:
            raise DataError(
                f"the mask prompt is {low.shape}, expected {mask_size}",
                "four times the embedding's grid: pass on the `low` of an earlier answer",
            )
        if not numpy.isfinite(low).all():
            raise DataError("the mask prompt holds values that are not finite numbers")
    return Prompts(at, kinds, around, low)


def per_slice(what: str, values: Any, axes: int, stacked: bool, count: int) -> list[Any]:
    """One value for each of `count` rows: given once, of so many axes, or in a stack with one more.

    Raises `DataError` where a stack's are not one a slice.
    """
    if values is None or not stacked:
        return [values] * count
    try:
        array = numpy.asarray(values, dtype=numpy.float64)
    except ValueError as error:
        raise DataError(
            f"the slices have unlike numbers of {what}: {error}",
            "give every slice as many, or prompt slices on their own",
        ) from error
    if array.ndim != axes + 1:
        return [values] * count
    if len(array) != count:
        raise DataError(
            f"there are {what} for {len(array)} slices, and the stack has {count}",
            "give one for all slices, or one for each of them",
        )
    return list(array)


def _coordinates(values: Any, size: tuple[int, int], what: str, width: int) -> numpy.ndarray:
    try:
        array = numpy.asarray(values, dtype=numpy.float64)
    except (TypeError, ValueError):
        raise DataError(
            f"the {what}s are no numbers or have no common number of coordinates: {values!r}"[:200],
            "each is (x, y) in the image's pixels",
        ) from None
    if array.ndim != 2 or array.shape[1] != width or not len(array):
        order = "(N, 2), each (x, y)" if width == 2 else "(x1, y1, x2, y2)"
        raise DataError(f"the {what}s are of shape {array.shape}, expected {order}")
    height, right = size
    for place, (x, y) in enumerate(array.reshape(-1, 2)):
        if not (0 <= x <= right - 1 and 0 <= y <= height - 1):  # a NaN fails too
            raise DataError(
                f"{what} {place * 2 // width} has (x, y) = ({x:g}, {y:g}), outside of an image "
                f"{right} wide and {height} high",
                "x counts to the right, y down, both from 0; arrays are indexed [y, x]",
            )
    return array


def _labels(labels: Any, count: int) -> numpy.ndarray:
    if labels is None:
        raise DataError(
            f"{count} points have no labels",
            f"labels={[1] * min(count, 3)}: 1 object, 0 background",
        )
    array = numpy.asarray(labels)
    if array.shape != (count,):
        raise DataError(f"the labels are of shape {array.shape}, expected ({count},), one a point")
    wrong = [value for value in array.tolist() if value not in (0, 1)]
    if wrong:
        raise DataError(f"label {wrong[0]!r} means nothing", "1 is the object, 0 the background")
    return array.astype(numpy.int64)


def _box(box: Any, size: tuple[int, int]) -> numpy.ndarray:
    array = numpy.asarray(box, dtype=numpy.float64)
    if array.shape != (4,):
        raise DataError(f"the box is of shape {array.shape}, expected (x1, y1, x2, y2)")
    _coordinates(array[None], size, "box", 4)
    x1, y1, x2, y2 = array.tolist()
    if x1 >= x2 or y1 >= y2:
        raise DataError(
            f"the box goes from ({x1:g}, {y1:g}) to ({x2:g}, {y2:g}), which holds nothing",
            "give the left upper corner first: (x1, y1, x2, y2) with x1 < x2 and y1 < y2",
        )
    return array
