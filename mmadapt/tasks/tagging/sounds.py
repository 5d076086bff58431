"""Generated recordings of short sounds: clean ones, those of a noisy hall, and several at once.

`tiny/ast` is trained on `sounds(…, SOURCE, STUDIO)` alone. Two shifts lead away from it: the same
kinds of sounds in a `HALL`, and `NEW` kinds there. Clips of another seed are other clips: every
pitch, pace, onset, noise and echo is drawn anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy
from numpy.random import Generator

from mmadapt.errors import DataError
from mmadapt.tasks.audio.clip import Audio
from mmadapt.tasks.tagging.kinds import NEW, RATE, SAMPLES, SOURCE, Kind, Samples, wind

__all__ = ["HALL", "NEW", "RATE", "SOURCE", "STUDIO", "Place", "mixtures", "sounds"]


@dataclass(frozen=True)
class Place:
    """Where sounds are recorded: decibels of signal above noise, and seconds until echoes are gone.

    Both are ranges to draw from. Noise is white or, as often, wind; without `echo` there is none.
    """

    above_noise: tuple[float, float]
    echo: tuple[float, float] | None = None


STUDIO = Place((15.0, 35.0))
HALL = Place((0.0, 10.0), (0.15, 0.45))


def sounds(
    count: int, seed: int, kinds: Mapping[str, Kind] = SOURCE, place: Place = STUDIO
) -> tuple[list[Audio], numpy.ndarray]:
    """`count` clips of 1 s at 8 kHz, the kinds in turns, and which kind each is, int64 (count,)."""
    _check(count)
    draw, names = numpy.random.default_rng(seed), list(kinds)
    labels = numpy.arange(count) % len(names)
    clips = [
        _recorded(draw, _level(kinds[names[label]](draw)), place, names[label]) for label in labels
    ]
    return clips, labels


def mixtures(
    count: int,
    seed: int,
    kinds: Mapping[str, Kind] = SOURCE,
    place: Place = STUDIO,
    most: int = 3,
) -> tuple[list[Audio], numpy.ndarray]:
    """`count` clips in which 1 to `most` different kinds sound at once, and which, bool (count, K).

    Levels lie within 6 dB of one another.
    """
    _check(count)
    draw, names = numpy.random.default_rng(seed), list(kinds)
    labels = numpy.zeros((count, len(names)), bool)
    clips = []
    for row in labels:
        chosen = draw.permutation(len(names))[: int(draw.integers(1, most + 1))]
        row[chosen] = True
        parts = [
            10 ** (draw.uniform(-6, 0) / 20) * _level(kinds[names[kind]](draw)) for kind in chosen
        ]
        name = " + ".join(names[kind] for kind in sorted(chosen))
        clips.append(_recorded(draw, _level(numpy.sum(parts, 0)), place, name))
    return clips, labels


def _check(count: int) -> None:
    if not isinstance(count, int) or count < 1:
        raise DataError(f"count is {count!r}, expected a whole number of at least 1")


def _level(samples: Samples) -> Samples:
    """At a root mean square of 1."""
    return samples / (numpy.sqrt(numpy.mean(samples**2)) + 1e-9)


def _recorded(draw: Generator, samples: Samples, place: Place, name: str) -> Audio:
    if place.echo is not None:
        samples = _level(_echoing(draw, samples, draw.uniform(*place.echo)))
    noise = draw.standard_normal(SAMPLES) if draw.random() < 0.5 else wind(draw)
    samples = samples + _level(noise) * 10 ** (-draw.uniform(*place.above_noise) / 20)
    loud = _level(samples) * 0.08 * 10 ** draw.uniform(-0.3, 0.3)
    return Audio(loud / max(1.0, numpy.abs(loud).max() / 0.95), RATE, name)


def _echoing(draw: Generator, samples: Samples, seconds: float) -> Samples:
    """Heard through a room: the sound itself, then noise that falls by 60 dB in so many seconds."""
    time = numpy.arange(round(0.4 * RATE)) / RATE
    response = draw.standard_normal(len(time)) * numpy.exp(-6.9 * time / seconds)
    response[0] += draw.uniform(4, 10)
    size = SAMPLES + len(time)
    spectrum = numpy.fft.rfft(samples, size) * numpy.fft.rfft(response, size)
    return numpy.fft.irfft(spectrum, size)[:SAMPLES]
