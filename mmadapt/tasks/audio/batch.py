"""Clips of different lengths side by side."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
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
    # a path or samples: refused
    one = isinstance(clips, (Audio, str, os.PathLike)) or hasattr(clips, "dtype")
    several: Any = [clips] if one else clips
    if not len(several):
        raise DataError("there are no clips")
    return [check_clip(clip, rate, least, place) for place, clip in enumerate(several)]


def alike(
    clips: Sequence[Audio], size: int, equal: bool, places: Iterable[int] | None = None
) -> list[list[int]]:
    """Places of clips, or of some, in groups of `size` at most: alike in length, or of `equal` length."""
    groups: list[list[int]] = []
    for place in sorted(
        range(len(clips)) if places is None else places, key=lambda i: len(clips[i])
    ):
        last = groups[-1] if groups else []
        if last and len(last) < size and not (equal and len(clips[last[0]]) != len(clips[place])):
            last.append(place)
        else:
            groups.append([place])
    return groups


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
