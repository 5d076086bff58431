"""A study of one image: click, draw a box, choose among answers, take back."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
from torch import nn

from mmadapt.core.backbone import Backbone
from mmadapt.errors import BackboneError, DataError
from mmadapt.tasks.segment.inputs import acting_state, input_of, same_window
from mmadapt.tasks.segment.numbers import numbers_of
from mmadapt.tasks.segment.prompts import check_prompts
from mmadapt.tasks.segment.segmenter import Encoded, Masks, Segmenter

#: steps that can be taken back
STEPS = 50

Point = tuple[float, float]
Box = tuple[float, float, float, float]


@dataclass(frozen=True, eq=False)
class _State:
    """What was asked, and the answer: masks bool (K, H, W), what the model expects of each, the choice."""

    points: tuple[Point, ...] = ()
    labels: tuple[int, ...] = ()
    boxes: tuple[Box, ...] = ()
    masks: numpy.ndarray | None = None
    scores: tuple[float, ...] = ()
    candidate: int = 0


class ImageSegmenter:
    """One object of an image.

        study = segment.ImageSegmenter(sam, image)
        study.click((120, 80))                      # (x, y), on the object
        study.click((30, 40), label=0)              # beside it
        study.set_box((20, 20, 200, 160))           # (x1, y1, x2, y2)
        study.undo()
        study.mask, study.score

    The model is a SAM, a `Segmenter`, or a function `predict(points, labels, box)` of lists and a box or
    None that gives a mask (H, W), or masks (K, H, W) and their K scores. A SAM encodes the image once
    and answers a single click with three candidates, of which `candidate` is chosen, at first the one it
    expects most of; after that with one. The answer depends on the prompts alone, so that
    `Segmenter.predict` gives the same.

    The image is of any type of numbers (`numbers_of`); `window` says which values become black and white
    for the model, unless its active adapters say what they were trained with. A step that is refused, or
    in which the model raises, changes nothing.
    """

    def __init__(
        self, model: Any, image: Any, window: str | tuple[float, float] | None = None
    ) -> None:
        self.segmenter, self._function = _predictor(model)
        trained = None if self.segmenter is None else input_of(self.segmenter.model).window
        self.numbers = numbers_of(image)
        grey = self.numbers.grey and self.numbers.values.dtype != numpy.uint8
        if trained is not None and grey:  # bytes are taken as windowed already
            if window is not None and not same_window(window, trained):
                raise DataError(
                    f"the window {window!r} was given, the active adapter was trained with {trained!r}",
                    "leave it out: the adapter's own window is applied",
                )
            window = trained
        if window is not None:
            self.numbers = numbers_of(self.numbers.values, window)
        self._state = _State()
        self._steps: deque[_State] = deque(maxlen=STEPS)
        self._encoded: tuple[Any, Encoded] | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        height, width = self.numbers.values.shape[:2]
        return height, width

    @property
    def points(self) -> list[Point]:
        """Clicks (x, y) in pixels."""
        return list(self._state.points)

    @property
    def labels(self) -> list[int]:
        """1 for a click on the object, 0 for one beside it."""
        return list(self._state.labels)

    @property
    def boxes(self) -> list[Box]:
        """The box (x1, y1, x2, y2), if there is one."""
        return list(self._state.boxes)

    @property
    def masks(self) -> numpy.ndarray:
        """Every answer, bool (K, H, W); K is 0 before the first prompt."""
        found = self._state.masks
        return numpy.zeros((0, *self.size), bool) if found is None else found

    @property
    def scores(self) -> list[float]:
        """The overlap the model expects of each answer."""
        return list(self._state.scores)

    @property
    def mask(self) -> numpy.ndarray:
        """The chosen answer, bool (H, W); empty before the first prompt."""
        masks = self.masks
        return masks[self.candidate] if len(masks) else numpy.zeros(self.size, bool)

    @property
    def score(self) -> float | None:
        """The overlap the model expects of the chosen answer, if it says."""
        return self._state.scores[self.candidate] if self._state.scores else None

    @property
    def candidate(self) -> int:
        """Which answer is chosen; assigning chooses another."""
        return self._state.candidate

    @candidate.setter
    def candidate(self, place: int) -> None:
        count = len(self.masks)
        if place not in range(count):
            raise DataError(f"candidate {place!r} was asked for, and there are {count}, from 0")
        state = self._state
        self._state = _State(
            state.points, state.labels, state.boxes, state.masks, state.scores, int(place)
        )

    def ask(
        self, points: Sequence[Any] = (), labels: Sequence[int] | None = None, boxes: Any = ()
    ) -> numpy.ndarray:
        """Put these prompts in the place of all others; the mask.

        Labels are 1 where none are given. Without any prompt the mask is empty.
        """
        kinds = [1] * len(points) if labels is None else list(labels)
        around = list(boxes)
        if len(around) > 1:
            raise DataError(
                f"there are {len(around)} boxes, and SAM takes one for an object",
                "one box an object: segment each on its own",
            )
        answer = _State()
        if len(points) or around or kinds:
            box = around[0] if around else None
            given = check_prompts(self.size, points if len(points) else None, kinds or None, box)
            at = (
                () if given.points is None else tuple((float(x), float(y)) for x, y in given.points)
            )
            words = () if given.labels is None else tuple(int(label) for label in given.labels)
            corner: Any = None if given.box is None else tuple(map(float, given.box))
            masks, scores = self._answer(at, words, corner)
            best = int(numpy.argmax(scores)) if scores else 0
            corners = () if corner is None else (corner,)
            answer = _State(at, words, corners, masks, scores, best)
        self._steps.append(self._state)
        self._state = answer
        return self.mask

    def click(self, point: Any, label: int = 1) -> numpy.ndarray:
        """A click (x, y), 1 on the object, 0 beside it; the mask."""
        return self.ask([*self.points, point], [*self.labels, label], self.boxes)

    def set_box(self, box: Any) -> numpy.ndarray:
        """A box (x1, y1, x2, y2) in the place of an earlier one; the mask."""
        return self.ask(self.points, self.labels, [box])

    def draw(self, mask: Any) -> None:
        """A mask (H, W) of 0 and 1 in the place of the answer, until the next prompt."""
        masks, _ = _checked(mask, self.size)
        if len(masks) != 1:
            raise DataError(f"there are {len(masks)} masks, expected one (H, W)")
        state = self._state
        self._steps.append(state)
        self._state = _State(state.points, state.labels, state.boxes, masks)

    def again(self) -> numpy.ndarray:
        """The same prompts once more, as the model is now; the mask."""
        self.ask(self.points, self.labels, self.boxes)
        self._steps.pop()
        return self.mask

    def undo(self) -> None:
        """Take back the last click or box; nothing where there was none."""
        if self._steps:
            self._state = self._steps.pop()

    def forget(self) -> None:
        """Take back every prompt."""
        self._state = _State()
        self._steps.clear()

    def _answer(
        self, points: tuple[Point, ...], labels: tuple[int, ...], box: Box | None
    ) -> tuple[numpy.ndarray, tuple[float, ...]]:
        if self._function is not None:
            return _checked(self._function(list(points), list(labels), box), self.size)
        sam = self.segmenter
        assert sam is not None
        now = acting_state(sam.model)
        if self._encoded is None or self._encoded[0] != now:  # switched or trained since
            self._encoded = now, sam.encode(self.numbers.bytes(), grey=True)
        one = len(points) == 1 and box is None
        given = (points, labels) if points else (None, None)
        return _checked(
            sam.predict(self._encoded[1], *given, box, several=one),
            self.size,
        )


def _predictor(model: Any) -> tuple[Segmenter | None, Callable[..., Any] | None]:
    """A segmenter, or a function in its place."""
    if isinstance(model, Segmenter):
        return model, None
    if isinstance(model, (nn.Module, Backbone)):
        return Segmenter(model), None
    if callable(model):
        return None, model
    raise BackboneError(
        f"a {type(model).__name__} answers no clicks",
        "give a SAM, a segment.Segmenter, or a function predict(points, labels, box)",
    )


def _checked(answer: Any, size: tuple[int, int]) -> tuple[numpy.ndarray, tuple[float, ...]]:
    """Masks (K, H, W) and their scores, or a `DataError` that says what came instead."""
    scores: Any = ()
    if isinstance(answer, Masks):
        answer, scores = answer.masks, answer.overlaps
    elif isinstance(answer, tuple) and len(answer) == 2:
        answer, scores = answer
    masks, given = _plain(answer), _plain(scores).astype(float).reshape(-1)
    masks = masks[None] if masks.ndim == 2 else masks
    if masks.ndim != 3 or masks.shape[1:] != size or not len(masks):
        raise DataError(
            f"the answer is {masks.shape} for an image {size}, expected a mask (H, W), or masks "
            "(K, H, W) and K scores",
            "give the mask in the image's own pixels",
        )
    if masks.dtype != bool and not numpy.isin(masks, (0, 1)).all():
        raise DataError(
            f"the masks hold values from {masks.min():g} to {masks.max():g}, expected 0 and 1",
            "logits > 0 is a mask",
        )
    if len(given) not in (0, len(masks)):
        raise DataError(f"there are {len(masks)} masks and {len(given)} scores")
    return masks.astype(bool), tuple(given.tolist())


def _plain(values: Any) -> numpy.ndarray:
    return numpy.asarray(values.detach().cpu() if hasattr(values, "detach") else values)
