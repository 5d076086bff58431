"""Values that stay in their file until they are asked for."""

from __future__ import annotations

from typing import Any

import numpy

from mmadapt.errors import DataError
from mmadapt.tasks.segment.intensity import PERCENTILES, check_finite, intensity_range


class Stored:
    """An array (1, D, H, W) in a file, read where it is sliced: float32, windowed, checked for NaN.

    `source` is anything of shape (X, Y, Z) that numpy can slice, such as nibabel's `dataobj`.
    """

    ndim = 4
    dtype = numpy.dtype(numpy.float32)

    def __init__(self, source: Any, limits: tuple[float, float] | None = None) -> None:
        self.source = source
        self.limits = limits
        self.shape = (1, *source.shape[::-1])

    def windowed(self, low: float | str, high: float | None = None) -> Stored:
        """The same file, values from `low` to `high` brought to 0–1 as they are read."""
        if low in PERCENTILES:
            raise DataError(
                f"the window {low!r} is made of percentiles, for which the whole file must be read",
                "give two numbers (low, high), measured on a part: volume.crop(box)",
            )
        if self.limits is not None:
            raise DataError(f"the values are windowed already, from {self.limits[0]:g} on")
        return Stored(self.source, intensity_range(None, low, high))

    def __len__(self) -> int:
        return 1

    def __getitem__(self, key: Any) -> numpy.ndarray:
        key = key if isinstance(key, tuple) else (key,)
        key = (*key, *[slice(None)] * (4 - len(key)))
        channel, *zyx = key
        values = numpy.asarray(self.source[tuple(zyx[::-1])])
        values = numpy.ascontiguousarray(values.T, dtype=numpy.float32)[None]
        check_finite(values)
        if self.limits is not None:
            low, high = self.limits
            values = ((values - low) * (1 / (high - low))).clip(0, 1)
        return values[channel]
