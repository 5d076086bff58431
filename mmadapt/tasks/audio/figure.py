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
    times, low, high = envelope(clip)
    wave = panels[0]
    wave.fill_between(times, low, high, linewidth=0.5, color=BLUE)
    loud = numpy.maximum(high, -low) >= CLIPPED
    if loud.any():
        wave.plot(
            times[loud], numpy.ones(int(loud.sum())), "|", color=VERMILION, label="full scale"
        )
        wave.legend(loc="upper right")
    wave.set_ylim(-1.05, 1.05)
    wave.set_ylabel("samples")
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


def envelope(clip: Audio, most: int = 1200) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
    """Times in seconds, and the lowest and highest sample around each, at most `most` of them."""
    count = min(most, len(clip))
    starts = numpy.linspace(0, len(clip), count, endpoint=False).astype(int)
    low = numpy.minimum.reduceat(clip.samples, starts)
    high = numpy.maximum.reduceat(clip.samples, starts)
    return starts / clip.rate, low, high
