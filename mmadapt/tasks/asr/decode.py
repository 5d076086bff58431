"""From chances of characters to words with their times."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mmadapt.core.table import Table

if TYPE_CHECKING:
    from torch import Tensor

    from mmadapt.tasks.asr.vocabulary import Vocabulary


@dataclass(frozen=True)
class Word:
    """A word, when it was said, in seconds, and how sure the model was, in [0, 1].

    The confidence is the mean over its characters of the highest chance each had. Models trained by
    CTC write a character in few frames, so a word ends where its last one does.
    """

    text: str
    start: float
    end: float
    confidence: float


@dataclass(frozen=True)
class Transcript:
    """What was heard: `text`, its words, and the notes of the clip, such as that it is silent."""

    words: tuple[Word, ...]
    notes: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The words with a space between."""
        return " ".join(word.text for word in self.words)

    @property
    def table(self) -> Table:
        """A row a word."""
        rows = [
            (w.text, f"{w.start:.2f}", f"{w.end:.2f}", f"{w.confidence:.2f}") for w in self.words
        ]
        return Table(("word", "from s", "to s", "confidence"), list(rows), notes=list(self.notes))

    def __repr__(self) -> str:
        return f"Transcript({self.text!r}{''.join(f'; {note}' for note in self.notes)})"

    def _repr_html_(self) -> str:
        return self.table._repr_html_()


class Greedy:
    """The likeliest character of every frame, repeats and blanks left out, frame by frame.

    `push` takes logits (T, V) in pieces of any length; what was heard does not depend on how they were
    cut. `seconds` is the length of a frame's step.
    """

    def __init__(self, vocabulary: Vocabulary, seconds: float) -> None:
        self.vocabulary, self.seconds = vocabulary, seconds
        self.frames = 0
        self.last = vocabulary.blank
        #: number, first frame, last frame, highest chance
        self.tokens: list[tuple[int, int, int, float]] = []

    def push(self, logits: Tensor) -> Greedy:
        """Go on with the frames that follow."""
        chances, numbers = logits.detach().float().softmax(-1).max(-1)
        for number, chance in zip(numbers.tolist(), chances.tolist(), strict=True):
            if number == self.last and number != self.vocabulary.blank:
                _, first, _, highest = self.tokens[-1]
                self.tokens[-1] = (number, first, self.frames, max(highest, chance))
            elif number != self.vocabulary.blank:
                self.tokens.append((number, self.frames, self.frames, chance))
            self.last = number
            self.frames += 1
        return self

    def words(self) -> tuple[Word, ...]:
        """All words so far; the last may still grow."""
        found: list[Word] = []
        current: list[tuple[str, int, int, float]] = []
        between = self.vocabulary.delimiter
        for number, first, last, chance in [*self.tokens, (-1, 0, 0, 0.0)]:
            token = between if number < 0 else self.vocabulary.tokens[number]
            if token not in (between, " "):
                if len(token) == 1:
                    current.append((token, first, last, chance))
                continue
            if current:
                text = "".join(one[0] for one in current)
                confidence = sum(one[3] for one in current) / len(current)
                start = current[0][1] * self.seconds
                found.append(Word(text, start, (current[-1][2] + 1) * self.seconds, confidence))
            current = []
        return tuple(found)


def greedy(logits: Tensor, vocabulary: Vocabulary, seconds: float = 0.02) -> tuple[Word, ...]:
    """The words of one clip's logits (T, V), its padding cut off."""
    return Greedy(vocabulary, seconds).push(logits).words()
