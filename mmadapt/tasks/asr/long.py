"""Recordings longer than a model should hear at once: in chunks, or as they come."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy

from mmadapt.errors import DataError
from mmadapt.tasks.asr.decode import Greedy, Transcript, Word
from mmadapt.tasks.audio.batch import check_clip
from mmadapt.tasks.audio.clip import Audio
from mmadapt.tasks.audio.levels import check_samples
from mmadapt.train.flags import eval_mode

if TYPE_CHECKING:
    from torch import Tensor

    from mmadapt.tasks.asr.recogniser import Recogniser
    from mmadapt.tasks.audio.wave import WaveFeatures


@dataclass(frozen=True)
class Chunks:
    """How a recording is cut: `seconds` are kept of each chunk, `before` and `after` are heard beside it.

    Frames are those of the whole recording, cut nowhere: where a frame depends on no more than is
    heard beside its chunk, it is what it would be without chunks. Attention looks as far as it can, so
    a transformer's frames change a little.
    """

    seconds: float = 8.0
    before: float = 1.5
    after: float = 1.5

    def __post_init__(self) -> None:
        if self.seconds <= 0 or self.before < 0 or self.after < 0:
            raise DataError(f"{self!r}: expected seconds above 0, and before and after not below")


def chunked_logits(listen: Recogniser, clip: Audio, chunks: Chunks = Chunks()) -> Tensor:
    """Logits (T, V) of a whole recording, T as if it were heard at once."""
    import torch

    check_clip(clip, listen.features.rate, listen.features.least)
    clip, features = listen.level(clip)
    total = features.frames(len(clip))
    keep, before, after = _frames(listen, chunks)
    found = []
    for first in range(0, total, keep):
        last = min(first + keep, total)
        start, end = max(first - before, 0), min(last + after, total)
        wave = clip.samples[start * listen.hop : (end - 1) * listen.hop + features.least]
        found.append(_logits(listen, features, wave)[first - start : last - start])
    return torch.cat(found)


def transcribe_long(
    listen: Recogniser,
    clip: Audio,
    chunks: Chunks = Chunks(),
) -> Transcript:
    """What is said in a recording of any length; words that a cut runs through are whole."""
    return listen.decoded(chunked_logits(listen, clip, chunks), clip)


class Stream:
    """Sound as it comes in: `push` takes samples and gives the words that are complete.

    What was heard `before` a chunk is kept, and `after` is waited for, so a word is known that long
    after it was said, and the chunk. Between pushes only that sound, the last character and the words
    are kept, however long it goes on. A model that norms its recordings is given each window normed by
    itself, since the whole is not known.

    Frames that an adapter sees and the window does not hold count as silence. `causal=True` adapters
    need nothing `after`; give `before` what they look back, kernel − 1 frames for each block.

        stream = asr.Stream(listen, asr.Chunks(0.5, before=2.0, after=0.2))
        for samples in microphone:
            print(*[word.text for word in stream.push(samples)])
        print(*[word.text for word in stream.end()])
    """

    def __init__(self, listen: Recogniser, chunks: Chunks = Chunks(0.5, 2.0, 0.25)) -> None:
        self.listen = listen
        self.keep, self.before, self.after = _frames(listen, chunks)
        self.greedy = Greedy(listen.vocabulary, listen.seconds)
        self.start = 0  # of what is kept, in frames
        self.waiting = numpy.zeros(0, numpy.float32)
        self.told = 0
        self.ended = False

    def push(self, samples: Any) -> list[Word]:
        """Take samples (N,) at the model's rate; the words that are complete since the last call."""
        if self.ended:
            raise DataError("the stream has ended", "make another one for the next recording")
        if isinstance(samples, Audio):
            if samples.rate != self.listen.features.rate:
                raise DataError(
                    f"the clip has {samples.rate} samples a second, and the model expects "
                    f"{self.listen.features.rate}",
                    f"clip.resampled({self.listen.features.rate})",
                )
            samples = samples.samples
        piece = check_samples(samples)
        if piece.ndim != 1:
            raise DataError(f"the samples have the shape {piece.shape}, expected one channel (N,)")
        self.waiting = numpy.concatenate([self.waiting, piece])
        for window, first, count in self._ready(final=False):
            self._hear(window, first, count)
        return self._new(self._complete())

    def end(self) -> list[Word]:
        """Hear what is left; the words not told yet."""
        for window, first, count in self._ready(final=True):
            self._hear(window, first, count)
        self.ended = True
        return self._new(self.greedy.words())

    @property
    def transcript(self) -> Transcript:
        """All that was heard so far; the last word may still grow."""
        return Transcript(self.greedy.words())

    def _ready(self, final: bool) -> Iterator[tuple[numpy.ndarray, int, int]]:
        """(window, first frame to keep in it, how many) of every chunk that can be heard."""
        hop, least = self.listen.hop, self.listen.features.least
        while True:
            there = self.start + self.listen.features.frames(len(self.waiting))
            done = self.greedy.frames
            last = min(done + self.keep, there) if final else done + self.keep
            if last <= done or (not final and last + self.after > there):
                return
            begin, end = max(done - self.before, 0), min(last + self.after, there)
            window = self.waiting[(begin - self.start) * hop : (end - 1 - self.start) * hop + least]
            yield window, done - begin, last - done
            drop = max(self.greedy.frames - self.before, 0) - self.start
            self.waiting, self.start = self.waiting[drop * hop :], self.start + drop

    def _hear(self, window: numpy.ndarray, first: int, count: int) -> None:
        logits = _logits(self.listen, self.listen.features, window)
        self.greedy.push(logits[first : first + count])

    def _complete(self) -> tuple[Word, ...]:
        """Words that nothing more can be added to."""
        words = self.greedy.words()
        between = self.listen.vocabulary.delimiter
        tokens = self.greedy.tokens
        closed = bool(tokens) and self.listen.vocabulary.tokens[tokens[-1][0]] in (between, " ")
        return words if closed else words[:-1]

    def _new(self, known: tuple[Word, ...]) -> list[Word]:
        fresh = known[self.told :]
        self.told = max(self.told, len(known))
        return list(fresh)


def _frames(listen: Recogniser, chunks: Chunks) -> tuple[int, int, int]:
    keep = max(round(chunks.seconds / listen.seconds), 1)
    return keep, round(chunks.before / listen.seconds), round(chunks.after / listen.seconds)


def _logits(listen: Recogniser, features: WaveFeatures, wave: numpy.ndarray) -> Tensor:
    batch = features.batch([Audio(wave, features.rate)])
    device = next(listen.model.parameters()).device
    with eval_mode(listen.model):
        logits = listen.model(**{k: v.to(device) for k, v in batch.inputs.items()}).logits
    return logits[0].float().cpu()
