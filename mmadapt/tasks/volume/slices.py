"""Slice by slice with SAM: prompt one slice, propagate to its neighbours, correct by more clicks."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.nn import functional as F

from mmadapt.errors import DataError
from mmadapt.tasks.segment.segmenter import Segmenter
from mmadapt.tasks.volume.encoded import EncodedSlices
from mmadapt.tasks.volume.prompts import (
    Box,
    Point,
    check_box,
    check_mask,
    check_points,
    moved_box,
    moved_points,
)
from mmadapt.tasks.volume.trained import as_trained
from mmadapt.tasks.volume.volume import Volume

#: steps that can be taken back
STEPS = 50


@dataclass
class _Asked:
    """What was asked about one slice: points (x, y), their labels and a box (x1, y1, x2, y2)."""

    points: list[tuple[float, float]] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    box: tuple[float, float, float, float] | None = None

    def copy(self) -> _Asked:
        return replace(self, points=list(self.points), labels=list(self.labels))


@dataclass
class _Before:
    """The study before one step: its prompts, and of the slices that may change what they held."""

    prompts: tuple[list[Point], list[int], list[Box]]
    slices: dict[int, tuple[_Asked | None, numpy.ndarray, Tensor | None]]


class SliceSegmenter:
    """One object of a volume, along its first axis.

        ct = read_nifti("ct.nii.gz").window("ct abdomen")
        study = SliceSegmenter(model, ct)
        study.click((40, 120, 96))              # (z, y, x) in the original image
        study.propagate()                       # both ways, until the object ends
        study.click((44, 130, 90), label=0)     # beside it: this slice is corrected
        study.propagate()                       # and its neighbours follow
        study.undo()                            # the last step never was
        save_mask("liver.nii.gz", study.mask, ct)

    A slice is encoded once (`EncodedSlices`). The volume has one channel of 0 to 1, as
    `Volume.window` gives, or the scanner's values where the adapters say what window they were trained
    with. Slices along another axis: `volume.oriented("SAR")` and the like. `points` with their `labels`
    and `boxes` are what was asked so far, in the original image. A step that is refused changes nothing.
    """

    def __init__(self, model: Any, volume: Volume) -> None:
        self.segmenter = model if isinstance(model, Segmenter) else Segmenter(model)
        self.volume = as_trained(self.segmenter.model, volume)
        if len(volume.array) != 1:
            raise DataError(f"{volume.name} has {len(volume.array)} channels, expected one")
        self.mask = numpy.zeros(volume.size, bool)
        self.points: list[Point] = []
        self.labels: list[int] = []
        self.boxes: list[Box] = []
        self._steps: deque[_Before] = deque(maxlen=STEPS)
        self._asked: dict[int, _Asked] = {}
        self._low: dict[int, Tensor] = {}
        self._encoded = EncodedSlices(self.segmenter, self.volume)

    @property
    def prompted(self) -> list[int]:
        """The slices that were clicked, boxed or drawn, by their number in the volume as it is now."""
        return sorted(self._asked)

    def click(self, point: Any, label: int = 1) -> numpy.ndarray:
        """A click (z, y, x) in the original image, 1 on the object, 0 beside it; its slice's mask.

        The model gets all clicks on that slice, and what it or the propagation answered there before.
        """
        found, kinds = check_points(point, [label], self.volume.original)
        place, at = self._on_slice(found)
        with self._step([place]):
            self._click(place, at, found, int(kinds[0]))
        return self.mask[place]

    def box(self, box: Any) -> None:
        """A box (z1, y1, x1, z2, y2, x2) in the original image: each slice in it is asked for."""
        found = check_box(box, self.volume.original)
        with self._step(self._slices_of(found)):
            self._box(found)

    def ask(
        self, points: Sequence[Any] = (), labels: Sequence[int] | None = None, boxes: Any = ()
    ) -> numpy.ndarray:
        """Put these prompts in the place of all others, of drawings too; the mask, bool.

        Labels are 1 where none are given. The other slices are empty until `propagate`.
        """
        grid, clicks = self.volume.original, []
        if len(points) or labels:
            kinds = [1] * len(points) if labels is None else labels
            found, given = check_points(points, kinds, grid)
            clicks = [(*self._on_slice(p[None]), p[None], int(k)) for p, k in zip(found, given, strict=True)]  # fmt: skip
        around = [check_box(box, grid) for box in boxes]
        with self._step(range(len(self.mask))):
            self.points, self.labels, self.boxes = [], [], []
            self._asked.clear()
            self._low.clear()
            self.mask[:] = False
            for own in around:
                self._box(own)
            for click in clicks:
                self._click(*click)
        return self.mask

    def draw(self, mask: Any) -> None:
        """A mask bool (D, H, W) on the original grid: its slices are taken as they were drawn.

        Propagation starts from them; a click on one corrects what was drawn.
        """
        own = self.volume.forth(check_mask(mask, "mask"))
        drawn = numpy.flatnonzero(own.any((1, 2)))
        if not len(drawn):
            raise DataError(
                "the mask holds no voxel of this volume",
                "draw on a slice of the part that was kept",
            )
        with self._step(map(int, drawn)):
            for place in map(int, drawn):
                self._asked.setdefault(place, _Asked())
                self.mask[place] = own[place]
                self._low[place] = self._as_low(own[place])

    def propagate(self, reach: int | None = None, margin: int = 1) -> numpy.ndarray:
        """Carry the answers to the slices between and beyond the prompted ones; the mask, bool.

        The box of a slice's mask (of its largest connected part), `margin` voxels wider, is the prompt of
        the next one, both ways, until a mask is empty or `reach` slices on. A prompted slice stays as it is; between two of
        them each goes half of the way.
        """
        if not self._asked:
            raise DataError(
                "no slice has a prompt yet", "click((z, y, x)), box(…) or draw(mask) first"
            )
        with self._step(range(len(self.mask))):
            others = [place for place in range(len(self.mask)) if place not in self._asked]
            self.mask[others] = False
            self._low = {place: low for place, low in self._low.items() if place in self._asked}
            for place in self._asked:
                for direction in (-1, 1):
                    self._walk(place, direction, self._reach(place, direction, reach), margin)
        return self.mask

    def on_original(self) -> numpy.ndarray:
        """The mask, bool (D, H, W), on the original grid."""
        return self.volume.back(self.mask)

    def undo(self) -> None:
        """Take back the last click, box, drawing or propagation; nothing where there was none."""
        if self._steps:
            self._restore(self._steps.pop())

    def forget(self) -> None:
        """Take back every prompt; encoded slices stay."""
        self.points, self.labels, self.boxes = [], [], []
        self._steps.clear()
        self._asked.clear()
        self._low.clear()
        self.mask[:] = False

    def _on_slice(self, point: numpy.ndarray) -> tuple[int, tuple[float, float]]:
        """The slice of a point (1, 3) of the original image, and (x, y) there."""
        z, y, x = moved_points(point, self.volume.original, self.volume.grid)[0]
        height, width = self.volume.size[1:]
        if not (-0.5 <= y <= height - 0.5 and -0.5 <= x <= width - 0.5):
            raise DataError(
                f"the click lies at ({z:.1f}, {y:.1f}, {x:.1f}), outside of the part of "
                f"{self.volume.size} voxels that was kept",
                "crop less",
            )
        return self._slice(z), (float(x.clip(0, width - 1)), float(y.clip(0, height - 1)))

    def _click(self, place: int, at: tuple[float, float], point: numpy.ndarray, label: int) -> None:
        self.points.append(Point(*map(float, point[0])))
        self.labels.append(label)
        asked = self._asked.setdefault(place, _Asked())
        asked.points.append(at)
        asked.labels.append(label)
        self._answer(place)

    def _slices_of(self, box: Box) -> range:
        own = moved_box(box, self.volume.original, self.volume.grid)
        first = self._slice(own.z1)
        return range(first, max(self._slice(own.z2 - 1), first) + 1)

    def _box(self, box: Box) -> None:
        """One box for the slices it reaches, in the place of another of the same slices."""
        self.boxes = [kept for kept in self.boxes if kept[::3] != box[::3]] + [box]
        own = moved_box(box, self.volume.original, self.volume.grid)
        for place in self._slices_of(box):
            self._asked.setdefault(place, _Asked()).box = _around(own, self.volume.size)
            self._answer(place)

    @contextmanager
    def _step(self, places: Iterable[int]) -> Iterator[None]:
        """Something done to these slices, which is taken back if it fails, and by `undo`."""
        slices = {
            place: (
                self._asked[place].copy() if place in self._asked else None,
                numpy.packbits(self.mask[place]),
                self._low.get(place),
            )
            for place in places
        }
        before = _Before((list(self.points), list(self.labels), list(self.boxes)), slices)
        try:
            yield
        except BaseException:
            self._restore(before)
            raise
        self._steps.append(before)

    def _restore(self, before: _Before) -> None:
        self.points, self.labels, self.boxes = before.prompts
        shape = self.mask.shape[1:]
        for place, (asked, bits, low) in before.slices.items():
            self.mask[place] = numpy.unpackbits(bits, count=shape[0] * shape[1]).reshape(shape)
            for kept, value in ((self._asked, asked), (self._low, low)):
                if value is None:
                    kept.pop(place, None)
                else:
                    kept[place] = value  # type: ignore[index]

    def _reach(self, place: int, direction: int, reach: int | None) -> int:
        """How many slices a walk may go."""
        others = [abs(z - place) for z in self._asked if (z - place) * direction > 0]
        edge = place if direction < 0 else self.volume.size[0] - 1 - place
        # between two of them the slice in the very middle belongs to the lower one
        room = (min(others) - (direction < 0)) // 2 if others else edge
        return room if reach is None else min(room, reach)

    def _walk(self, place: int, direction: int, count: int, margin: int) -> None:
        for _ in range(count):
            mask = self.mask[place]
            if not mask.any():
                return
            place += direction
            mask = _largest_part(mask)
            rows, columns = numpy.flatnonzero(mask.any(1)), numpy.flatnonzero(mask.any(0))
            box = Box(0, rows[0] - margin, columns[0] - margin, 1, rows[-1] + 1 + margin, columns[-1] + 1 + margin)  # fmt: skip
            self._take(place, box=_around(box, self.volume.size))

    def _answer(self, place: int) -> None:
        asked = self._asked[place]
        self._take(
            place,
            points=asked.points or None,
            labels=asked.labels or None,
            box=asked.box,
            mask=self._low.get(place),
        )

    def _take(self, place: int, **prompt: Any) -> None:
        answer = self.segmenter.predict(self._encoded.of(place), **prompt)
        self.mask[place] = answer.masks[0].cpu().numpy()
        self._low[place] = answer.low[0]

    def _as_low(self, mask: numpy.ndarray) -> Tensor:
        """A drawn slice as the decoder would have answered it: ±10 in the model's padded square."""
        sam, side = self.segmenter, self.segmenter.mask_side
        height, width = (max(1, round(n * side / sam.side)) for n in sam.resized(mask.shape))  # type: ignore[arg-type]
        drawn = torch.from_numpy(20.0 * mask - 10)[None, None].float()
        small = F.interpolate(drawn, (height, width), mode="bilinear", antialias=True)
        return F.pad(small, (0, side - width, 0, side - height), value=-10.0)[0, 0]

    def _slice(self, z: float) -> int:
        return int(numpy.clip(numpy.floor(z + 0.5), 0, self.volume.size[0] - 1))


def _largest_part(mask: numpy.ndarray) -> numpy.ndarray:
    """The largest connected part of a mask: a speck in a corner would make its box the whole slice."""
    from scipy.ndimage import label

    marked, count = label(mask)  # type: ignore[misc]
    return mask if count < 2 else marked == numpy.bincount(marked.ravel())[1:].argmax() + 1


def _around(box: Box, size: tuple[int, int, int]) -> tuple[float, float, float, float]:
    """A box of a volume as (x1, y1, x2, y2) of its slice, at least a pixel wide, within the slice."""
    ends = []
    for low, high, n in ((box.x1, box.x2, size[2]), (box.y1, box.y2, size[1])):
        first, last = max(0.0, low), min(n - 1.0, high - 1)
        if last - first < 1:  # one voxel alone would be a box without an area
            first, last = max(0.0, first - 0.5), min(n - 1.0, last + 0.5)
        ends.append((first, last))
    (x1, x2), (y1, y2) = ends
    return x1, y1, x2, y2
