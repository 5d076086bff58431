"""Kinds of short sounds, each drawn anew: pitch, pace, onset and decay differ from clip to clip.

`SOURCE` is what `tiny/ast` is trained on; `NEW` are kinds that it never hears in training. Every
function takes a generator of random numbers and returns one second of samples (8000,), at no
particular level.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy
from numpy.random import Generator

RATE = 8_000
SAMPLES = 8_000
TIME = numpy.arange(SAMPLES) / RATE  # seconds
_HIGHEST = 3_800.0  # Hz, a little below half the rate

Samples = numpy.ndarray


def pitch(draw: Generator, low: float, high: float) -> float:
    """A frequency in Hz, equally likely in every octave between two."""
    return math.exp(draw.uniform(math.log(low), math.log(high)))


def sine(frequency: float | Samples, draw: Generator | None = None) -> Samples:
    """A sine whose frequency in Hz may change from sample to sample, from a random phase."""
    phase = 2 * numpy.pi * numpy.cumsum(numpy.broadcast_to(frequency, SAMPLES)) / RATE
    return numpy.sin(phase + (draw.uniform(0, 2 * numpy.pi) if draw else 0.0))


def held(draw: Generator, samples: Samples) -> Samples:
    """The sound between a random onset and end, faded in and out."""
    onset, end = draw.uniform(0, 0.25), draw.uniform(0.7, 1.0)
    return samples * numpy.clip((TIME - onset) / 0.01, 0, 1) * numpy.clip((end - TIME) / 0.02, 0, 1)


def struck(samples: Samples, at: float) -> Samples:
    """The sound begun `at` seconds; what no longer fits is cut."""
    first = round(at * RATE)
    return numpy.concatenate([numpy.zeros(first), samples])[:SAMPLES]


def around(samples: Samples, centre: float, octaves: float) -> Samples:
    """A band of the sound: a bell curve of log frequency, `octaves` wide on either side."""
    spectrum = numpy.fft.rfft(samples)
    frequency = numpy.fft.rfftfreq(len(samples), 1 / RATE) + 1.0
    weight = numpy.exp(-0.5 * (numpy.log2(frequency / centre) / octaves) ** 2)
    return numpy.fft.irfft(spectrum * weight, len(samples))


# -- the kinds of the source -------------------------------------------------------------------------


def tone(draw: Generator) -> Samples:
    """One steady pitch."""
    return held(draw, sine(pitch(draw, 200, 2500), draw))


def rising_sweep(draw: Generator) -> Samples:
    """A pitch that climbs by more than an octave."""
    return held(draw, sine(_swept(draw), draw))


def falling_sweep(draw: Generator) -> Samples:
    """The other way round."""
    return held(draw, sine(_swept(draw)[::-1], draw))


def _swept(draw: Generator) -> Samples:
    low = pitch(draw, 150, 900)
    return low * draw.uniform(2.5, 4.0) ** TIME


def tremolo(draw: Generator) -> Samples:
    """A steady pitch that gets louder and softer 5 to 14 times a second."""
    carrier, waves = sine(pitch(draw, 250, 2500), draw), sine(draw.uniform(5, 14), draw)
    return held(draw, carrier * (0.5 + 0.5 * waves))


def vibrato(draw: Generator) -> Samples:
    """A pitch that goes up and down 3 to 9 times a second."""
    bend = draw.uniform(0.12, 0.3) * sine(draw.uniform(3, 9), draw)
    return held(draw, sine(pitch(draw, 400, 1800) * (1 + bend)))


def buzz(draw: Generator) -> Samples:
    """A low pitch with all its overtones."""
    base = pitch(draw, 80, 350)
    return held(draw, sum(sine(n * base, draw) / n for n in range(1, int(_HIGHEST / base) + 1)))  # type: ignore[arg-type]


def hiss(draw: Generator) -> Samples:
    """White noise."""
    return held(draw, draw.standard_normal(SAMPLES))


def wind(draw: Generator) -> Samples:
    """A band of noise that swells and falls."""
    swell = numpy.interp(TIME, numpy.linspace(0, 1, 6), draw.uniform(0.4, 1.0, 6))
    return swell * around(draw.standard_normal(SAMPLES), pitch(draw, 300, 1500), 0.5)


def pluck(draw: Generator) -> Samples:
    """A plucked string: a burst of noise that goes round, averaged with its neighbour each time.

    Karplus and Strong 1983, Digital Synthesis of Plucked-String and Drum Timbres.
    """
    return _string(draw, pitch(draw, 100, 700), draw.uniform(0, 0.3))


def _string(draw: Generator, base: float, at: float) -> Samples:
    loop, keep = draw.uniform(-1, 1, int(RATE / base)), draw.uniform(0.990, 0.998)
    turns = []
    for _ in range(-(-SAMPLES // len(loop))):
        turns.append(loop)
        loop = keep * 0.5 * (loop + numpy.roll(loop, 1))
    return struck(numpy.concatenate(turns), at)


def kick(draw: Generator) -> Samples:
    """A drum whose low pitch falls at once."""
    return _drum(draw, draw.uniform(0, 0.4))


def _drum(draw: Generator, at: float) -> Samples:
    fall = draw.uniform(100, 250) * numpy.exp(-TIME / draw.uniform(0.02, 0.05))
    return struck(
        sine(draw.uniform(45, 70) + fall) * numpy.exp(-TIME / draw.uniform(0.08, 0.2)), at
    )


def snare(draw: Generator) -> Samples:
    """A burst of noise over a short low tone."""
    rattle = draw.standard_normal(SAMPLES) * numpy.exp(-TIME / draw.uniform(0.04, 0.12))
    skin = 0.6 * sine(draw.uniform(160, 240)) * numpy.exp(-TIME / 0.06)
    return struck(rattle + skin, draw.uniform(0, 0.4))


def bell(draw: Generator) -> Samples:
    """Partials that are no multiples of one another, the high ones gone first."""
    base, decay = pitch(draw, 300, 1100), draw.uniform(0.3, 0.7)
    partials = [
        draw.uniform(0.3, 1) * sine(base * ratio) * numpy.exp(-TIME * ratio / decay)
        for ratio in (0.5, 1.0, 2.0, 2.76, 5.4)
        if base * ratio < _HIGHEST
    ]
    return struck(sum(partials), draw.uniform(0, 0.3))  # type: ignore[arg-type]


def clicks(draw: Generator) -> Samples:
    """Six to fifteen clicks, evenly spaced."""
    count = int(draw.integers(6, 16))
    places = (numpy.arange(count) / count + draw.uniform(0, 0.05)) * RATE
    train = numpy.zeros(SAMPLES)
    train[places.astype(int)] = 1.0
    return around(train, pitch(draw, 800, 2500), 0.9)


# -- kinds that are new to it ------------------------------------------------------------------------


def hump(draw: Generator) -> Samples:
    """A pitch that climbs and comes back."""
    return held(draw, sine(_bent(draw, numpy.sin(numpy.pi * TIME) ** 2), draw))


def dip(draw: Generator) -> Samples:
    """A pitch that sinks and comes back."""
    return held(draw, sine(_bent(draw, numpy.cos(numpy.pi * TIME) ** 2), draw))


def _bent(draw: Generator, shape: Samples) -> Samples:
    low = pitch(draw, 200, 700)
    return low + low * draw.uniform(0.8, 2.0) * shape


def siren(draw: Generator) -> Samples:
    """Two pitches in turns."""
    low, ratio = pitch(draw, 350, 900), draw.uniform(1.25, 1.6)
    turn = sine(draw.uniform(1.5, 3.0), draw) > 0
    return held(draw, sine(numpy.where(turn, low, low * ratio)))


def two_beeps(draw: Generator) -> Samples:
    """Two short tones of one pitch."""
    return _beeps(draw, 2)


def three_beeps(draw: Generator) -> Samples:
    """Three of them."""
    return _beeps(draw, 3)


def _beeps(draw: Generator, count: int) -> Samples:
    length, gap = draw.uniform(0.05, 0.09), draw.uniform(0.06, 0.12)
    first = draw.uniform(0.05, 0.9 - count * (length + gap))
    after = TIME - first
    on = (after >= 0) & (after < count * (length + gap)) & (after % (length + gap) < length)
    return on * sine(pitch(draw, 400, 2500))


def drops(draw: Generator) -> Samples:
    """Three to five drops of water, each a short rising chirp."""
    total = numpy.zeros(SAMPLES)
    for _ in range(int(draw.integers(3, 6))):
        rising = numpy.minimum(pitch(draw, 500, 1500) * (1 + TIME / 0.04), _HIGHEST)
        total += struck(sine(rising) * numpy.exp(-TIME / 0.02), draw.uniform(0, 0.9))
    return total


def engine(draw: Generator) -> Samples:
    """Bursts of low noise, 18 to 35 a second."""
    burst = (sine(draw.uniform(18, 35)) > 0.6).astype(float)
    return around(burst * (draw.standard_normal(SAMPLES) + 2), pitch(draw, 120, 400), 0.9)


def rising_chord(draw: Generator) -> Samples:
    """Four plucked strings, one after the other, each higher."""
    return _chord(draw, (1.0, 1.26, 1.5, 2.0))


def falling_chord(draw: Generator) -> Samples:
    """Each lower."""
    return _chord(draw, (2.0, 1.5, 1.26, 1.0))


def _chord(draw: Generator, ratios: tuple[float, ...]) -> Samples:
    base = pitch(draw, 120, 260)
    strings = [
        _string(draw, base * ratio, 0.02 + 0.2 * place + draw.uniform(0, 0.03))
        for place, ratio in enumerate(ratios)
    ]
    return sum(strings)  # type: ignore[return-value]


def gallop(draw: Generator) -> Samples:
    """Three quick drums and a rest, again and again."""
    at, period, total = draw.uniform(0, 0.1), draw.uniform(0.3, 0.42), numpy.zeros(SAMPLES)
    while at < 0.95:
        for step in (0.0, 0.07, 0.14):
            total += _drum(draw, at + step)
        at += period
    return total


Kind = Callable[[Generator], Samples]


def _named(*kinds: Kind) -> dict[str, Kind]:
    return {kind.__name__.replace("_", " "): kind for kind in kinds}


#: name -> what draws one
SOURCE: dict[str, Kind] = _named(
    tone, rising_sweep, falling_sweep, tremolo, vibrato, buzz, hiss, wind, pluck, kick, snare, bell,
    clicks,
)  # fmt: skip
NEW: dict[str, Kind] = _named(
    hump, dip, siren, two_beeps, three_beeps, drops, engine, rising_chord, falling_chord, gallop
)
