"""A volume that is clicked: its three planes, and prompts between them and the study."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy

from mmadapt.errors import DataError
from mmadapt.tasks.segment.intensity import intensity_range
from mmadapt.tasks.segment.numbers import USUAL
from mmadapt.tasks.volume import Box, SliceSegmenter, Volume, VolumeSegmenter, planes_figure
from mmadapt.tasks.volume.planes import PLANES, Plane
from mmadapt.ui.image_scene import ends


class VolumeScene:
    """A volume: the three planes of the body through the voxel `at`, (z, y, x) in the volume."""

    planes = 3
    unit = "voxel"

    def __init__(
        self,
        study: SliceSegmenter | VolumeSegmenter,
        volume: Volume,
        limits: tuple[float, float],
        lettered: bool = True,
    ) -> None:
        self.study = study
        self.volume = volume
        self.lettered = lettered
        self._planes = [Plane(volume, *plane) for plane in PLANES]
        self.at: tuple[int, int, int] = tuple(n // 2 for n in volume.size)  # type: ignore[assignment]
        self.limits = limits

        # of a volume in its file only these planes are read
        whole = isinstance(volume.array, numpy.ndarray)
        self.range = ends(volume.array if whole else _middle(volume))

    @property
    def model(self) -> Any:
        """The SAM."""
        study = self.study
        return study.segmenter.model if isinstance(study, SliceSegmenter) else study.model

    def describe(self) -> str:
        """What is shown, in a few words."""
        where = ", ".join(map(str, self.at))
        return (
            f"volume of {self.volume.grid} at ({where})"
            if self.lettered
            else f"volume {' × '.join(map(str, self.volume.size))} at ({where})"
        )

    def move(self, at: Any) -> None:
        """Show other slices: through the voxel (z, y, x)."""
        found = tuple(int(value) for value in at)
        if len(found) != 3 or not all(0 <= v < n for v, n in zip(found, self.volume.size, strict=True)):  # fmt: skip
            raise DataError(
                f"the voxel {found} is not within the volume's {self.volume.size}",
                "at is (z, y, x), each from 0",
            )
        self.at = found  # type: ignore[assignment]

    def scroll(self, plane: int, place: int) -> None:
        """Show another slice of a plane; beyond the ends the last one."""
        through = self._planes[plane].through
        at = list(self.at)
        at[through] = min(max(int(place), 0), self.volume.size[through] - 1)
        self.move(at)

    def picture(self, plane: int) -> numpy.ndarray:
        """uint8 (h, w), the top row first."""
        return _grey(self._planes[plane].cut(self.volume.array, self.at)[::-1], self.limits)

    def mask(self, plane: int) -> numpy.ndarray:
        """bool (h, w), the top row first."""
        return self._planes[plane].cut(self.study.mask[None], self.at)[::-1]

    def show(self, plane: int) -> dict[str, Any]:
        """Title, letters, slice and its count, a pixel's width and height, points and boxes."""
        own = self._planes[plane]
        axis, last = own.through, self.volume.size[own.through] - 1
        title = own.title(self.at) if self.lettered else f"{'zyx'[axis]} = {self.at[axis]} of 0–{last}"  # fmt: skip
        points = [
            [*own.pixel(point), label]
            for point, label in zip(self._points(), self.study.labels, strict=True)
            if round(point[axis]) == self.at[axis]
        ]
        return {
            "title": title,
            "letters": [*own.letters[0], *own.letters[1]] if self.lettered else [""] * 4,
            "slice": self.at[axis],
            "slices": last + 1,
            "spacing": list(own.step),
            "cross": list(own.pixel(self.at)),
            "points": points,
            "boxes": [box for box in map(lambda box: self._rectangle(own, box), self._boxes()) if box],
        }  # fmt: skip

    def click_at(self, place: Sequence[float], label: int) -> None:
        """A click (z, y, x) in the volume as it is shown."""
        self.study.click(self._original(place), label)

    def ask(self, points: Any, labels: Any, boxes: Any) -> None:
        """Put these prompts in the place of all others."""
        if isinstance(self.study, SliceSegmenter):
            self.study.ask(points, labels, boxes)
            return
        for box in boxes:
            self.study.box(box)  # refused: it takes clicks alone
        self.study.ask(points, labels)

    def draw(self, mask: Any) -> None:
        """A mask bool (D, H, W) on the original grid, as `SliceSegmenter.draw` takes it."""
        if not isinstance(self.study, SliceSegmenter):
            raise DataError(
                "a mask was given, and 3DSAM-adapter's prompt encoder takes clicks alone",
                "draw several clicks from it: volume.from_mask(mask, 3)",
            )
        self.study.draw(mask)

    def look(self, limits: Any) -> None:
        """Another window for the eyes."""
        self.limits = intensity_range(None, *limits)

    def click(self, plane: int, x: float, y: float, label: int) -> None:
        """A click on a plane, which the other planes then go through."""
        voxel = self._planes[plane].voxel(x, y, self.at)
        self.study.click(self._original(voxel), label)
        self.move(
            [min(max(round(v), 0), n - 1) for v, n in zip(voxel, self.volume.size, strict=True)]
        )

    def box(self, plane: int, one: Sequence[float], other: Sequence[float]) -> None:
        """A box between two corners on a plane, one voxel deep."""
        ends = numpy.array([self._planes[plane].voxel(x, y, self.at) for x, y in (one, other)])
        first, last = numpy.rint(ends.min(0)), numpy.rint(ends.max(0)) + 1  # last ones not included
        grid, corners = self.volume.original, numpy.array([first, last]) - 0.5
        moved = grid.to_voxel(self.volume.grid.to_mm(corners)) + 0.5
        low = numpy.rint(moved.min(0)).clip(0)
        high = numpy.minimum(numpy.maximum(numpy.rint(moved.max(0)), low + 1), grid.size)
        self.study.box(tuple(float(value) for value in (*low, *high)))

    def again(self) -> None:
        """The same prompts once more: the adapter was switched."""
        self.ask(self.study.points, self.study.labels, self._boxes())

    def figure(self) -> Any:
        """A matplotlib figure of the three planes and the mask."""
        mask = self.study.mask
        return planes_figure(
            self.volume, self.at, mask if mask.any() else None, {1: "mask"}, limits=self.limits
        )

    def _points(self) -> list[numpy.ndarray]:
        """Clicks in the volume as it is shown."""
        grid = self.volume.original
        return [self.volume.grid.to_voxel(grid.to_mm(point))[0] for point in self.study.points]

    def _boxes(self) -> list[Box]:
        return list(getattr(self.study, "boxes", ()))

    def _original(self, voxel: Any) -> tuple[float, ...]:
        found = self.volume.original.to_voxel(self.volume.grid.to_mm(voxel))[0]
        return tuple(float(value) for value in found)

    def _rectangle(self, plane: Plane, box: Box) -> list[float] | None:
        """Where the plane cuts a box."""
        corners = numpy.array([box[:3], box[3:]]) - 0.5
        moved = self.volume.grid.to_voxel(self.volume.original.to_mm(corners))
        low, high = moved.min(0), moved.max(0)
        if not low[plane.through] <= self.at[plane.through] <= high[plane.through]:
            return None
        ends = numpy.array([plane.pixel(low), plane.pixel(high)])
        return [*ends.min(0).tolist(), *ends.max(0).tolist()]


def usual_limits(volume: Volume) -> tuple[float, float]:
    """What is drawn black and white in a volume that does not say: 0 and 1, or percentiles.

    Those are of the three middle planes; of a volume in its file only they are read.
    """
    values = _middle(volume)
    low, high = ends(values)
    if low >= 0 and high <= 1:
        return 0.0, 1.0
    middle = tuple(float(value) for value in numpy.percentile(values, USUAL))
    return middle if middle[0] < middle[1] else (low, high)  # type: ignore[return-value]


def _middle(volume: Volume) -> numpy.ndarray:
    at = tuple(n // 2 for n in volume.size)
    planes = [Plane(volume, *plane).cut(volume.array, at) for plane in PLANES]  # type: ignore[arg-type]
    return numpy.concatenate([plane.ravel() for plane in planes])


def _grey(values: numpy.ndarray, limits: tuple[float, float]) -> numpy.ndarray:
    """Values within a window as uint8; quicker than `segment.window`, for numbers known to be finite."""
    low, high = limits
    scaled = (values - low) * numpy.float32(255 / (high - low)) + numpy.float32(0.5)
    return scaled.clip(0, 255).astype(numpy.uint8)
