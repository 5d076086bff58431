"""Images as SAM takes them, and why others are refused."""

from __future__ import annotations

from typing import Any

import numpy

from mmadapt.errors import DataError, did_you_mean

#: intensity windows (low, high) by name; of computed tomography in Hounsfield units
WINDOWS: dict[str, tuple[float, float]] = {
    "ct soft tissue": (-160.0, 240.0),
    "ct abdomen": (-175.0, 250.0),
    "ct kidney": (-54.0, 247.0),
    "ct lung": (-1000.0, 400.0),
    "ct bone": (-450.0, 1050.0),
}


def window(
    image: Any, low: float | str, high: float | None = None, nan: float | None = None
) -> numpy.ndarray:
    """Values from `low` to `high` as uint8 from 0 to 255, the rest cut off; any shape, any byte order.

    `low` may be a name in `WINDOWS`. `nan` is what stands for values that are no number, which are
    refused otherwise.
    """
    if isinstance(low, str):
        if low not in WINDOWS:
            raise DataError(f"no window is named {low!r}", did_you_mean(low, WINDOWS))
        low, high = WINDOWS[low]
    if high is None or not low < high:
        raise DataError(f"the window goes from {low!r} to {high!r}, which is no range")
    values = numpy.asarray(image).astype(numpy.float64)
    _check_finite(values, nan)
    values = numpy.nan_to_num(values, nan=low if nan is None else nan, posinf=high, neginf=low)
    return numpy.rint((values.clip(low, high) - low) * (255.0 / (high - low))).astype(numpy.uint8)


def _check_finite(values: numpy.ndarray, nan: float | None) -> None:
    missing = numpy.isnan(values)
    if nan is None and missing.any():
        first = tuple(int(i) for i in numpy.argwhere(missing)[0])
        raise DataError(
            f"{int(missing.sum())} of {values.size} values are not numbers, the first at {first}",
            "window(image, low, high, nan=low) puts a value in their place",
        )


def check_image(image: Any, grey: bool = False) -> numpy.ndarray:
    """The image as uint8 (H, W, 3), or a `DataError` that says what it is instead.

    With `grey` an image (H, W) or (H, W, 1) is repeated to three channels.
    """
    array = numpy.asarray(image)
    shape = tuple(array.shape)
    if array.dtype.kind not in "buif" or array.size == 0:
        raise DataError(f"an image of shape {shape} and type {array.dtype} has no pixels")
    if array.dtype.kind == "f":
        _check_finite(array, None)
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
