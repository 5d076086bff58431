"""Labelled images, and k of each class drawn from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from mmadapt.errors import DataError

#: (uint8 images (N, H, W, 3), seed) -> variations of them, of the same shape
Augment = Callable[[numpy.ndarray, int], numpy.ndarray]


@dataclass(frozen=True, eq=False)
class Labelled:
    """Images (PIL, or uint8 arrays (H, W, 3)), int64 labels (N,) and the class names they index."""

    images: Any
    labels: numpy.ndarray
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        return f"Labelled({len(self)} images, {len(self.names)} classes)"

    def take(self, rows: numpy.ndarray) -> Labelled:
        """The images at `rows`, in that order."""
        if isinstance(self.images, numpy.ndarray):
            return Labelled(self.images[rows], self.labels[rows], self.names)
        return Labelled([self.images[int(row)] for row in rows], self.labels[rows], self.names)


def labelled(images: Any, labels: Any, names: Sequence[str]) -> Labelled:
    """Check images, labels and class names against each other, and keep them together.

    Labels are whole numbers from 0 to len(names) − 1. Raises `DataError` for one class only, names
    that repeat, labels out of range, or counts that differ.
    """
    names = tuple(names)
    array = numpy.asarray(labels)
    if array.ndim != 1 or not numpy.issubdtype(array.dtype, numpy.integer):
        raise DataError(
            f"labels are {array.dtype} of shape {array.shape}, expected whole numbers (N,)",
            "labels index class names: 0 for the first",
        )
    if len(images) != len(array):
        raise DataError(f"{len(images)} images but {len(array)} labels")
    if len(array) == 0:
        raise DataError("there are no images")
    check_names(names)
    if array.min() < 0 or array.max() >= len(names):
        raise DataError(
            f"labels run from {array.min()} to {array.max()}, but there are {len(names)} class names",
            f"labels go from 0 to {len(names) - 1}",
        )
    present = numpy.unique(array)
    if len(present) < 2:
        raise DataError(
            f"all {len(array)} images belong to one class, {names[present[0]]!r}",
            "a classifier needs examples of at least two",
        )
    return Labelled(images, array.astype(numpy.int64), names)


def check_names(names: tuple[str, ...]) -> None:
    """At least two class names, all text, none twice."""
    if len(names) < 2 or not all(isinstance(name, str) and name for name in names):
        raise DataError(f"class names are {names!r:.80}, expected at least two texts")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"class names repeat: {', '.join(twice[:4])}", "tell the classes apart")


def sample(
    data: Labelled, shots: int, seed: int = 0, validation: int | None = None
) -> tuple[Labelled, Labelled]:
    """Draw `shots` images of every class, and disjoint ones for validation, without replacement.

    `validation` is per class; by default min(shots, 4), as in CoOp (Zhou et al. 2021). Raises
    `DataError` that lists every class with too few images.
    """
    if not isinstance(shots, int) or isinstance(shots, bool) or shots < 1:
        raise DataError(f"shots is {shots!r}, expected a whole number of at least 1")
    held = min(shots, 4) if validation is None else validation
    if not isinstance(held, int) or held < 0:
        raise DataError(f"validation is {validation!r}, expected a whole number of at least 0")
    counts = numpy.bincount(data.labels, minlength=len(data.names))
    short = [
        f"{name} ({have})"
        for name, have in zip(data.names, counts, strict=True)
        if have < shots + held
    ]
    if short:
        raise DataError(
            f"{shots} shots and {held} for validation need {shots + held} images of every class; too "
            f"few of {', '.join(short[:6])}{' …' if len(short) > 6 else ''}",
            f"the smallest class has {counts.min()} images",
        )
    generator = numpy.random.default_rng(seed)
    chosen, kept = [], []
    for label in range(len(data.names)):
        rows = generator.permutation(numpy.flatnonzero(data.labels == label))
        chosen.append(rows[:shots])
        kept.append(rows[shots : shots + held])
    return data.take(numpy.concatenate(chosen)), data.take(numpy.concatenate(kept))


def vary(data: Labelled, augment: Augment, views: int = 16, seed: int = 0) -> Labelled:
    """The images and `views` − 1 variations of each, view by view; the same ones for a seed."""
    if not isinstance(views, int) or views < 1:
        raise DataError(f"views is {views!r}, expected a whole number of at least 1")
    images = numpy.stack([numpy.asarray(image) for image in data.images])
    stacks = [images]
    for view in range(1, views):
        stacks.append(augment(images, seed * views + view))
        if stacks[-1].shape != images.shape or stacks[-1].dtype != images.dtype:
            raise DataError(
                f"augment turned {images.dtype} {images.shape} into {stacks[-1].dtype} "
                f"{stacks[-1].shape}",
                "it must keep the shape and the dtype",
            )
    return Labelled(numpy.concatenate(stacks), numpy.tile(data.labels, views), data.names)
