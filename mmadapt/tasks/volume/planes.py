"""The three planes of the body through a volume: which voxels they show, and which way round."""

from __future__ import annotations

from typing import Any

import numpy

from mmadapt.tasks.volume.grid import ENDS, nearest_axes
from mmadapt.tasks.volume.volume import Volume

#: name, what runs to the right, what runs upwards: the patient's right is on the picture's left
PLANES = (("axial", "RL", "AP"), ("coronal", "RL", "SI"), ("sagittal", "AP", "SI"))


class Plane:
    """Which axes of the array a plane runs along, and which way round."""

    def __init__(self, volume: Volume, name: str, right: str, up: str) -> None:
        self.volume, self.name = volume, name
        bodies = nearest_axes(volume.affine)[::-1]  # for z, y, x
        letters = volume.orientation[::-1]  # where z, y, x lead
        self.letters = (right, up)
        self.across, self.along = (
            next(i for i in range(3) if letters[i] in pair) for pair in (right, up)
        )
        self.through = 3 - self.across - self.along
        self.body = bodies[self.through]
        # the first letter stands at the left, and at the top
        self.flip_across = letters[self.across] == right[0]
        self.flip_along = letters[self.along] == up[1]
        self.size = volume.size[self.across], volume.size[self.along]
        self.step = volume.spacing[self.across], volume.spacing[self.along]
        self.width, self.height = (n * s for n, s in zip(self.size, self.step, strict=True))

    def cut(self, values: Any, point: tuple[int, int, int]) -> numpy.ndarray:
        """The slice of the first channel as rows from the bottom upwards; nothing else is read.

        Values are (C, D, H, W).
        """
        index: list[Any] = [0, slice(None), slice(None), slice(None)]
        index[1 + self.through] = point[self.through]
        picture = numpy.asarray(values[tuple(index)])
        if self.along > self.across:
            picture = picture.T
        if self.flip_along:
            picture = picture[::-1]
        return picture[:, ::-1] if self.flip_across else picture

    def place(self, point: tuple[int, int, int]) -> tuple[float, float]:
        """Where a voxel's middle lies in the picture, mm from its left lower corner."""
        x, y = point[self.across] + 0.5, point[self.along] + 0.5
        x = self.size[0] - x if self.flip_across else x
        y = self.size[1] - y if self.flip_along else y
        return x * self.step[0], y * self.step[1]

    def voxel(self, x: float, y: float, point: tuple[int, int, int]) -> tuple[float, float, float]:
        """The voxel (z, y, x) under a place in the picture, in pixels from its left upper corner.

        Whole numbers are the middles of pixels; the third axis is that of `point`.
        """
        across = self.size[0] - 1 - x if self.flip_across else x
        along = y if self.flip_along else self.size[1] - 1 - y
        found = [float(value) for value in point]
        found[self.across], found[self.along] = across, along
        z, y, x = found
        return z, y, x

    def pixel(self, point: Any) -> tuple[float, float]:
        """Where a voxel (z, y, x) lies in the picture: the inverse of `voxel`."""
        across, along = point[self.across], point[self.along]
        x = self.size[0] - 1 - across if self.flip_across else across
        y = along if self.flip_along else self.size[1] - 1 - along
        return float(x), float(y)

    def title(self, point: tuple[int, int, int]) -> str:
        """The plane's name, its slice and where that lies in millimetres."""
        mm = self.volume.grid.to_mm(point)[0][self.body]
        letter = ENDS[self.body][int(mm >= 0)]
        axis, last = self.through, self.volume.size[self.through] - 1
        return (
            f"{self.name}   {'zyx'[axis]} = {point[axis]} of 0–{last}   {letter} {abs(mm):.1f} mm"
        )
