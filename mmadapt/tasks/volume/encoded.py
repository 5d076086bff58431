"""The slices of a volume after SAM's encoder, each encoded once."""

from __future__ import annotations

from collections import OrderedDict

import numpy

from mmadapt.errors import DataError
from mmadapt.tasks.segment.inputs import acting_state, input_of
from mmadapt.tasks.segment.model import looks_along_depth
from mmadapt.tasks.segment.segmenter import Encoded, Segmenter
from mmadapt.tasks.volume.volume import Volume

#: encoded slices that are kept for the next click
KEPT = 64
#: slices encoded together for adapters that look along the depth and do not say how many they saw
TOGETHER = 12


class EncodedSlices:
    """Slices along the first axis, encoded when they are asked for; the `KEPT` last are remembered.

    What was encoded before other adapters act, or before they are trained on, is encoded anew. For
    adapters that look along the depth slices are encoded in stacks of as many as they were trained
    with (`segment.set_input(model, depth=…)`, else `TOGETHER`), each stack beginning in the middle of
    the one before, and a slice is taken from the stack in which it has most neighbours.
    """

    def __init__(self, segmenter: Segmenter, volume: Volume) -> None:
        self.segmenter = segmenter
        self.volume = volume
        self._kept: OrderedDict[int, Encoded] = OrderedDict()
        self._by = acting_state(segmenter.model)

    def of(self, place: int) -> Encoded:
        """Slice `place`, encoded."""
        now = acting_state(self.segmenter.model)
        if now != self._by:
            self._kept.clear()
            self._by = now
        if place not in self._kept:
            if looks_along_depth(self.segmenter.model):
                self._encode_stack(place)
            else:
                self._kept[place] = self.segmenter.encode(self._grey(place), grey=True)
        self._kept.move_to_end(place)
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        return self._kept[place]

    def _encode_stack(self, place: int) -> None:
        """Encode the stack of `place`, and remember the slices that belong to that stack."""
        depth = self.volume.size[0]
        length = min(depth, input_of(self.segmenter.model).depth or TOGETHER)
        start = _stack_of(place, depth, length)
        slices = numpy.stack([self._grey(z) for z in range(start, start + length)])
        stack = self.segmenter.encode_stack(slices, grey=True)
        for z, own in enumerate(stack.embedding.split(1), start):
            if _stack_of(z, depth, length) == start:
                self._kept[z] = Encoded(own, stack.size, stack.resized)

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


def _stack_of(place: int, depth: int, length: int) -> int:
    """Where the stack of `length` slices begins in which slice `place` is nearest to the middle."""
    starts = [*range(0, depth - length, max(1, length // 2)), depth - length]
    return min(starts, key=lambda start: abs(start + (length - 1) / 2 - place))
