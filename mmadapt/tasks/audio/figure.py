"""Pictures of a clip."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy

from mmadapt.core.figure import BLUE, HEAT, VERMILION, drawn, new_figure
from mmadapt.tasks.audio.levels import CLIPPED

if TYPE_CHECKING:
    from mmadapt.tasks.audio.clip import Audio
    from mmadapt.tasks.audio.spectrum import SpectrumFeatures


@drawn
def clip_figure(clip: Audio, features: SpectrumFeatures | None = None) -> Any:
    """The wave's envelope, samples at full scale marked; below it the normalised spectrogram.

    What the model sees is shown with its padding, behind a line where the clip ends.
    """
    figure = new_figure(8, 2.2 if features is None else 4.4)
    panels = figure.subplots(1 if features is None else 2, 1, squeeze=False)[:, 0]
    wave = panels[0]
    draw_wave(wave, clip, reach=1.0)
    wave.set_title(repr(clip), loc="left")
    if features is None:
        wave.set_xlim(0, clip.seconds)
        wave.set_xlabel("seconds")
        return figure
    batch = features.batch([clip])
    seen = batch.inputs["input_values"][0].numpy()
    step, end = 0.01, len(seen) * 0.01
    wave.set_xlim(0, end)
    mel = panels[1]
    image = mel.imshow(
        seen.T, origin="lower", aspect="auto", extent=(0, end, 0, seen.shape[1]), cmap=HEAT
    )
    heard = int(batch.lengths[0])
    if heard < len(seen):
        mel.axvline(heard * step, color="white", linestyle="--")
        mel.text(heard * step, seen.shape[1], " padding", color="white", va="top", fontsize=8)
    mel.set_ylabel("mel bins")
    mel.set_xlabel("seconds: what the model sees")
    figure.colorbar(image, ax=mel, label="normalised log energy")
    return figure


def draw_wave(axes: Any, clip: Audio, start: float = 0.0, reach: float | None = None) -> None:
    """A clip's envelope from `start` seconds on, samples at full scale marked.

    From −reach to reach, by default as far as the clip goes.
    """
    times, low, high = envelope(clip)
    axes.fill_between(start + times, low, high, linewidth=0.5, color=BLUE)
    loud = numpy.maximum(high, -low) >= CLIPPED
    if loud.any():
        marks = numpy.full(int(loud.sum()), 1.0)
        axes.plot(start + times[loud], marks, "|", color=VERMILION, label="full scale")
        axes.legend(loc="upper right")
    reach = reach or max(float(high.max()), float(-low.min()), 1e-6)
    axes.set_ylim(-1.05 * reach, 1.05 * reach)
    axes.set_ylabel("samples")


def envelope(clip: Audio, most: int = 1200) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
    """Times in seconds, and the lowest and highest sample around each, at most `most` of them."""
    count = min(most, len(clip))
    starts = numpy.linspace(0, len(clip), count, endpoint=False).astype(int)
    low = numpy.minimum.reduceat(clip.samples, starts)
    high = numpy.maximum.reduceat(clip.samples, starts)
    return starts / clip.rate, low, high
