"""How well the tags of many clips fit, as values with a rich and a plain form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy

from mmadapt.core.table import Table
from mmadapt.errors import DataError
from mmadapt.tasks.few_shot.score import Score
from mmadapt.tasks.tagging import metrics
from mmadapt.tasks.tagging.data import Tagged
from mmadapt.tasks.tagging.tagger import Tagger


@dataclass(frozen=True, eq=False)
class Scores:
    """Probabilities of clips (N, K) against the truth, bool (N, K).

    Mean average precision is the mean over classes, each counted alike; a class of which no clip is
    there has none and is left out, and `absent` names it. Averages over classes of recall and F1
    leave it out too. Where a clip may have `several` tags, an answer is what is more likely than
    `threshold`, and accuracy the share of clips whose tags are all right.
    """

    names: tuple[str, ...]
    truth: numpy.ndarray
    probabilities: numpy.ndarray
    several: bool = False
    threshold: float = 0.5

    def __post_init__(self) -> None:
        shape = (len(self.truth), len(self.names))
        if self.truth.shape != shape or self.probabilities.shape != shape or not shape[0]:
            raise DataError(
                f"truth {self.truth.shape}, probabilities {self.probabilities.shape} and "
                f"{len(self.names)} names, expected (N, K), (N, K) and K, and a clip or more"
            )
        bad = ~numpy.isfinite(self.probabilities).all(1)
        if bad.any():
            raise DataError(
                f"the probabilities of {bad.sum()} clips are not finite, first those of clip "
                f"{int(bad.argmax())}"
            )
        if not self.several and not (self.truth.sum(1) == 1).all():
            raise DataError(
                "a clip has several tags, or none", "Scores(…, several=True), or tags of one class"
            )

    def __len__(self) -> int:
        return len(self.truth)

    @property
    def answers(self) -> numpy.ndarray:
        """What is said of every clip, bool (N, K)."""
        if self.several:
            return self.probabilities > self.threshold
        return numpy.arange(len(self.names)) == self.probabilities.argmax(1)[:, None]

    @property
    def score(self) -> Score:
        """Clips that are answered rightly, with the interval that their number allows."""
        return Score(int((self.answers == self.truth).all(1).sum()), len(self))

    @property
    def accuracy(self) -> float:
        """The share of them, in [0, 1]."""
        return self.score.accuracy

    @property
    def average_precisions(self) -> numpy.ndarray:
        """Of every class (K,); NaN where it has no clip."""
        return metrics.average_precisions(self.truth, self.probabilities)

    @property
    def mean_average_precision(self) -> float:
        """Their mean, every class alike, those without a clip left out."""
        return metrics.mean_over_classes(self.average_precisions)

    @property
    def f1(self) -> float:
        """The mean over classes of each one's F1."""
        return metrics.mean_over_classes(metrics.precision_recall(self.truth, self.answers)[2])

    @property
    def absent(self) -> tuple[str, ...]:
        """Classes of which there is no clip."""
        clips = self.truth.sum(0).tolist()
        return tuple(name for name, count in zip(self.names, clips, strict=True) if not count)

    @property
    def confusion(self) -> numpy.ndarray:
        """How often each class was taken for each, int64 (K, K): rows are the truth."""
        if self.several:
            raise DataError(
                "clips with several tags have no confusion matrix, since no answer stands for one tag",
                "scores.by_class has precision and recall of every tag",
            )
        truth, answer = self.truth.argmax(1), self.probabilities.argmax(1)
        return metrics.confusion(truth, answer, len(self.names))

    @property
    def by_class(self) -> Table:
        """One row a class: clips, precision, recall, F1, average precision, and what it is taken for."""
        precision, recall, f1 = metrics.precision_recall(self.truth, self.answers)
        columns = ("class", "clips", "precision", "recall", "F1", "average precision")
        table = Table(columns if self.several else (*columns, "most often taken for"))
        counts = None if self.several else self.confusion
        average = self.average_precisions
        for k, name in enumerate(self.names):
            numbers = [_known(values[k]) for values in (precision, recall, f1, average)]
            row: tuple[Any, ...] = (name, int(self.truth[:, k].sum()), *numbers)
            if counts is not None:
                others = counts[k].copy()
                others[k] = 0
                worst = int(others.argmax())
                row += (f"{self.names[worst]} ({others[worst]})" if others[worst] else "",)
            table.rows.append(row)
        table.notes += self._notes()
        return table

    @property
    def mistakes(self) -> Table:
        """Pairs of classes that are mistaken for each other, the most frequent first."""
        counts = self.confusion.copy()
        numpy.fill_diagonal(counts, 0)
        table = Table(("it was", "taken for", "times"))
        for place in numpy.argsort(-counts, axis=None, kind="stable"):
            truth, answer = divmod(int(place), len(self.names))
            if counts[truth, answer] == 0:
                break
            table.rows.append((self.names[truth], self.names[answer], int(counts[truth, answer])))
        return table

    def figure(self) -> Any:
        """The confusion matrix, or with several tags each class's average precision; matplotlib."""
        from mmadapt.tasks.tagging import figure

        return figure.class_bars({"": self}) if self.several else figure.confusion_matrix(self)

    def row(self) -> tuple[Any, ...]:
        """Clips, accuracy in %, its 95 % interval, mean average precision, mean F1, and the worst class."""
        low, high = self.score.interval
        recall = metrics.precision_recall(self.truth, self.answers)[1]
        worst = int(numpy.nanargmin(recall)) if self.truth.any() else None
        return (
            len(self),
            f"{100 * self.accuracy:.1f}",
            f"{100 * low:.1f}–{100 * high:.1f}",
            _known(self.mean_average_precision),
            _known(self.f1),
            "" if worst is None else f"{self.names[worst]} ({100 * recall[worst]:.0f} %)",
        )

    def _notes(self) -> list[str]:
        if not self.absent:
            return []
        return [f"no clips of {', '.join(self.absent)}: left out of means over classes"]

    def __repr__(self) -> str:
        return str(side_by_side({"": self}))

    def _repr_html_(self) -> str:
        return side_by_side({"": self})._repr_html_()


