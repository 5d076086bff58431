"""What was said beside what was heard, word by word or character by character."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from mmadapt.core.figure import ORANGE, SKY, VERMILION
from mmadapt.errors import DataError, MissingDependencyError

if TYPE_CHECKING:
    from mmadapt.tasks.asr.decode import Word

Unit = Literal["word", "character"]
#: colours behind the kinds of difference, whose letters are for those who do not see the colours
_COLOURS = {"S": ORANGE, "D": VERMILION, "I": SKY}


@dataclass(frozen=True)
class Errors:
    """How many units are right, replaced, missing and added; they can be summed over clips."""

    hits: int = 0
    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0

    @property
    def said(self) -> int:
        """Units of the reference."""
        return self.hits + self.substitutions + self.deletions

    @property
    def wrong(self) -> int:
        """The least number of changes from one text to the other."""
        return self.substitutions + self.deletions + self.insertions

    @property
    def rate(self) -> float:
        """Changes per unit of the reference, over 1 where much was added; NaN where nothing was said."""
        return self.wrong / self.said if self.said else math.nan

    def __add__(self, other: Errors) -> Errors:
        return Errors(
            self.hits + other.hits,
            self.substitutions + other.substitutions,
            self.deletions + other.deletions,
            self.insertions + other.insertions,
        )


@dataclass(frozen=True)
class Alignment:
    """Pairs (kind, said, heard): kind is "" where they are equal, else S, D or I.

    In a notebook a table with times where the words have them; as text three lines.
    """

    pairs: tuple[tuple[str, str, str], ...]
    unit: Unit = "word"
    #: start and end of what was heard in each pair, in seconds
    times: tuple[tuple[float, float] | None, ...] = ()

    @property
    def errors(self) -> Errors:
        """The pairs counted."""
        kinds = [kind for kind, _, _ in self.pairs]
        return Errors(kinds.count(""), kinds.count("S"), kinds.count("D"), kinds.count("I"))

    def timed(self, words: Sequence[Word]) -> Alignment:
        """The same with the times of the words that were heard."""
        heard = [pair[2] for pair in self.pairs if pair[2]]
        if self.unit != "word" or len(heard) != len(words):
            raise DataError(
                f"{len(words)} words for an alignment of {len(heard)} heard {self.unit}s",
                "times are those of the words that were aligned",
            )
        left = iter(words)
        times = []
        for _, _, heard_unit in self.pairs:
            word = next(left) if heard_unit else None
            times.append((word.start, word.end) if word else None)
        return Alignment(self.pairs, self.unit, tuple(times))

    def __str__(self) -> str:
        said, heard, kinds = ["said "], ["heard"], ["     "]
        for kind, before, after in self.pairs:
            width = max(len(before), len(after), 1)
            said.append(_visible(before).ljust(width) if before else "*" * width)
            heard.append(_visible(after).ljust(width) if after else "*" * width)
            kinds.append(kind.ljust(width))
        between = " " if self.unit == "word" else ""
        rows = [row[0] + " " + between.join(row[1:]) for row in (said, heard, kinds)]
        return "\n".join(
            row.rstrip() for row in (rows if any(p[0] for p in self.pairs) else rows[:2])
        )

    __repr__ = __str__

    def _repr_html_(self) -> str:
        cells: dict[str, list[str]] = {"said": [], "heard": [], "": []}
        if self.times:
            cells["s"] = []
        for place, (kind, before, after) in enumerate(self.pairs):
            style = "padding:1px 6px"
            if (
                kind
            ):  # a third of the colour, so that the page's text is legible on it, dark or light
                style += f";background:{_COLOURS[kind]}55;font-weight:600"
            for row, text in (("said", before), ("heard", after), ("", kind)):
                cells[row].append(f'<td style="{style}">{html.escape(_visible(text))}</td>')
            if self.times:
                time = self.times[place]
                shown = f"{time[0]:.2f}–{time[1]:.2f}" if time else ""
                cells["s"].append(f'<td style="padding:1px 6px"><small>{shown}</small></td>')
        rows = "".join(
            f'<tr><th style="text-align:left;padding:1px 6px">{name}</th>{"".join(row)}</tr>'
            for name, row in cells.items()
        )
        return f'<div style="overflow-x:auto"><table style="font-family:monospace">{rows}</table></div>'


def _visible(text: str) -> str:
    return "␣" if text == " " else text


def align(said: str, heard: str, unit: Unit = "word") -> Alignment:
    """An alignment with the fewest changes, spaces normalised; what is compared is taken as it stands.

    Needs jiwer. Where nothing was said all that was heard is added.
    """
    if unit not in ("word", "character"):
        raise DataError(f'unit is {unit!r}, expected "word" or "character"')
    before, after = " ".join(said.split()), " ".join(heard.split())
    first: Sequence[str] = before.split() if unit == "word" else before
    second: Sequence[str] = after.split() if unit == "word" else after
    if not first or not second:
        added = [("I", "", one) for one in second]
        return Alignment((*(("D", one, "") for one in first), *added), unit)
    jiwer = _jiwer()
    process = jiwer.process_words if unit == "word" else jiwer.process_characters
    pairs: list[tuple[str, str, str]] = []
    for chunk in process(before, after).alignments[0]:
        own = first[chunk.ref_start_idx : chunk.ref_end_idx]
        other = second[chunk.hyp_start_idx : chunk.hyp_end_idx]
        pairs += _pairs(chunk.type, own, other)
    return Alignment(tuple(pairs), unit)


def _pairs(kind: str, said: Sequence[str], heard: Sequence[str]) -> Iterable[tuple[str, str, str]]:
    if kind == "insert":
        return [("I", "", one) for one in heard]
    if kind == "delete":
        return [("D", one, "") for one in said]
    letter = "" if kind == "equal" else "S"
    return [(letter, one, other) for one, other in zip(said, heard, strict=True)]


def _jiwer() -> Any:
    try:
        import jiwer
    except ImportError as error:
        raise MissingDependencyError(
            "alignments of words are computed by jiwer", "pip install 'mmadapt[audio]'"
        ) from error
    return jiwer
