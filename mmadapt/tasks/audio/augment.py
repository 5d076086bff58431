"""Masks over time and frequency while training.

Park et al. 2019, SpecAugment: A Simple Data Augmentation Method for Automatic Speech Recognition,
arXiv:1904.08779
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mmadapt.errors import DataError
from mmadapt.tasks.audio.batch import Batch

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class SpecAugment:
    """Sets bands of normalised spectrograms to 0, the mean of the data, each clip by itself.

    One band of up to `bins` mel bins and one stretch of up to `frames` frames, never more than `share`
    of a clip and never in its padding. `SpecAugment(24, 80)` is what PETL of AST uses on ESC-50.
    """

    bins: int = 24
    frames: int = 80
    share: float = 0.2

    def __post_init__(self) -> None:
        if self.bins < 0 or self.frames < 0 or not 0 <= self.share <= 1:
            raise DataError(f"{self!r}: expected widths of 0 or more and a share from 0 to 1")

    def __call__(self, batch: Batch, generator: torch.Generator | None = None) -> Batch:
        """The batch with its spectrograms masked; the one given is left alone."""
        values = batch.inputs["input_values"]
        if values.ndim != 3:
            raise DataError(
                f"SpecAugment masks spectrograms (B, frames, bins), and these are {tuple(values.shape)}",
                "raw waves have no bands; wav2vec 2.0 masks inside the model",
            )
        masked = self._masked(values, batch.lengths, generator)
        return Batch({**batch.inputs, "input_values": masked}, batch.lengths)

    def _masked(self, values: Tensor, lengths: Tensor, generator: torch.Generator | None) -> Tensor:
        import torch

        def draw(most: int) -> int:
            return int(torch.randint(0, most + 1, (), generator=generator))

        values = values.clone()
        for clip, length in zip(values, lengths.tolist(), strict=True):
            tall = draw(min(self.bins, clip.shape[1]))
            low = draw(clip.shape[1] - tall)
            clip[:length, low : low + tall] = 0
            long = draw(min(self.frames, int(self.share * length)))
            first = draw(length - long)
            clip[first : first + long] = 0
        return values
