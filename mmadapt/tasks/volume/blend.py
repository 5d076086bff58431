"""Overlapping windows blended into planes that leave memory as soon as they are finished."""

from __future__ import annotations

from typing import Any

import numpy
import torch
from torch import Tensor

from mmadapt.errors import DataError

#: the logit of voxels in which no window fell: as good as certainly background
OUTSIDE = -100.0


class Blend:
    """Weighted means of windows that come in the order of their z.

    `weight` (d, h, w) is a window's own; `size` (D, H, W) the volume's. Only d planes are kept; those
    before the newest window are written to `out`: floats (K, D, H, W) for logits, or whole numbers
    (D, H, W) for labels. Without it logits are kept as float32.
    """

    def __init__(self, size: tuple[int, int, int], weight: Tensor, channels: int, out: Any) -> None:
        self.weight = weight
        self.depth = size[0]
        self.out = _output(out, (channels, *size))
        self._sums = torch.zeros(channels, len(weight), *size[1:])
        self._shares = torch.zeros(len(weight), *size[1:])
        self._first = 0  # the plane that is kept first
        self._done = 0  # the planes before this one are written

    def add(self, first: numpy.ndarray, logits: Tensor) -> None:
        """Take in one window (K, d, h, w) that begins at voxel `first`, which may lie outside."""
        low = numpy.maximum(first, 0)
        high = numpy.minimum(first + self.weight.shape, (self.depth, *self._shares.shape[1:]))
        self._forward(int(low[0]))
        inner = tuple(map(slice, low - first, high - first))
        low[0] -= self._first
        high[0] -= self._first
        place = tuple(map(slice, low, high))
        self._sums[(slice(None), *place)] += logits[(slice(None), *inner)] * self.weight[inner]
        self._shares[place] += self.weight[inner]

    def finish(self) -> Any:
        """Write the planes that are left; what was filled."""
        self._write(self.depth)
        return self.out

    def _forward(self, plane: int) -> None:
        self._write(plane)
        moved = plane - self._first
        if moved:
            for kept in (self._sums, self._shares[None]):
                rest = kept[:, moved:].clone()
                kept.zero_()
                kept[:, : rest.shape[1]] = rest
            self._first = plane

    def _write(self, until: int) -> None:
        for z in range(self._done, until):
            mean = torch.full_like(self._sums[:, 0], OUTSIDE)
            if z - self._first < len(self._shares):
                sums, shares = self._sums[:, z - self._first], self._shares[z - self._first]
                mean = torch.where(shares > 0, sums / shares.clamp_min(1e-30), mean)
            if self.out.dtype.kind == "f":
                self.out[:, z] = mean.numpy()
            else:
                self.out[z] = (mean.argmax(0) if len(mean) > 1 else mean[0] > 0).numpy()
        self._done = max(self._done, until)


def _output(out: Any, shape: tuple[int, ...]) -> Any:
    if out is None:
        return numpy.empty(shape, numpy.float32)
    wanted = shape if out.dtype.kind == "f" else shape[1:]
    if out.dtype.kind not in "uif" or tuple(out.shape) != wanted:
        raise DataError(
            f"out is {out.dtype} {tuple(out.shape)}, expected floats {shape} for logits or whole "
            f"numbers {shape[1:]} for labels"
        )
    return out
