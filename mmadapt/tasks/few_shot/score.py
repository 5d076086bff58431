"""Accuracy with the interval that its sample size allows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mmadapt.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Score:
    """`correct` of `total`, with the 95 % Wilson interval; all shares lie in [0, 1]."""

    correct: int
    total: int

    @property
    def accuracy(self) -> float:
        """Share of correct answers."""
        return self.correct / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson (1927) score interval at 95 %."""
        z, n, p = 1.959964, self.total, self.accuracy
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
        return max(0.0, centre - half), min(1.0, centre + half)

    def __repr__(self) -> str:
        low, high = self.interval
        return f"{100 * self.accuracy:.1f} % [{100 * low:.1f}, {100 * high:.1f}] of {self.total}"


def score(logits: Tensor, labels: Tensor) -> Score:
    """Score of the largest logit, for logits (N, K) and labels (N,)."""
    if logits.ndim != 2 or logits.shape[0] != len(labels) or len(labels) == 0:
        raise DataError(
            f"logits {tuple(logits.shape)} and {len(labels)} labels, expected (N, K) and N of at least 1"
        )
    correct = int((logits.argmax(1).cpu() == labels.cpu()).sum())
    return Score(correct, len(labels))
