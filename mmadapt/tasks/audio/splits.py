"""What is wrong with a data set before anything is trained on it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from mmadapt.core.table import Table
from mmadapt.errors import DataError
from mmadapt.tasks.audio.clip import Audio
from mmadapt.tasks.audio.levels import SILENT, decibels


def check_splits(splits: Mapping[str, Sequence[Audio]], silent: bool = False) -> Table:
    """Clips and seconds of each split; clips that stand twice, in two splits or one, are refused.

    So are silent ones, from which nothing but their label's frequency is learned, unless `silent`.
    Other notes are counted. Clips are the same when their samples and rate are.
    """
    table = Table(("split", "clips", "seconds", "shortest", "longest", "notes"))
    first: dict[str, str] = {}
    for split, clips in splits.items():
        for place, clip in enumerate(clips):
            who = f"{split}[{place}]" + (f" ({clip.name})" if clip.name else "")
            if not silent and decibels(clip.samples) < SILENT:
                raise DataError(
                    f"{who} is silent, below {SILENT:g} dB".replace("-", "−"),
                    "leave it out, or pass silent=True where silence is a class",
                )
            digest = hashlib.sha256(
                clip.rate.to_bytes(4, "big") + clip.samples.tobytes()
            ).hexdigest()
            if digest in first:
                raise DataError(
                    f"{who} is the same recording as {first[digest]}",
                    "keep one of them: a test clip that was trained on measures nothing",
                )
            first[digest] = who
        lengths = [clip.seconds for clip in clips]
        table.rows.append(
            (
                split,
                len(clips),
                sum(lengths),
                min(lengths, default=None),
                max(lengths, default=None),
                sum(bool(clip.notes) for clip in clips),
            )
        )
    return table
