"""Clips that come with a backbone of the zoo, so that it can be heard and adapted right away."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy

from mmadapt.errors import DataError, ZooError
from mmadapt.tasks.audio.clip import Audio
from mmadapt.tasks.audio.reading import soundfile_library
from mmadapt.zoo.manifest import entry
from mmadapt.zoo.obtain import get

Speech = tuple[list[Audio], list[str]]


def shipped(name: str = "tiny/ctc") -> dict[str, Speech]:
    """By set: clips, and what is said in them (CC0). Needs soundfile."""
    item = entry(name)
    if not any(file.path == "clips.json" for file in item.files):
        raise ZooError(f"no clips come with {name}", '"tiny/ctc" has some')
    return read(get(item))


def read(folder: Path) -> dict[str, Speech]:
    """The clips that `write` put into a folder."""
    soundfile = soundfile_library()
    index = json.loads((folder / "clips.json").read_text())
    samples, rate = soundfile.read(folder / "clips.opus", dtype="float32")
    wanted = sum(clip["samples"] for one in index["sets"].values() for clip in one)
    if wanted != len(samples):
        raise DataError(f"clips.opus holds {len(samples)} samples, clips.json tells of {wanted}")
    found: dict[str, Speech] = {}
    start = 0
    for name, clips in index["sets"].items():
        own: Speech = ([], [])
        for place, clip in enumerate(clips):
            part = numpy.ascontiguousarray(samples[start : start + clip["samples"]])
            start += clip["samples"]
            own[0].append(Audio(part, rate, f"{name} {place}: {clip['voice']}"))
            own[1].append(clip["text"])
        found[name] = own
    return found


def write(folder: Path, sets: dict[str, Speech], **about: Any) -> None:
    """One Opus file with all clips after one another, sample for sample, and what they are beside it.

    Opus loses what is hardly heard: 2 kB a second remain of 16.
    """
    rates = {clip.rate for clips, _ in sets.values() for clip in clips}
    if len(rates) != 1:
        raise DataError(f"the clips have the rates {sorted(rates)}, expected one")
    index: dict[str, Any] = {**about, "sets": {}}
    parts = []
    for name, (clips, texts) in sets.items():
        rows = []
        for clip, text in zip(clips, texts, strict=True):
            voice = clip.name.rpartition(": ")[2]
            rows.append({"text": text, "voice": voice, "samples": len(clip)})
            parts.append(clip.samples)
        index["sets"][name] = rows
    soundfile_library().write(
        folder / "clips.opus",
        numpy.concatenate(parts),
        rates.pop(),
        format="OGG",
        subtype="OPUS",
        compression_level=0.96,
    )
    (folder / "clips.json").write_text(json.dumps(index, indent=0) + "\n")
