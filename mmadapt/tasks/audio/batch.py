"""Clips of different lengths side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmadapt.errors import DataError
from mmadapt.tasks.audio.clip import Audio

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Batch:
    """What a model is called with, `model(**batch.inputs)`, and how long every clip is.

    `lengths` (B,) counts valid frames of a spectrogram, or samples of a wave.
    """

    inputs: dict[str, Tensor]
    lengths: Tensor

    def __len__(self) -> int:
        return len(self.lengths)

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in self.inputs.items())
        return f"Batch({shapes}; lengths {self.lengths.min()} to {self.lengths.max()})"


def check_clips(clips: Audio | Sequence[Audio], rate: int, least: int) -> list[Audio]:
    """The clips, each at `rate` and with `least` samples or more; else a `DataError` that names it."""
    if isinstance(clips, Audio):
        clips = [clips]
    if not len(clips):
        raise DataError("there are no clips")
    return [check_clip(clip, rate, least, place) for place, clip in enumerate(clips)]


def check_clip(clip: Any, rate: int, least: int, place: int = 0) -> Audio:
    """One of them."""
    if not isinstance(clip, Audio):
        raise DataError(
            f"clip {place} is a {type(clip).__name__}, whose sampling rate is not known",
            "audio.Audio.of(samples, rate) or audio.load_audio(path)",
        )
    who = f"clip {place}" + (f" ({clip.name})" if clip.name else "")
    if clip.rate != rate:
        raise DataError(
            f"{who} has {clip.rate} samples a second, and the model expects {rate}",
            f"clip.resampled({rate})",
        )
    if len(clip) < least:
        raise DataError(
            f"{who} has {len(clip)} samples, {1000 * clip.seconds:.0f} ms, and the model needs {least} "
            "for one frame",
            "leave it out, or join it with its neighbours",
        )
    return clip
