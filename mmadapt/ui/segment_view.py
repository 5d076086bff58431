"""The view of a study that is clicked: its state, its buttons, and the pictures below them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy

from mmadapt.core.attach import disabled
from mmadapt.core.bank import bank_of
from mmadapt.errors import DataError
from mmadapt.tasks.volume import SliceSegmenter
from mmadapt.ui.base import View, ipywidgets
from mmadapt.ui.image_scene import ImageScene
from mmadapt.ui.segment_bar import Bar
from mmadapt.ui.segment_canvas import Canvas, has_anywidget
from mmadapt.ui.segment_sliders import Sliders
from mmadapt.ui.volume_scene import VolumeScene


class SegmentView(View):
    """What `mm.ui.segment` gives. `study` does the work and can be used on its own."""

    def __init__(self, scene: ImageScene | VolumeScene) -> None:
        super().__init__()
        self.scene = scene
        self.negative = False  # whether clicks in the page are negative, beside the object
        self._adapted = True
        self._parts: list[Any] = []  # of the widget, with `refresh`

    @property
    def study(self) -> Any:
        """The `ImageSegmenter`, `SliceSegmenter` or `VolumeSegmenter` that is shown."""
        return self.scene.study

    # -- state ------------------------------------------------------------------------------------

    @property
    def points(self) -> list[tuple[float, ...]]:
        """Clicks: (x, y) in an image, (z, y, x) in a volume's original image.

        Assigned ones get the labels there are if they are as many, else 1.
        """
        return [tuple(point) for point in self.study.points]

    @points.setter
    def points(self, points: Any) -> None:
        labels = self.labels if len(self.labels) == len(points) else None
        self._ask(points, labels, self.boxes)

    @property
    def labels(self) -> list[int]:
        """1 for a click on the object, 0 for one beside it."""
        return list(self.study.labels)

    @labels.setter
    def labels(self, labels: Any) -> None:
        self._ask(self.points, list(labels), self.boxes)

    @property
    def boxes(self) -> list[tuple[float, ...]]:
        """Boxes: (x1, y1, x2, y2), at most one of an image; (z1, y1, x1, z2, y2, x2) of a volume."""
        return [tuple(box) for box in getattr(self.study, "boxes", ())]

    @boxes.setter
    def boxes(self, boxes: Any) -> None:
        self._ask(self.points, self.labels, boxes)

    @property
    def mask(self) -> numpy.ndarray:
        """bool (H, W) or (D, H, W), of a volume on the grid that is shown. Assigned, it is corrected by
        the next click in a volume, and replaced by it in an image."""
        return self.study.mask

    @mask.setter
    def mask(self, mask: Any) -> None:
        self.change(lambda: self.scene.draw(mask))

    @property
    def masks(self) -> numpy.ndarray:
        """Every candidate, bool (K, …)."""
        return self.study.masks if hasattr(self.study, "masks") else self.mask[None]

    @property
    def scores(self) -> list[float]:
        """The overlap the model expects of each candidate, where it says."""
        return list(getattr(self.study, "scores", ()))

    @property
    def score(self) -> float | None:
        """The overlap the model expects of the mask, where it says."""
        return getattr(self.study, "score", None)

    @property
    def candidate(self) -> int:
        """Which of the candidates is the mask."""
        return getattr(self.study, "candidate", 0)

    @candidate.setter
    def candidate(self, place: int) -> None:
        def choose() -> None:
            if not isinstance(self.scene, ImageScene):
                raise DataError("a study of a volume has one answer, no candidates")
            self.scene.study.candidate = place

        self.change(choose)

    @property
    def at(self) -> tuple[int, int, int]:
        """The voxel (z, y, x) through which the planes of a volume are shown."""
        return self._volume("at").at

    @at.setter
    def at(self, at: Any) -> None:
        scene = self._volume("at")
        self.change(lambda: scene.move(at))

    @property
    def window(self) -> tuple[float, float]:
        """The values that are drawn black and white; the model's stay as they are."""
        return self.scene.limits

    @window.setter
    def window(self, limits: Any) -> None:
        self.change(lambda: self.scene.look(limits))

    @property
    def adapted(self) -> bool:
        """Whether attached adapters act; assigning asks the same again with or without them."""
        return self._adapted

    @adapted.setter
    def adapted(self, adapted: bool) -> None:
        before, self._adapted = self._adapted, bool(adapted)
        try:
            self.change(self.scene.again)
        except BaseException:
            self._adapted = before
            raise

    def undo(self) -> None:
        """Take back the last click, box or drawing."""
        self.change(self.study.undo)

    def clear(self) -> None:
        """Take back every prompt; `undo` brings them back."""
        self.change(self.study.ask)

    def propagate(self) -> None:
        """Carry the mask of the prompted slices to the others (`SliceSegmenter.propagate`)."""
        if not isinstance(self.study, SliceSegmenter):
            raise DataError("only a SliceSegmenter propagates from slice to slice")
        self.change(self.study.propagate)

    def _ask(self, points: Any, labels: Any, boxes: Any) -> None:
        self.change(lambda: self.scene.ask(points, labels, boxes))

    def change(self, step: Callable[[], Any]) -> None:
        """One step of the study, with or without its adapters; then what is shown is drawn anew."""
        with self._lock:
            model = self.scene.model
            off = not self._adapted and self.attached
            with disabled(model) if off else contextlib.nullcontext():
                step()
            for part in self._parts:
                part.refresh()
        self.changed()

    @property
    def attached(self) -> bool:
        """Whether the model has adapters that can be switched off."""
        bank = None if self.scene.model is None else bank_of(self.scene.model)
        return bank is not None and bool(bank.records)

    def _volume(self, word: str) -> VolumeScene:
        if isinstance(self.scene, VolumeScene):
            return self.scene
        raise DataError(f"an image has no {word!r}", "it is shown as a whole")

    # -- what is shown ----------------------------------------------------------------------------

    def figure(self) -> Any:
        """Picture, mask and prompts as a matplotlib figure."""
        return self.scene.figure()

    def _text(self) -> str:
        return f"segment: {self.scene.describe()}, {self.status()}"

    def status(self) -> str:
        """What was asked and answered, in a line."""
        words = [_count(len(self.points), "click")]
        if self.boxes:
            words.append(_count(len(self.boxes), "box", "boxes"))
        words.append(_count(int(numpy.count_nonzero(self.mask)), self.scene.unit))
        if self.score is not None:
            words.append(f"expected overlap {self.score:.2f}")
        if self.attached and not self._adapted:
            words.append("adapters off")
        return ", ".join(words)

    def _build(self) -> Any:
        bar = Bar(self)
        body = Canvas(self) if has_anywidget() else Sliders(self)
        self._parts = [bar, body]
        for part in self._parts:
            part.refresh()
        return ipywidgets().VBox([bar.widget, body.widget])

    def close(self) -> None:
        super().close()
        self._parts = []


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"
