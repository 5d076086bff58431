"""Images as SAM takes them, and why others are refused."""

from __future__ import annotations

from typing import Any

import numpy

from mmadapt.errors import DataError
from mmadapt.tasks.segment.intensity import WINDOWS, check_finite


def check_image(image: Any, grey: bool = False) -> numpy.ndarray:
    """The image as uint8 (H, W, 3), or a `DataError` that says what it is instead.

    With `grey` an image (H, W) or (H, W, 1) is repeated to three channels.
    """
    array = numpy.asarray(image)
    shape = tuple(array.shape)
    if array.dtype.kind not in "buif" or array.size == 0:
        raise DataError(f"an image of shape {shape} and type {array.dtype} has no pixels")
    if array.dtype.kind == "f":
        check_finite(array)
        raise DataError(
            f"the image holds {array.dtype} values from {array.min():g} to {array.max():g}, expected "
            "uint8 from 0 to 255",
            "segment.window(image, low, high) brings a range of values there, (0, 1) for example",
        )
    if array.dtype != numpy.uint8:
        raise DataError(
            f"the image holds {array.dtype} values from {array.min()} to {array.max()}, expected uint8",
            "cut out a range first: segment.window(image, low, high) or a name, "
            + ", ".join(map(repr, WINDOWS)),
        )
    if array.ndim == 3 and shape[0] in (1, 3, 4) and shape[2] not in (1, 3, 4):
        raise DataError(
            f"the image's axes look like (C, H, W): {shape}, expected (H, W, 3)",
            "image.transpose(1, 2, 0)",
        )
    if array.ndim == 2 or (array.ndim == 3 and shape[2] == 1):
        if not grey:
            raise DataError(
                f"the image has one channel: {shape}, expected (H, W, 3)",
                "pass grey=True to repeat it three times",
            )
        return numpy.repeat(array.reshape(*shape[:2], 1), 3, axis=2)
    if array.ndim == 3 and shape[2] == 4:
        raise DataError(f"the image has four channels: {shape}", "drop alpha: image[..., :3]")
    if array.ndim != 3 or shape[2] != 3:
        raise DataError(
            f"the image is {shape}, expected (H, W, 3)",
            "Segmenter.encode_stack takes the slices of a volume; of a series take one time",
        )
    return array


def check_stack(slices: Any, grey: bool = False) -> numpy.ndarray:
    """The slices of one volume as an array (D, H, W, 3), or a `DataError` that says what it is instead.

    With `grey` it is (D, H, W), or (D, H, W, 1).
    """
    array = numpy.asarray(slices)
    axes = 3 if grey and array.shape[-1:] not in ((1,), (3,)) else 4
    if array.ndim != axes:
        expected = "(D, H, W)" if grey else "(D, H, W, 3)"
        hint = (
            "a volume of one slice is image[None]"
            if array.ndim < axes
            else "take one time of a series"
        )
        if array.ndim == 3 and not grey:
            hint = "pass grey=True for slices of one channel; " + hint
        raise DataError(f"the slices are of shape {tuple(array.shape)}, expected {expected}", hint)
    if not len(array):
        raise DataError(f"a stack of shape {tuple(array.shape)} has no slices")
    check_image(array[0], grey)
    return array
