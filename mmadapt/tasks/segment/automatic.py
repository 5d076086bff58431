"""Prompts without a user: many points, taken from a coarse mask.

Jie and Zhang 2023, AdapterShadow: Adapting Segment Anything Model for Shadow Detection,
arXiv:2311.08891
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import Tensor
from torch.nn import functional as F

from mmadapt.errors import DataError
from mmadapt.tasks.segment.segmenter import Masks, Segmenter

if TYPE_CHECKING:
    from mmadapt.tasks.segment.coarse import CoarseMask


def dense_points(
    coarse: Any, count: int | None = None, grid: int | None = None, threshold: float = 0.9
) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Points (N, 2) as (x, y) and labels (N,) from the probabilities (H, W) of a coarse mask.

    The `count` most probable pixels, or the most probable pixel in each cell of a `grid` of so many
    rows and columns (16 without either), cells without a pixel left out. The label is 1 where the
    probability is above `threshold`, else 0.
    """
    values = numpy.asarray(coarse.detach().cpu() if isinstance(coarse, Tensor) else coarse)
    if values.ndim != 2 or not values.size or not ((values >= 0) & (values <= 1)).all():
        raise DataError(
            f"the coarse mask is of shape {values.shape}"
            + (f", from {values.min():g} to {values.max():g}" if values.size else "")
            + ", expected probabilities (H, W)",
            "logits.sigmoid() of one image",
        )
    if count is not None and grid is not None:
        raise DataError(f"count is {count!r} and grid is {grid!r}", "give one of them")
    for name, number in (("count", count), ("grid", grid)):
        if number is not None and (type(number) is not int or number < 1):
            raise DataError(f"{name} is {number!r}, expected a whole number of at least 1")
    height, width = values.shape
    if count is not None:
        order = numpy.argsort(-values, axis=None, kind="stable")[:count]
    else:
        # which cell each pixel is in, and for each cell the first of its most probable pixels
        rows, columns = (numpy.arange(n) * min(grid or 16, n) // n for n in (height, width))
        cells = (rows[:, None] * (columns[-1] + 1) + columns).ravel()
        by_cell = numpy.lexsort((-values.ravel(), cells))
        order = by_cell[numpy.unique(cells[by_cell], return_index=True)[1]]
    y, x = numpy.unravel_index(order, values.shape)
    labels = (values[y, x] > threshold).astype(numpy.int64)
    return numpy.stack([x, y], 1).astype(numpy.float64), labels


class AutoPrompted:
    """A segmenter that needs no click: a coarse mask gives the points.

    `choice` goes to `dense_points`.

        auto = segment.AutoPrompted(segment.Segmenter(sam), coarse, grid=16)
        masks = auto.predict(image)
    """

    def __init__(self, segmenter: Segmenter, coarse: CoarseMask, **choice: Any) -> None:
        self.segmenter = segmenter
        self.coarse = coarse
        self.choice = choice

    @torch.no_grad()
    def guess(self, image: Any, grey: bool = False) -> Tensor:
        """The coarse mask of an image uint8 (H, W, 3): probabilities (H, W)."""
        pixels = self.segmenter.prepare(image, grey).to(next(self.coarse.parameters()))
        training = self.coarse.training
        self.coarse.eval()
        try:
            probabilities = self.coarse(pixels[None]).sigmoid()
        finally:
            self.coarse.train(training)
        size = tuple(numpy.shape(image)[:2])
        height, width = self.segmenter.resized(size)
        whole = F.interpolate(probabilities[None, :, :height, :width], size, mode="bilinear")
        return whole[0, 0].clamp(0, 1)

    def predict(self, image: Any, grey: bool = False, several: bool = False) -> Masks:
        """The masks of an image uint8 (H, W, 3), prompted by its own coarse mask."""
        points, labels = dense_points(self.guess(image, grey), **self.choice)
        encoded = self.segmenter.encode(image, grey)
        return self.segmenter.predict(encoded, points=points, labels=labels, several=several)
