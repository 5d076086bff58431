"""What is wrong with samples: refused where no model could make sense of it, else noted."""

from __future__ import annotations

from typing import Any

import numpy

from mmadapt.errors import DataError

CLIPPED = 0.999
SILENT = -60.0


def check_samples(samples: Any) -> numpy.ndarray:
    """Samples of any shape as float32 from about −1 to 1, or a `DataError` that says what they are."""
    array = numpy.asarray(samples)
    if array.dtype.kind in "iu":
        full = 2 ** (8 * array.dtype.itemsize - 1)
        raise DataError(
            f"the samples are {array.dtype}, whose loudest is {full}; expected floats from −1 to 1",
            f"samples.astype('float32') / {full}"
            + (" - 1" if array.dtype.kind == "u" else "")
            + ", or read the file with load_audio",
        )
    if array.dtype.kind != "f":
        raise DataError(f"the samples are {array.dtype}, expected floats from −1 to 1")
    if not array.size:
        raise DataError("the recording has no samples", "leave empty clips out")
    bad = ~numpy.isfinite(array)
    if bad.any():
        first = tuple(int(i) for i in numpy.argwhere(bad)[0])
        raise DataError(
            f"{int(bad.sum())} of {array.size} samples are not finite, the first at "
            f"{first[0] if len(first) == 1 else first}: {array[first]}",
            "cut them out; zeros in their place would be heard as clicks",
        )
    peak = float(numpy.abs(array).max())
    if peak > 16:
        raise DataError(
            f"the samples reach {peak:g}, expected floats from −1 to 1",
            "divide by the full scale they were stored with: 32768 for 16 bits",
        )
    return array.astype(numpy.float32)


def by_channel(array: numpy.ndarray) -> numpy.ndarray:
    """Samples (N,), (N, channels) or (channels, N) as (N, channels); channels, 64 at most, are fewer."""
    if array.ndim == 1:
        return array[:, None]
    if array.ndim != 2 or min(array.shape) > 64 or array.shape[0] == array.shape[1]:
        raise DataError(
            f"the samples have the shape {array.shape}, expected (N,) or (N, channels)",
            "one recording at a time; a batch is made of several by SpectrumFeatures or WaveFeatures",
        )
    return array if array.shape[0] > array.shape[1] else array.T


def to_mono(array: numpy.ndarray, mono: str | int) -> numpy.ndarray:
    """Samples (N, channels) as (N,): the "mean" of the channels, the "first", or one by its number.

    Channels whose mean cancels out are refused.
    """
    channels = array.shape[1]
    if mono == "mean":
        mixed = array.mean(1)
        loud = float(numpy.sqrt((array**2).mean(0)).mean())
        if channels > 1 and loud > 0 and float(numpy.sqrt((mixed**2).mean())) < 0.1 * loud:
            raise DataError(
                f"the {channels} channels cancel out: their mean has less than a tenth of their level, "
                "as when one is wired the wrong way round",
                'mono="first", or the number of a channel',
            )
        return mixed
    place = 0 if mono == "first" else mono
    if not isinstance(place, int) or isinstance(place, bool) or not 0 <= place < channels:
        raise DataError(
            f"mono is {mono!r}, expected 'mean', 'first' or a channel from 0 to {channels - 1}"
        )
    return array[:, place]


def decibels(samples: numpy.ndarray) -> float:
    """Root mean square relative to full scale; −inf for digital silence."""
    level = float(numpy.sqrt(numpy.mean(samples.astype(numpy.float64) ** 2)))
    return 20 * float(numpy.log10(level)) if level else float("-inf")


def notes_on(samples: numpy.ndarray) -> tuple[str, ...]:
    """What a listener would want to know of samples (N,): silence, clipping, an offset."""
    found = []
    level, clipped = decibels(samples), float((numpy.abs(samples) >= CLIPPED).mean())
    offset = float(samples.mean(dtype=numpy.float64))
    if level < SILENT:
        found.append(
            f"silence: {level:.0f} dB below full scale".replace("-inf", "−∞").replace("-", "−")
        )
    if clipped >= 0.001:
        found.append(f"clipping: {100 * clipped:.1f} % of the samples at full scale")
    if abs(offset) > 0.05:
        found.append(f"offset: the mean is {offset:.2f}, expected about 0")
    return tuple(found)
