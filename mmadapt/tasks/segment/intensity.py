"""Intensity windows by modality: which range of values becomes the greys a model sees."""

from __future__ import annotations

import math
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

#: percentiles of the values that are not zero, for scanners without a unit
PERCENTILES: dict[str, tuple[float, float]] = {
    "mr": (0.5, 99.5),
    "ultrasound": (0.5, 99.5),
    "other": (0.5, 99.5),
}


def intensity_range(image: Any, low: float | str, high: float | None = None) -> tuple[float, float]:
    """The range (low, high) that a name in `WINDOWS` or `PERCENTILES` means for this image.

    Two numbers stand for themselves. Percentiles are of the values other than zero, since the air
    around a head would be most of them. Raises `DataError` for an image without a range.
    """
    if isinstance(low, str):
        if low in PERCENTILES:
            return _percentiles(numpy.asarray(image), low)
        if low not in WINDOWS:
            raise DataError(
                f"no window is named {low!r}", did_you_mean(low, [*WINDOWS, *PERCENTILES])
            )
        low, high = WINDOWS[low]
    if high is None or not -math.inf < low < high < math.inf:
        raise DataError(f"the window goes from {low!r} to {high!r}, which is no range")
    return float(low), float(high)


def _percentiles(values: numpy.ndarray, name: str) -> tuple[float, float]:
    seen = values[(values != 0) & numpy.isfinite(values)]
    low, high = numpy.percentile(seen, PERCENTILES[name]) if seen.size else (0.0, 0.0)
    if not low < high:
        raise DataError(
            f"the window {name!r} has no range: values go from {values.min():g} to "
            f"{values.max():g}, and {PERCENTILES[name][0]:g} and {PERCENTILES[name][1]:g} % of those "
            f"that are not zero are {low:g} and {high:g}",
            "give two numbers (low, high); a constant image holds nothing to segment",
        )
    return float(low), float(high)


def window(
    image: Any, low: float | str, high: float | None = None, nan: float | None = None
) -> numpy.ndarray:
    """Values from `low` to `high` as uint8 from 0 to 255, the rest cut off; any shape, any byte order.

    `low` may be a name in `WINDOWS` or `PERCENTILES`. `nan` is what stands for values that are no
    number, which are refused otherwise.
    """
    low, high = intensity_range(image, low, high)
    values = numpy.asarray(image).astype(numpy.float64)
    if nan is None:
        check_finite(values, infinite=True)
    values = numpy.nan_to_num(values, nan=low if nan is None else nan, posinf=high, neginf=low)
    return numpy.rint((values.clip(low, high) - low) * (255.0 / (high - low))).astype(numpy.uint8)


def check_finite(values: numpy.ndarray, infinite: bool = False) -> None:
    """A `DataError` that counts the values which are no numbers and names the first of them.

    Infinite ones pass where they have a meaning, as above and below a window.
    """
    wrong = numpy.isnan(values) if infinite else ~numpy.isfinite(values)
    if wrong.any():
        first = tuple(int(i) for i in numpy.argwhere(wrong)[0])
        what = "numbers" if numpy.isnan(values[first]) else "finite"
        raise DataError(
            f"{int(wrong.sum())} of {values.size} values are not {what}, the first at {first}",
            "nan=0.0, or another number, where the values are read or windowed stands in their place",
        )
