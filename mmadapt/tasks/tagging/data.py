"""Clips with their tags, and some of each class drawn from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from mmadapt.errors import DataError
from mmadapt.tasks.audio.clip import Audio


@dataclass(frozen=True, eq=False)
class Tagged:
    """Clips, what they hold, and the class names.

    `labels` are int64 (N,), one class a clip, or bool (N, K), any number of classes a clip.
    `tagged` makes and checks one.
    """

    clips: tuple[Audio, ...]
    labels: numpy.ndarray
    names: tuple[str, ...]

    @property
    def several(self) -> bool:
        """Whether a clip may have several tags, or none."""
        return self.labels.ndim == 2

    @property
    def truth(self) -> numpy.ndarray:
        """What every clip holds, bool (N, K)."""
        if self.several:
            return self.labels
        return numpy.arange(len(self.names)) == self.labels[:, None]

    def __len__(self) -> int:
        return len(self.clips)

    def __repr__(self) -> str:
        kind = "tags" if self.several else "classes"
        seconds = sum(clip.seconds for clip in self.clips)
        return f"Tagged({len(self)} clips, {seconds:.0f} s, {len(self.names)} {kind})"

    def take(self, rows: Any) -> Tagged:
        """The clips at `rows`, in that order."""
        rows = numpy.asarray(rows)
        return Tagged(tuple(self.clips[int(row)] for row in rows), self.labels[rows], self.names)

    def sample(self, shots: int, seed: int = 0) -> Tagged:
        """`shots` clips of every class, drawn without replacement; of one-class clips only."""
        if self.several:
            raise DataError(
                "clips with several tags cannot be drawn class by class",
                "data.take(rows) takes any",
            )
        if not isinstance(shots, int) or isinstance(shots, bool) or shots < 1:
            raise DataError(f"shots is {shots!r}, expected a whole number of at least 1")
        counts = numpy.bincount(self.labels, minlength=len(self.names))
        short = [f"{n} ({c})" for n, c in zip(self.names, counts, strict=True) if c < shots]
        if short:
            raise DataError(
                f"{shots} shots need as many clips of every class; too few of {', '.join(short[:6])}",
                f"the smallest class has {counts.min()} clips",
            )
        draw = numpy.random.default_rng(seed)
        rows = [
            draw.permutation(numpy.flatnonzero(self.labels == label))[:shots]
            for label in range(len(self.names))
        ]
        return self.take(numpy.concatenate(rows))


def tagged(clips: Sequence[Audio], labels: Any, names: Sequence[str]) -> Tagged:
    """Check clips, labels and class names against each other, and keep them together.

    Labels are whole numbers (N,) from 0, one class a clip; or bools, or zeros and ones, (N, K), any
    number of classes a clip. Raises `DataError` that names the first clip at fault.
    """
    clips, names = tuple(clips), tuple(names)
    array = numpy.asarray(labels)
    if not clips:
        raise DataError("there are no clips")
    for place, clip in enumerate(clips):
        if not isinstance(clip, Audio):
            raise DataError(
                f"clip {place} is a {type(clip).__name__}, expected Audio",
                "audio.Audio.of(samples, rate) or audio.load_audio(path)",
            )
    if len(names) < 2 or not all(isinstance(name, str) and name for name in names):
        raise DataError(f"class names are {names!r:.80}, expected at least two texts")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"class names repeat: {', '.join(twice[:4])}", "tell the classes apart")
    if array.ndim not in (1, 2) or len(array) != len(clips):
        raise DataError(
            f"{len(clips)} clips, and labels of shape {array.shape}; expected ({len(clips)},) or "
            f"({len(clips)}, {len(names)})"
        )
    check = _check_several if array.ndim == 2 else _check_single
    return Tagged(clips, check(array, names), names)


def _check_single(array: numpy.ndarray, names: tuple[str, ...]) -> numpy.ndarray:
    if not numpy.issubdtype(array.dtype, numpy.integer):
        raise DataError(
            f"labels are {array.dtype}, expected whole numbers that index the class names",
            "[names.index(label) for label in labels]",
        )
    wrong = numpy.flatnonzero((array < 0) | (array >= len(names)))
    if len(wrong):
        raise DataError(
            f"clip {wrong[0]} has the label {array[wrong[0]]}, and there are {len(names)} class names",
            f"labels go from 0 to {len(names) - 1}",
        )
    return array.astype(numpy.int64)


def _check_several(array: numpy.ndarray, names: tuple[str, ...]) -> numpy.ndarray:
    if array.shape[1] != len(names):
        raise DataError(f"labels have {array.shape[1]} columns, and there are {len(names)} names")
    if array.dtype.kind not in "biuf" or not numpy.isin(array, (0, 1)).all():
        raise DataError(
            f"labels of several tags are {array.dtype}, expected a column a class of yes or no",
            "soft labels can be learned through a loss of your own",
        )
    return array.astype(bool)
