"""Slice by slice with SAM: prompt one slice, propagate to its neighbours, correct by more clicks."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.nn import functional as F

from mmadapt.errors import DataError
from mmadapt.tasks.segment.inputs import acting, input_of
from mmadapt.tasks.segment.model import looks_along_depth
from mmadapt.tasks.segment.segmenter import Encoded, Segmenter
from mmadapt.tasks.volume.prompts import (
    Box,
    check_box,
    check_mask,
    check_points,
    moved_box,
    moved_points,
)
from mmadapt.tasks.volume.trained import as_trained
from mmadapt.tasks.volume.volume import Volume

#: encoded slices that are kept for the next click
KEPT = 64
#: slices encoded together for adapters that look along the depth and do not say how many they saw
TOGETHER = 12


@dataclass
class _Asked:
    """What was asked about one slice: points (x, y), their labels and a box (x1, y1, x2, y2)."""

    points: list[tuple[float, float]] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    box: tuple[float, float, float, float] | None = None


class SliceSegmenter:
    """One object of a volume, along its first axis.

        ct = read_nifti("ct.nii.gz").window("ct abdomen")
        study = SliceSegmenter(model, ct)
        study.click((40, 120, 96))              # (z, y, x) in the original image
        study.propagate()                       # both ways, until the object ends
        study.click((44, 130, 90), label=0)     # beside it: this slice is corrected
        study.propagate()                       # and its neighbours follow
        save_mask("liver.nii.gz", study.mask, ct)

    A slice is encoded once, the `KEPT` last ones are remembered. For adapters that look along the
    depth slices are encoded in stacks of as many as they were trained with (`segment.set_input(model,
    depth=…)`, else `TOGETHER`), each stack beginning in the middle of the one before, and a slice is
    taken from the stack in which it has most neighbours. The volume has one channel of 0 to 1, as
    `Volume.window` gives, or the scanner's values where the adapters say what window they were trained
    with. Slices along another axis: `volume.oriented("SAR")` and the like.
    """

    def __init__(self, model: Any, volume: Volume) -> None:
        self.segmenter = model if isinstance(model, Segmenter) else Segmenter(model)
        self.volume = as_trained(self.segmenter.model, volume)
        if len(volume.array) != 1:
            raise DataError(f"{volume.name} has {len(volume.array)} channels, expected one")
        self.mask = numpy.zeros(volume.size, bool)
        self._asked: dict[int, _Asked] = {}
        self._low: dict[int, Tensor] = {}
        self._encoded: OrderedDict[int, Encoded] = OrderedDict()
        self._by = acting(self.segmenter.model)  # the adapters that encoded them

    @property
    def prompted(self) -> list[int]:
        """The slices that were clicked, boxed or drawn, by their number in the volume as it is now."""
        return sorted(self._asked)

    def click(self, point: Any, label: int = 1) -> numpy.ndarray:
        """A click (z, y, x) in the original image, 1 on the object, 0 beside it; its slice's mask.

        The model gets all clicks on that slice, and what it or the propagation answered there before.
        """
        found, kinds = check_points(point, [label], self.volume.original)
        z, y, x = moved_points(found, self.volume.original, self.volume.grid)[0]
        place = self._slice(z)
        height, width = self.volume.size[1:]
        if not (-0.5 <= y <= height - 0.5 and -0.5 <= x <= width - 0.5):
            raise DataError(
                f"the click lies at ({z:.1f}, {y:.1f}, {x:.1f}), outside of the part of "
                f"{self.volume.size} voxels that was kept",
                "crop less",
            )
        asked = self._asked.setdefault(place, _Asked())
        asked.points.append((float(x.clip(0, width - 1)), float(y.clip(0, height - 1))))
        asked.labels.append(int(kinds[0]))
        return self._answer(place)

    def box(self, box: Any) -> None:
        """A box (z1, y1, x1, z2, y2, x2) in the original image: each slice in it is asked for."""
        own = moved_box(
            check_box(box, self.volume.original), self.volume.original, self.volume.grid
        )
        around = _around(own, self.volume.size)
        for place in range(
            self._slice(own.z1), max(self._slice(own.z2 - 1), self._slice(own.z1)) + 1
        ):
            self._asked.setdefault(place, _Asked()).box = around
            self._answer(place)

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
        kept = {place: self.mask[place].copy() for place in self._asked}
        self.mask[:] = False
        self._low = {place: low for place, low in self._low.items() if place in kept}
        for place, own in kept.items():
            self.mask[place] = own
        for place in kept:
            for direction in (-1, 1):
                self._walk(place, direction, self._reach(place, direction, reach), margin)
        return self.mask

    def on_original(self) -> numpy.ndarray:
        """The mask, bool (D, H, W), on the original grid."""
        return self.volume.back(self.mask)

    def forget(self) -> None:
        """Take back every prompt; encoded slices stay."""
        self._asked.clear()
        self._low.clear()
        self.mask[:] = False

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

    def _answer(self, place: int) -> numpy.ndarray:
        asked = self._asked[place]
        self._take(
            place,
            points=asked.points or None,
            labels=asked.labels or None,
            box=asked.box,
            mask=self._low.get(place),
        )
        return self.mask[place]

    def _take(self, place: int, **prompt: Any) -> None:
        answer = self.segmenter.predict(self._encode(place), **prompt)
        self.mask[place] = answer.masks[0].cpu().numpy()
        self._low[place] = answer.low[0]

    def _as_low(self, mask: numpy.ndarray) -> Tensor:
        """A drawn slice as the decoder would have answered it: ±10 in the model's padded square."""
        sam, side = self.segmenter, self.segmenter.mask_side
        height, width = (max(1, round(n * side / sam.side)) for n in sam.resized(mask.shape))  # type: ignore[arg-type]
        drawn = torch.from_numpy(20.0 * mask - 10)[None, None].float()
        small = F.interpolate(drawn, (height, width), mode="bilinear", antialias=True)
        return F.pad(small, (0, side - width, 0, side - height), value=-10.0)[0, 0]

    def _encode(self, place: int) -> Encoded:
        now = acting(self.segmenter.model)
        if now != self._by:  # switched since: what others encoded means nothing to these
            self._encoded.clear()
            self._by = now
        if place not in self._encoded:
            if looks_along_depth(self.segmenter.model):
                self._encode_stack(place)
            else:
                self._encoded[place] = self.segmenter.encode(self._grey(place), grey=True)
        self._encoded.move_to_end(place)
        while len(self._encoded) > KEPT:
            self._encoded.popitem(last=False)
        return self._encoded[place]

    def _encode_stack(self, place: int) -> None:
        """Encode the stack of `place`, and remember the slices that belong to that stack."""
        depth = self.volume.size[0]
        length = min(depth, input_of(self.segmenter.model).depth or TOGETHER)
        start = _stack_of(place, depth, length)
        slices = numpy.stack([self._grey(z) for z in range(start, start + length)])
        stack = self.segmenter.encode_stack(slices, grey=True)
        for z, own in enumerate(stack.embedding.split(1), start):
            if _stack_of(z, depth, length) == start:
                self._encoded[z] = Encoded(own, stack.size, stack.resized)

    def _grey(self, place: int) -> numpy.ndarray:
        values = numpy.asarray(self.volume.array[0, place])
        if values.min() < 0 or values.max() > 1:
            raise DataError(
                f"{self.volume.name} holds values from {values.min():g} to {values.max():g} in "
                f"slice {place}, expected 0 to 1",
                'bring a range of values there first: volume.window("ct abdomen"), "mr", or two '
                "numbers",
            )
        return numpy.rint(values * 255).astype(numpy.uint8)

    def _slice(self, z: float) -> int:
        return int(numpy.clip(numpy.floor(z + 0.5), 0, self.volume.size[0] - 1))


def _largest_part(mask: numpy.ndarray) -> numpy.ndarray:
    """The largest connected part of a mask: a speck in a corner would make its box the whole slice."""
    from scipy.ndimage import label

    marked, count = label(mask)  # type: ignore[misc]
    return mask if count < 2 else marked == numpy.bincount(marked.ravel())[1:].argmax() + 1


def _stack_of(place: int, depth: int, length: int) -> int:
    """Where the stack of `length` slices begins in which slice `place` is nearest to the middle."""
    starts = [*range(0, depth - length, max(1, length // 2)), depth - length]
    return min(starts, key=lambda start: abs(start + (length - 1) / 2 - place))


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
