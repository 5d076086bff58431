"""Word and character error rates over a whole set, with intervals."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy

from mmadapt.core.table import Table
from mmadapt.errors import DataError
from mmadapt.tasks.asr.alignment import Alignment, Errors, align
from mmadapt.tasks.asr.wording import check_texts, normalise

DRAWS = 1000


@dataclass(frozen=True)
class Score:
    """What was said and heard, clip by clip; rates are pooled: all changes over all that was said.

    The mean over clips would give a clip of one word the weight of one of a hundred. `raw` compares
    texts as they are written, `plain` as `normalise` leaves them.
    """

    said: tuple[str, ...]
    heard: tuple[str, ...]

    def __post_init__(self) -> None:
        check_texts(self.said)
        if len(self.said) != len(self.heard) or not self.said:
            raise DataError(
                f"{len(self.said)} texts were said and {len(self.heard)} heard, expected as many of both",
                "one text a clip, also where nothing was heard",
            )

    @cached_property
    def raw(self) -> tuple[Alignment, ...]:
        """Words, clip by clip, as they are written."""
        return self._aligned("word", str)

    @cached_property
    def words(self) -> tuple[Alignment, ...]:
        """Words, clip by clip, normalised."""
        return self._aligned("word", normalise)

    @cached_property
    def characters(self) -> tuple[Alignment, ...]:
        """Characters, clip by clip, normalised."""
        return self._aligned("character", normalise)

    def _aligned(self, unit: str, wording: Callable[[str], str]) -> tuple[Alignment, ...]:
        pairs = zip(self.said, self.heard, strict=True)
        return tuple(align(wording(a), wording(b), unit) for a, b in pairs)  # type: ignore[arg-type]

    @property
    def wer(self) -> float:
        """Word error rate, normalised texts."""
        return pooled(self.words).rate

    @property
    def wer_raw(self) -> float:
        """Word error rate, texts as they are written."""
        return pooled(self.raw).rate

    @property
    def cer(self) -> float:
        """Character error rate, normalised texts, spaces counted."""
        return pooled(self.characters).rate

    def interval(
        self, level: float = 0.95, draws: int = DRAWS, seed: int = 0
    ) -> tuple[float, float]:
        """Bounds of the word error rate: clips are drawn anew, with replacement, `draws` times."""
        changes, lengths = _counts(self.words)
        return _bounds(_rates(changes, lengths, draws, seed), level)

    def confusions(self, most: int = 10) -> Table:
        """Which words were heard for which, the most frequent first; "–" stands for none."""
        found = Counter(
            (kind, said or "–", heard or "–")
            for one in self.words
            for kind, said, heard in one.pairs
            if kind
        )
        rows = [(*key, times) for key, times in found.most_common(most)]
        return Table(("kind", "said", "heard", "times"), rows)

    @property
    def table(self) -> Table:
        """Rates, what they are made of, and their intervals."""
        table = Table(("compared", "said", "S", "D", "I", "error rate %", "95 %"))
        for name, alignments in (
            ("words", self.words), ("words, as written", self.raw), ("characters", self.characters)
        ):  # fmt: skip
            errors = pooled(alignments)
            low, high = _bounds(_rates(*_counts(alignments), DRAWS, 0), 0.95)
            table.rows.append(
                (
                    name,
                    errors.said,
                    errors.substitutions,
                    errors.deletions,
                    errors.insertions,
                    percent(errors.rate),
                    f"{percent(low)}–{percent(high)}",
                )
            )
        table.title = f"{len(self.said)} clips"
        return table

    def __repr__(self) -> str:
        return str(self.table)

    def _repr_html_(self) -> str:
        return self.table._repr_html_()


def pooled(alignments: Sequence[Alignment]) -> Errors:
    """The errors of all clips together."""
    return sum((one.errors for one in alignments), Errors())


def difference(
    first: Score, second: Score, level: float = 0.95, draws: int = DRAWS, seed: int = 0
) -> tuple[float, float, float]:
    """How much the word error rate changes from `first` to `second`, and bounds of it.

    The same clips are drawn for both, so what makes a clip hard for either cancels out.
    """
    if first.said != second.said:
        raise DataError("the two scores are of different texts", "score both on the same clips")
    before = _rates(*_counts(first.words), draws, seed)
    after = _rates(*_counts(second.words), draws, seed)
    return (second.wer - first.wer, *_bounds(after - before, level))


def percent(rate: float) -> str:
    """A rate for people."""
    return "–" if math.isnan(rate) else f"{100 * rate:.1f}"


def _counts(alignments: Sequence[Alignment]) -> tuple[numpy.ndarray, numpy.ndarray]:
    errors = [one.errors for one in alignments]
    return numpy.array([e.wrong for e in errors]), numpy.array([e.said for e in errors])


def _rates(changes: numpy.ndarray, lengths: numpy.ndarray, draws: int, seed: int) -> numpy.ndarray:
    generator = numpy.random.default_rng(seed)
    chosen = generator.integers(0, len(changes), (draws, len(changes)))
    said = lengths[chosen].sum(1)
    return changes[chosen].sum(1) / numpy.where(said > 0, said, numpy.nan)


def _bounds(rates: numpy.ndarray, level: float) -> tuple[float, float]:
    if not 0 < level < 1:
        raise DataError(f"level is {level!r}, expected a share between 0 and 1, such as 0.95")
    rates = rates[~numpy.isnan(rates)]
    if not len(rates):
        return math.nan, math.nan
    low, high = numpy.quantile(rates, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
