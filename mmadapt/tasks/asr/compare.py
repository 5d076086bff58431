"""Backbone and adapted model side by side, on new speakers and on those the backbone knows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mmadapt.core.attach import disabled
from mmadapt.core.table import Table
from mmadapt.errors import DataError, did_you_mean
from mmadapt.tasks.asr.alignment import Alignment, align
from mmadapt.tasks.asr.decode import Transcript
from mmadapt.tasks.asr.recogniser import Recogniser
from mmadapt.tasks.asr.score import Score, difference, percent
from mmadapt.tasks.asr.wording import normalise
from mmadapt.tasks.audio.clip import Audio

Speech = tuple[Sequence[Audio], Sequence[str]]


@dataclass(frozen=True)
class Pair:
    """One set of clips, heard by both."""

    clips: tuple[Audio, ...]
    texts: tuple[str, ...]
    off: tuple[Transcript, ...]
    on: tuple[Transcript, ...]

    @property
    def before(self) -> Score:
        """The backbone's."""
        return Score(self.texts, tuple(one.text for one in self.off))

    @property
    def after(self) -> Score:
        """With the adapter."""
        return Score(self.texts, tuple(one.text for one in self.on))

    def alignment(self, place: int, adapted: bool = True) -> Alignment:
        """What was heard in one clip beside what is said, with times."""
        transcript = (self.on if adapted else self.off)[place]
        aligned = align(normalise(self.texts[place]), normalise(transcript.text))
        same = len(normalise(transcript.text).split()) == len(transcript.words)
        return aligned.timed(transcript.words) if same else aligned


@dataclass(frozen=True)
class Comparison:
    """Error rates of the backbone and with the adapter on, set by set."""

    sets: Mapping[str, Pair]

    def __getitem__(self, name: str) -> Pair:
        if name not in self.sets:
            raise DataError(f"there is no set {name!r}", did_you_mean(name, self.sets))
        return self.sets[name]

    @property
    def table(self) -> Table:
        """A row a set; rates in %, with bounds from clips drawn anew."""
        table = Table(
            ("speech", "clips", "words", "WER off", "WER on", "change of WER", "CER off", "CER on")
        )
        for name, pair in self.sets.items():
            before, after = pair.before, pair.after
            change, low, high = difference(before, after)
            table.rows.append(
                (
                    name,
                    len(pair.texts),
                    sum(one.errors.said for one in before.words),
                    _bounded(before),
                    _bounded(after),
                    f"{_signed(change)} [{_signed(low)}, {_signed(high)}]",
                    percent(before.cer),
                    percent(after.cer),
                )
            )
        table.notes = [
            "off: the backbone itself; on: with the adapter. Rates in %, pooled over words and characters",
            "in brackets: 95 % bounds of the rate, and of its change, from drawing clips anew 1000 times",
        ]
        return table

    def __repr__(self) -> str:
        return str(self.table)

    def _repr_html_(self) -> str:
        return self.table._repr_html_()


def compare(listen: Recogniser, sets: Mapping[str, Speech], batch_size: int = 16) -> Comparison:
    """Hear every set twice: with what is attached turned off, and as it is active now.

    asr.compare(listen, {"whisper": (clips, texts), "known voices": (others, their_texts)})
    """
    if not sets:
        raise DataError("there is nothing to compare on", '{"new speakers": (clips, texts)}')
    found = {}
    for name, speech in sets.items():
        if len(speech) != 2 or len(speech[0]) != len(speech[1]):
            raise DataError(
                f"the set {name!r} is no pair of as many clips as texts",
                '{"new speakers": (clips, texts)}',
            )
        clips, texts = speech
        with disabled(listen.backbone):
            off = listen.transcribe(clips, batch_size)
        on = listen.transcribe(clips, batch_size)
        found[name] = Pair(tuple(clips), tuple(texts), tuple(off), tuple(on))
    return Comparison(found)


def _bounded(score: Score) -> str:
    low, high = score.interval()
    return f"{percent(score.wer)} [{percent(low)}, {percent(high)}]"


def _signed(rate: float) -> str:
    return f"{100 * rate:+.1f}".replace("-", "−")