def _known(value: float) -> float | None:
    return None if numpy.isnan(value) else float(value)


def evaluate(m: Any, data: Tagged, tagger: Tagger | None = None) -> Scores:
    """Scores of a model, with the adapters that are active, on clips with known tags."""
    tagger = tagger or Tagger(m, data.names, data.several)
    if tagger.names != data.names:
        raise DataError(f"the tagger names {tagger.names}, and the data {data.names}")
    found = tagger.probabilities(data.clips).numpy()
    return Scores(data.names, data.truth, found, data.several)


def side_by_side(scores: Mapping[str, Scores]) -> Table:
    """One row an evaluation, such as source and target, frozen and adapted."""
    several = any(one.several for one in scores.values())
    table = Table(
        (
            "",
            "clips",
            "all right %" if several else "accuracy %",
            "95 %",
            "mAP",
            "F1",
            "worst class",
        )
    )
    table.rows = [(name, *one.row()) for name, one in scores.items()]
    table.notes = ["mAP and F1: means over classes; worst class: by recall"]
    for one in scores.values():
        table.notes += [note for note in one._notes() if note not in table.notes]
    return table


def by_class(scores: Mapping[str, Scores]) -> Table:
    """One row a class, a column an evaluation: the share in % of a class's clips that is found."""
    names = next(iter(scores.values())).names
    if any(one.names != names for one in scores.values()):
        raise DataError("the evaluations name other classes", "side_by_side compares their means")
    table = Table(("class", *(f"{name} %" for name in scores)))
    found = [metrics.precision_recall(one.truth, one.answers)[1] for one in scores.values()]
    for k, name in enumerate(names):
        cells = ["" if numpy.isnan(one[k]) else f"{100 * one[k]:.0f}" for one in found]
        table.rows.append((name, *cells))
    return table
