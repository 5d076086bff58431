"""Recordings that are longer than a model takes, heard in windows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from mmadapt.errors import DataError
from mmadapt.tasks.audio.clip import Audio

if TYPE_CHECKING:
    from torch import Tensor


def windows(clip: Audio, seconds: float = 10.24, hop: float = 5.0) -> Iterator[tuple[float, Audio]]:
    """(start in seconds, part) of `seconds` every `hop`; the last one ends where the clip does.

    A clip that is no longer than one window is one window.
    """
    if not 0 < hop <= seconds:
        raise DataError(
            f"windows of {seconds:g} s every {hop:g} s leave sound out or never end",
            "0 < hop ≤ seconds, for example 10.24 and 5",
        )
    last = max(len(clip) - round(seconds * clip.rate), 0)
    step, first = max(round(hop * clip.rate), 1), 0
    while True:
        start = min(first, last) / clip.rate
        yield start, clip.cut(start, min(seconds, clip.seconds))
        if first >= last:
            return
        first += step


def over_windows(
    clip: Audio,
    predict: Callable[[list[Audio]], Tensor],
    seconds: float = 10.24,
    hop: float = 5.0,
    batch_size: int = 8,
) -> tuple[Tensor, list[float], Tensor]:
    """The mean of predictions over windows (K,), where windows start, and each one's own (W, K).

    `predict` takes clips and gives probabilities (B, K), `batch_size` windows at a time.

        mean, starts, each = over_windows(clip, lambda parts: model(**features.batch(parts).inputs)
                                          .logits.softmax(-1))
    """
    import torch

    starts: list[float] = []
    waiting: list[Audio] = []
    found: list[Tensor] = []
    for start, part in windows(clip, seconds, hop):
        starts.append(start)
        waiting.append(part)
        if len(waiting) == batch_size:
            found.append(predict(waiting))
            waiting = []
    if waiting:
        found.append(predict(waiting))
    each = torch.cat(found)
    return each.mean(0), starts, each
