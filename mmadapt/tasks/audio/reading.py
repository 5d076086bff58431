"""Reading sound files with libsndfile."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmadapt.errors import DataError, MissingDependencyError
from mmadapt.tasks.audio.clip import Audio
from mmadapt.tasks.audio.levels import check_samples, notes_on, to_mono

#: endings of what libsndfile does not read
FOREIGN = (".m4a", ".aac", ".mp4", ".m4b", ".webm", ".mkv", ".mov", ".wma", ".amr", ".3gp")


def load_audio(
    source: Any,
    rate: int | None = 16_000,
    mono: str | int = "mean",
    start: float = 0.0,
    duration: float | None = None,
) -> Audio:
    """A sound file as one channel at `rate` (None: the file's own): WAV, FLAC, OGG, Opus, MP3, AIFF …

    `source` is a path or an open binary file; `start` and `duration` in seconds read a part of it.
    `mono`: "mean" of the channels, "first", or the number of one. Raises `DataError` for what is no
    readable sound, is empty, or whose channels cancel out.

        clip = load_audio("street.flac", start=60, duration=10)
    """
    soundfile = soundfile_library()
    if isinstance(source, (bytes, bytearray)):
        source = io.BytesIO(source)
    name = Path(str(getattr(source, "name", ""))).name
    if isinstance(source, (str, Path)):
        path = Path(source).expanduser()
        _check_path(path)
        name, source = path.name, str(path)
    elif not hasattr(source, "read"):
        raise DataError(
            f"a {type(source).__name__} is no file", "Audio.of(samples, rate) takes arrays"
        )
    try:
        with soundfile.SoundFile(source) as file:
            own, frames = file.samplerate, file.frames
            first = round(start * own)
            if frames and not 0 <= first < frames:
                raise DataError(
                    f"{name or 'the file'} has {frames / own:.2f} s, and start is {start:g}"
                )
            file.seek(first)
            read = file.read(
                -1 if duration is None else round(duration * own), dtype="float32", always_2d=True
            )
    except soundfile.LibsndfileError as error:
        raise _unreadable(str(name), error) from error
    if not len(read):
        raise DataError(f"{name or 'the file'} has no samples", "leave empty clips out")
    one = to_mono(check_samples(read), mono)
    clip = Audio(one, own, str(name), notes_on(one))
    if read.shape[1] > 1:
        clip = replace(clip, notes=(*clip.notes, f"{mono} of {read.shape[1]} channels"))
    return clip if rate is None else clip.resampled(rate)


def soundfile_library() -> Any:
    """soundfile, or an error with the line that installs it."""
    try:
        import soundfile
    except ImportError as error:
        raise MissingDependencyError(
            "reading sound files needs soundfile", "pip install 'mmadapt[audio]'"
        ) from error
    return soundfile


def _check_path(path: Path) -> None:
    if path.is_dir():
        raise DataError(f"{str(path)!r} is a folder, expected a sound file")
    if not path.exists():
        folder = path.parent
        near = sorted(p.name for p in folder.iterdir())[:4] if folder.is_dir() else []
        there = (
            f"its folder holds {', '.join(near)} …" if near else "its folder is empty or missing"
        )
        raise DataError(f"there is no file {str(path)!r}", there)


def _unreadable(name: str, error: Exception) -> DataError:
    if Path(name).suffix.lower() in FOREIGN:
        return DataError(
            f"{name} is in a format that soundfile does not read ({Path(name).suffix})",
            f"convert it: ffmpeg -i {name} {Path(name).stem}.wav; or decode it with torchcodec and pass "
            "the samples to Audio.of(samples, rate)",
        )
    return DataError(
        f"{name or 'the file'} cannot be read as sound: {error}",
        "soundfile reads WAV, FLAC, OGG, Opus, MP3, AIFF and others; ffmpeg converts what else there is",
    )
