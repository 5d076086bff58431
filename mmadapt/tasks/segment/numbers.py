"""Images of any type of numbers, and the bytes that stand for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy

from mmadapt.errors import DataError
from mmadapt.tasks.segment.images import check_image
from mmadapt.tasks.segment.intensity import check_finite, intensity_range, window

#: percentiles of a grey image that are drawn black and white where no window is given
USUAL = (0.5, 99.5)


@dataclass(frozen=True, eq=False)
class Numbers:
    """An image (H, W) or (H, W, 3) as it came, and the values that become 0 and 255."""

    values: numpy.ndarray
    limits: tuple[float, float]

    @property
    def grey(self) -> bool:
        """Whether it has one channel."""
        return self.values.ndim == 2

    def bytes(self, limits: tuple[float, float] | None = None) -> numpy.ndarray:
        """uint8 of the same shape; other `limits` are another window for the eyes."""
        limits = limits or self.limits
        if self.values.dtype == numpy.uint8 and limits == (0.0, 255.0):
            return self.values
        return window(self.values, *limits)


def numbers_of(image: Any, limits: str | tuple[float, float] | None = None) -> Numbers:
    """An array, a tensor or a PIL image, (H, W), (H, W, 1) or (H, W, 3), of any real type.

    `limits` is a name of `WINDOWS` or `PERCENTILES`, or two numbers. Without them bytes stay as they
    are, values from 0 to 1 are taken as such, colours run from the smallest to the largest value, and
    greys from the 0.5 to the 99.5 percentile. Raises `DataError` for anything else.
    """
    values = _array(image)
    if values.dtype.kind not in "buif" or not values.size:
        raise DataError(f"an image of shape {values.shape} and type {values.dtype} has no pixels")
    if values.dtype.kind == "f":
        check_finite(values)
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[..., 0]
    # of shape and channels: the same refusals as for the model
    check_image(numpy.broadcast_to(numpy.uint8(0), values.shape), grey=True)
    if values.dtype == bool:
        values = values.astype(numpy.uint8) * 255
    if limits is None:
        return Numbers(values, _usual(values))
    low, high = (limits, None) if isinstance(limits, str) else limits
    return Numbers(values, intensity_range(values, low, high))


def _usual(values: numpy.ndarray) -> tuple[float, float]:
    if values.dtype == numpy.uint8:
        return 0.0, 255.0
    low, high = float(values.min()), float(values.max())
    if values.dtype.kind == "f" and low >= 0 and high <= 1:
        return 0.0, 1.0
    if values.ndim == 2:
        middle = tuple(float(value) for value in numpy.percentile(values, USUAL))
        low, high = middle if middle[0] < middle[1] else (low, high)  # type: ignore[misc]
    return low, high if low < high else low + 1.0


def _array(image: Any) -> numpy.ndarray:
    if hasattr(image, "convert") and hasattr(
        image, "mode"
    ):  # PIL; palettes and alpha are no numbers
        plain = image.mode in ("1", "L", "I", "F", "RGB") or image.mode.startswith("I;16")
        image = image if plain else image.convert("RGB")
    if hasattr(image, "detach"):
        image = image.detach().cpu()
        image = image.float() if image.is_floating_point() else image
    return numpy.asarray(image)
