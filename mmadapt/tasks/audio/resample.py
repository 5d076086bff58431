"""Changing the sampling rate."""

from __future__ import annotations

import math

import numpy

from mmadapt.errors import DataError

HIGHEST = 768_000


def check_rate(rate: object) -> int:
    """The rate in samples a second as an int, or a `DataError`."""
    whole = isinstance(rate, (int, numpy.integer)) and not isinstance(rate, bool)
    if not whole or not 1 <= int(rate) <= HIGHEST:  # type: ignore[call-overload]
        raise DataError(
            f"the sampling rate is {rate!r}, expected samples a second as a whole number from 1 to "
            f"{HIGHEST}",
            "16000, 44100 and 48000 are usual; the recording's own is in its file",
        )
    return int(rate)  # type: ignore[call-overload]


def resample(samples: numpy.ndarray, old: int, new: int) -> numpy.ndarray:
    """float32 samples (N,) at rate `old` as ⌈N·new/old⌉ samples at rate `new`.

    A polyphase filter, whose cost for each sample made does not grow with the rates' least common
    multiple: 44,101 to 16,000 takes about as long as 44,100 does.
    """
    from scipy.signal import resample_poly

    old, new = check_rate(old), check_rate(new)
    if old == new:
        return samples
    common = math.gcd(old, new)
    return resample_poly(samples, new // common, old // common).astype(numpy.float32)
