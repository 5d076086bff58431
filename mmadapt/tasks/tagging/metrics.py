"""How good tags are: average precision, confusions, and scores of each class."""

from __future__ import annotations

import numpy

from mmadapt.errors import DataError


def average_precision(truth: numpy.ndarray, score: numpy.ndarray) -> float:
    """The area under precision over recall, in [0, 1]; NaN where nothing is true.

    truth bool (N,), score (N,), higher for what is more likely true. Clips are ranked by score and
    precision is summed at every step of recall; clips of one score are taken together, so that their
    order does not count. Constant scores give the share of what is true.
    """
    truth = numpy.asarray(truth, bool)
    score = numpy.asarray(score, float)
    if truth.shape != score.shape or truth.ndim != 1:
        raise DataError(
            f"truth {truth.shape} and scores {score.shape}, expected (N,) of one length"
        )
    if not truth.any():
        return float("nan")
    order = numpy.argsort(-score, kind="stable")
    found = numpy.cumsum(truth[order])
    last = numpy.append(numpy.diff(score[order]) != 0, True)  # where a run of equal scores ends
    precision, recall = (found / numpy.arange(1, len(found) + 1))[last], found[last] / found[-1]
    return float(numpy.sum(numpy.diff(recall, prepend=0.0) * precision))


def average_precisions(truth: numpy.ndarray, scores: numpy.ndarray) -> numpy.ndarray:
    """That of every class (K,), for truth bool (N, K) and scores (N, K)."""
    return numpy.array([average_precision(*pair) for pair in zip(truth.T, scores.T, strict=True)])


def mean_over_classes(values: numpy.ndarray) -> float:
    """The mean of one number a class, every class alike; those without clips, NaN, are left out."""
    known = values[~numpy.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def confusion(truth: numpy.ndarray, answer: numpy.ndarray, classes: int) -> numpy.ndarray:
    """How often each class was taken for each, int64 (K, K): rows are the truth, columns answers."""
    counts = numpy.zeros((classes, classes), numpy.int64)
    numpy.add.at(counts, (truth, answer), 1)
    return counts


def precision_recall(
    truth: numpy.ndarray, answer: numpy.ndarray
) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
    """Precision, recall and their harmonic mean F1 of every class (K,), for bool (N, K).

    Recall and F1 of a class without clips are NaN. Precision is NaN where a class was never the
    answer; F1 counts it as 0 where it should have been.
    """
    both = (truth & answer).sum(0).astype(float)
    true, said = truth.sum(0).astype(float), answer.sum(0).astype(float)
    nan = numpy.full(len(both), numpy.nan)
    precision = numpy.divide(both, said, out=nan.copy(), where=said > 0)
    recall = numpy.divide(both, true, out=nan.copy(), where=true > 0)
    f1 = numpy.divide(2 * both, true + said, out=nan.copy(), where=true > 0)
    return precision, recall, f1
