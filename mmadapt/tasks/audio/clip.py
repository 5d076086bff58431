"""A recording as a value that can be heard and seen."""

from __future__ import annotations

import html
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy

from mmadapt.core.svg import wave_svg
from mmadapt.errors import DataError
from mmadapt.tasks.audio.levels import by_channel, check_samples, decibels, notes_on, to_mono
from mmadapt.tasks.audio.resample import check_rate, resample

if TYPE_CHECKING:
    from mmadapt.tasks.audio.spectrum import SpectrumFeatures

#: seconds of sound that a notebook's cell carries at most
HEARD = 30.0
_MOST = 1_800_000  # samples, about 5 MB of text in the page


@dataclass(frozen=True, eq=False)
class Audio:
    """One channel of sound: `samples` float32 (N,), about −1 to 1, at `rate` samples a second.

    `Audio.of(array, rate)` makes one of an array; `load_audio` of a file. `notes` say what a listener
    would want to know: silence, clipping, an offset, a change of the rate.
    """

    samples: numpy.ndarray
    rate: int
    name: str = ""
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "rate", check_rate(self.rate))
        array = check_samples(self.samples)
        if array.ndim != 1:
            raise DataError(
                f"the samples have the shape {array.shape}, expected one channel (N,)",
                "Audio.of(samples, rate) mixes channels down",
            )
        object.__setattr__(self, "samples", array)

    @classmethod
    def of(cls, samples: Any, rate: int, mono: str | int = "mean", name: str = "") -> Audio:
        """An array or tensor (N,), (N, channels) or (channels, N) of floats from −1 to 1, mixed down.

        `mono`: "mean", "first" or the number of a channel. Raises `DataError` for integers, values
        that are not finite, no samples, and channels that cancel out.
        """
        plain = samples.detach().cpu().numpy() if hasattr(samples, "detach") else samples
        one = to_mono(by_channel(check_samples(plain)), mono)
        return cls(one, rate, name, notes_on(one))

    @property
    def seconds(self) -> float:
        """How long it is."""
        return len(self.samples) / self.rate

    def __len__(self) -> int:
        return len(self.samples)

    def resampled(self, rate: int) -> Audio:
        """The same sound at another rate."""
        if rate == self.rate:
            return self
        note = f"resampled from {self.rate} to {rate} samples a second"
        changed = resample(self.samples, self.rate, rate)
        return replace(self, samples=changed, rate=rate, notes=(*self.notes, note))

    def cut(self, start: float = 0.0, seconds: float | None = None) -> Audio:
        """The part from `start`, `seconds` long or to the end, with its own notes."""
        first = round(start * self.rate)
        last = len(self) if seconds is None else first + round(seconds * self.rate)
        if not 0 <= first < len(self) or last <= first:
            raise DataError(
                f"a cut from {start:g} s, {seconds if seconds is None else f'{seconds:g}'} s long, of "
                f"{self.seconds:.2f} s of sound holds no samples"
            )
        part = self.samples[first:last]
        return replace(self, samples=part, notes=notes_on(part))

    def player(self, seconds: float = HEARD) -> Any:
        """An `IPython.display.Audio` of its first seconds, at its own level; what is beyond ±1 is cut."""
        from IPython.display import Audio as Player

        heard = self.samples[: min(round(seconds * self.rate), _MOST)]
        return Player(numpy.clip(heard, -1.0, 1.0), rate=self.rate, normalize=False)

    def figure(self, features: SpectrumFeatures | None = None) -> Any:
        """The wave and, with `features`, what a spectrogram model sees of it, as a matplotlib figure."""
        from mmadapt.tasks.audio.figure import clip_figure

        return clip_figure(self, features)

    def __repr__(self) -> str:
        name = f"{self.name}: " if self.name else ""
        level = f"{decibels(self.samples):.0f} dB".replace("-inf", "−∞").replace("-", "−")
        notes = "".join(f"; {note}" for note in self.notes)
        return f"{name}{self.seconds:.2f} s at {self.rate} Hz, {level}{notes}"

    def _repr_html_(self) -> str:
        from mmadapt.tasks.audio.figure import envelope

        beyond = "; its beginning" if self.seconds > HEARD else ""
        _, low, high = envelope(self, 400)
        wave = wave_svg(low.tolist(), high.tolist(), self.seconds)
        return f"<div>{html.escape(repr(self))}{beyond}</div>{wave}{self.player()._repr_html_()}"
