"""An image that is clicked: its picture, and prompts between the picture and the study."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy

from mmadapt.tasks.segment import ImageSegmenter, overlay
from mmadapt.tasks.segment.intensity import intensity_range
from mmadapt.tasks.segment.numbers import Numbers

#: pixels of a picture's longer side that are shown; every second, third … of a larger one
SHOWN = 1024


class ImageScene:
    """One picture. A place on it is (x, y) in its own pixels, whole numbers their middles."""

    planes = 1
    unit = "pixel"

    def __init__(self, study: ImageSegmenter) -> None:
        self.study = study
        self.limits = study.numbers.limits
        self.step = -(-max(study.size) // SHOWN)

    @property
    def model(self) -> Any:
        """The SAM, or None where a function answers."""
        return None if self.study.segmenter is None else self.study.segmenter.model

    def describe(self) -> str:
        """What is shown, in a few words."""
        height, width = self.study.size
        kind = "grey" if self.study.numbers.grey else "colour"
        return f"{kind} image {width} × {height}"

    @property
    def range(self) -> tuple[float, float] | None:
        """Between which values a window can lie; None for colours."""
        return ends(self.study.numbers.values) if self.study.numbers.grey else None

    def picture(self, plane: int) -> numpy.ndarray:
        """uint8 (h, w) or (h, w, 3)."""
        numbers, step = self.study.numbers, self.step
        return Numbers(numbers.values[::step, ::step], numbers.limits).bytes(self.limits)

    def mask(self, plane: int) -> numpy.ndarray:
        """bool (h, w)."""
        return self.study.mask[:: self.step, :: self.step]

    def show(self, plane: int) -> dict[str, Any]:
        """Title, letters, slice and its count, a pixel's width and height, points and boxes."""
        return {
            "title": "",
            "letters": ["", "", "", ""],
            "slice": 0,
            "slices": 1,
            "spacing": [1.0, 1.0],
            "points": [
                [*self._shown(point), label]
                for point, label in zip(self.study.points, self.study.labels, strict=True)
            ],
            "boxes": [[*self._shown(box[:2]), *self._shown(box[2:])] for box in self.study.boxes],
        }

    def click(self, plane: int, x: float, y: float, label: int) -> None:
        """A click on the picture."""
        self.study.click(self._own(x, y), label)

    def box(self, plane: int, one: Sequence[float], other: Sequence[float]) -> None:
        """A box between two corners."""
        (x1, x2), (y1, y2) = map(sorted, zip(self._own(*one), self._own(*other), strict=True))
        self.study.set_box((x1, y1, x2, y2))

    def click_at(self, place: Sequence[float], label: int) -> None:
        """A click (x, y) in the image's own pixels."""
        self.study.click(place, label)

    def ask(self, points: Any, labels: Any, boxes: Any) -> None:
        """Put these prompts in the place of all others."""
        self.study.ask(points, labels, boxes)

    def draw(self, mask: Any) -> None:
        """A mask bool (H, W) in the place of the answer."""
        self.study.draw(mask)

    def look(self, limits: Any) -> None:
        """Another window for the eyes."""
        self.limits = intensity_range(None, *limits)

    def again(self) -> None:
        """The same prompts once more: the adapter was switched."""
        self.study.again()

    def figure(self) -> Any:
        """A matplotlib figure of the image, the mask and the prompts."""
        study = self.study
        picture = study.numbers.bytes(self.limits)
        mask = study.mask if study.mask.any() else None
        box = study.boxes[0] if study.boxes else None
        points = (study.points, study.labels) if study.points else (None, None)
        return overlay(picture, mask, *points, box)

    def _shown(self, place: Sequence[float]) -> list[float]:
        return [(value + 0.5) / self.step - 0.5 for value in place]

    def _own(self, x: float, y: float) -> tuple[float, float]:
        return (x + 0.5) * self.step - 0.5, (y + 0.5) * self.step - 0.5


def ends(values: numpy.ndarray) -> tuple[float, float]:
    """The smallest and the largest value, apart where there is but one."""
    low, high = float(values.min()), float(values.max())
    return low, high if low < high else low + 1.0
