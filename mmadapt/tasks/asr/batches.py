"""Clips and what is said in them, as batches to train on."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from mmadapt.errors import DataError
from mmadapt.tasks.asr.loss import frames_needed
from mmadapt.tasks.asr.vocabulary import Unknown, Vocabulary
from mmadapt.tasks.asr.wording import check_texts
from mmadapt.tasks.audio.batch import check_clips
from mmadapt.tasks.audio.clip import Audio
from mmadapt.tasks.audio.levels import SILENT, decibels
from mmadapt.tasks.audio.wave import WaveFeatures

if TYPE_CHECKING:
    from torch import Tensor

_NEAR = 20  # batches whose clips are sorted by length together


class Batches:
    """Batches for `mm.fit` with `CTCLoss`: every epoch in another order, which `seed` tells.

    Clips of like length stand together, so that little is padding. Clips with fewer frames than their
    text needs are left out, with a warning, and are in `left_out`; silent clips with a text are
    refused, as are characters the vocabulary lacks unless `unknown="drop"`; texts of which that leaves
    nothing are warned of.
    """

    def __init__(
        self,
        features: WaveFeatures,
        vocabulary: Vocabulary,
        clips: Sequence[Audio],
        texts: Sequence[str],
        size: int = 8,
        seed: int = 0,
        unknown: Unknown = "refuse",
    ) -> None:
        import torch

        if not isinstance(size, int) or size < 1:
            raise DataError(f"size is {size!r}, expected a whole number of at least 1")
        if len(clips) != len(texts):
            raise DataError(f"{len(clips)} clips and {len(texts)} texts, expected one text a clip")
        check_texts(texts)
        checked = check_clips(clips, features.rate, features.least)
        for place, (clip, text) in enumerate(zip(checked, texts, strict=True)):
            if text.strip() and decibels(clip.samples) < SILENT:
                raise DataError(
                    f"clip {place} is silent, and its text is {text!r}",
                    "leave it out, or give it an empty text",
                )
        if unknown == "refuse":
            vocabulary.require(texts)
        self.features, self.vocabulary, self.size, self.seed = features, vocabulary, size, seed
        self.epoch = 0
        self.clips, self.labels = checked, [vocabulary.ids(text, unknown) for text in texts]
        self._warn_of_dropped(texts)
        self.frames = [features.frames(len(clip)) for clip in checked]
        needed = [int(frames_needed(torch.tensor([own or [-1]]))[0]) for own in self.labels]
        #: places of clips whose text does not fit
        self.left_out = [i for i, most in enumerate(self.frames) if most < needed[i]]
        out = set(self.left_out)
        self.used = [i for i in range(len(checked)) if i not in out]
        if self.left_out:
            first = self.left_out[0]
            told = (
                f"{len(self.left_out)} of {len(checked)} clips have fewer frames than their text needs, "
                f"the first clip {first}: {self.frames[first]} frames for {texts[first]!r}, which needs "
                f"{needed[first]}"
            )
            if not self.used:
                raise DataError(told, "are the texts those of these clips?")
            warnings.warn(f"{told}; they are left out", stacklevel=2)

    def _warn_of_dropped(self, texts: Sequence[str]) -> None:
        lost = [i for i, own in enumerate(self.labels) if not own and texts[i].strip()]
        if lost:
            warnings.warn(
                f"nothing is left of {len(lost)} of {len(texts)} texts, the first text {lost[0]}: "
                f"{texts[lost[0]]!r}; their clips are learnt as silence",
                stacklevel=4,
            )

    def set_epoch(self, epoch: int) -> None:
        """Which order comes next; `mm.fit` calls it."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.used) // self.size)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for places in self._drawn():
            yield self.batch(places)

    def batch(self, places: Sequence[int]) -> dict[str, Tensor]:
        """The batch of these clips: the model's inputs, `labels` (B, U) with −100 behind, `frames` (B,)."""
        import torch

        made = self.features.batch([self.clips[place] for place in places])
        rows = [torch.tensor(self.labels[place], dtype=torch.long) for place in places]
        labels = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)
        if not labels.shape[1]:  # nobody speaks
            labels = torch.full((len(places), 1), -100)
        frames = torch.tensor([self.frames[place] for place in places])
        return {**made.inputs, "labels": labels, "frames": frames}

    def _drawn(self) -> list[list[int]]:
        import torch

        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.used), generator=generator).tolist()
        found: list[list[int]] = []
        for start in range(0, len(order), _NEAR * self.size):
            near = [self.used[place] for place in order[start : start + _NEAR * self.size]]
            near.sort(key=lambda place: self.frames[place])
            found += [near[i : i + self.size] for i in range(0, len(near), self.size)]
        shuffled = torch.randperm(len(found), generator=generator).tolist()
        return [found[place] for place in shuffled]

    def __repr__(self) -> str:
        seconds = sum(self.clips[place].seconds for place in self.used)
        left = f"; {len(self.left_out)} left out" if self.left_out else ""
        return f"Batches({len(self.used)} clips, {seconds:.0f} s, {len(self)} of {self.size}{left})"
