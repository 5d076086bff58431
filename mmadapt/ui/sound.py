"""A recording to hear and to see: its wave, its spectrum, and what a model heard along time."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from mmadapt.core.figure import (
    HEAT,
    INK,
    ORANGE,
    SKY,
    VERMILION,
    drawn,
    img,
    new_figure,
    png,
)
from mmadapt.errors import DataError
from mmadapt.ui.base import ipywidgets
from mmadapt.ui.settings import Settings, Value

if TYPE_CHECKING:
    from mmadapt.tasks.asr import Alignment, Transcript
    from mmadapt.tasks.audio import Audio
    from mmadapt.tasks.tagging import Tags

#: what lies behind a word that is right, replaced or added
_BEHIND = {"": SKY, "S": ORANGE, "I": VERMILION}
#: rows of classes
_CLASSES = 6


def audio(heard: Audio | Tags | Transcript, clip: Audio | None = None, said: str = "", mel: bool = True) -> AudioView:  # fmt: skip
    """Hear a clip, and see its wave, its spectrum and what was heard in it under one axis of time.

    `heard` is an `audio.Audio`; or `tagging.Tags`, whose likeliest classes stand along time; or an
    `asr.Transcript` with its `clip`, whose words do. With `said`, what was really said, words are
    aligned with it: S replaced, I added, D missing. `mel` draws the log-mel spectrum, up to half the
    clip's rate, which needs torchaudio.

    `span` is what is seen and heard, (start, end) in seconds, and may be assigned: the sliders and the
    list of words set it. At most 30 seconds are put into the page to be heard.

        w = mm.ui.audio(recogniser(clip), clip, said="nine four")
        w.span = (0.5, 1.2)
        w.alignment
    """
    return AudioView(heard, clip, said, mel)


class AudioView(Settings):
    """What `mm.ui.audio` gives."""

    span: Value[tuple[float, float]] = Value()
    delay = 0.15

    def __init__(self, heard: Any, clip: Any = None, said: str = "", mel: bool = True) -> None:
        from mmadapt.tasks.asr import Transcript, align
        from mmadapt.tasks.audio import Audio
        from mmadapt.tasks.tagging import Tags

        self.tags: Tags | None = heard if isinstance(heard, Tags) else None
        self.transcript: Transcript | None = heard if isinstance(heard, Transcript) else None
        own = heard if isinstance(heard, Audio) else getattr(heard, "clip", clip)
        if not isinstance(own, Audio):
            wanted = "its clip beside it" if self.transcript else "an Audio, Tags or a Transcript"
            raise DataError(
                f"got {type(heard).__name__} and {type(clip).__name__}, expected {wanted}",
                "audio.load_audio(path) reads a clip; mm.ui.audio(transcript, clip)",
            )
        if said and self.transcript is None:
            raise DataError("said is compared with a Transcript, and there is none")
        self.clip, self.mel = own, mel
        #: what was said beside what was heard, where `said` was given
        self.alignment: Alignment | None = None
        if said and self.transcript is not None:
            words = self.transcript.words
            self.alignment = align(said, " ".join(word.text for word in words)).timed(words)
        super().__init__(span=(0.0, own.seconds))

    def _checked(self, values: dict[str, Any]) -> dict[str, Any]:
        try:
            start, end = (float(v) for v in values["span"])
        except (TypeError, ValueError):
            start, end = math.nan, math.nan
        start, end = max(start, 0.0), min(end, self.clip.seconds)
        if not end - start >= 0.01:
            raise DataError(
                f"span is {values['span']!r}, expected (start, end) in seconds, at least 0.01 s of the "
                f"clip's {self.clip.seconds:.2f} s"
            )
        return {"span": (start, end)}

    @property
    def part(self) -> Audio:
        """What is seen and heard, as a clip of its own."""
        start, end = self.span
        return self.clip.cut(start, end - start)

    # -- what is shown ------------------------------------------------------------------------------

    def _controls(self) -> dict[str, Any]:
        widgets = ipywidgets()
        span = widgets.FloatRangeSlider(
            value=self.span, min=0.0, max=self.clip.seconds, step=max(self.clip.seconds / 500, 0.001),
            description="seconds", readout_format=".2f", continuous_update=False,
            layout={"width": "40em"},
        )  # fmt: skip
        return {"span": span}

    def _build(self) -> Any:
        widgets, box = ipywidgets(), super()._build()
        places = self._places()
        if places:
            options = [("everything", (0.0, self.clip.seconds)), *places]
            words = widgets.Dropdown(options=options, description="go to")
            words.observe(self.handler(self._go), "value")
            box.children = (box.children[0], words, *box.children[1:])
        return box

    def _go(self, change: Any) -> None:
        self.span = change["new"]

    def _places(self) -> list[tuple[str, tuple[float, float]]]:
        """What there is to go to: words, or windows in which a class is likeliest."""
        if self.transcript is not None:
            return [
                (f"{w.text}  {w.start:.2f}–{w.end:.2f} s", (max(w.start - 0.05, 0), w.end + 0.05))
                for w in self.transcript.words
            ]
        if self.tags is None:
            return []
        from mmadapt.tasks.tagging.figure import likeliest

        found = []
        for k in likeliest(self.tags, _CLASSES):
            at = self.tags.starts[int(self.tags.each[:, k].argmax())]
            found.append((f"{self.tags.names[k]}  {at:.2f} s", (at, at + self.tags.seconds)))
        return found

    def _html(self) -> str:
        from mmadapt.tasks.audio.clip import HEARD

        part = self.part
        beyond = f" <small>the first {HEARD:.0f} s</small>" if part.seconds > HEARD else ""
        aligned = self.alignment._repr_html_() if self.alignment is not None else ""
        picture = img(png(self.figure(), dpi=90), self._text())
        return f"<div>{part.player()._repr_html_()}{beyond}</div><div>{picture}</div>{aligned}"

    def _text(self) -> str:
        lines = [repr(self.clip)]
        if self.transcript is not None:
            lines.append(repr(self.transcript))
        if self.tags is not None:
            lines.append(repr(self.tags))
        if self.alignment is not None:
            lines.append(str(self.alignment))
        return "\n".join(lines)

    @drawn
    def figure(self) -> Any:
        """Wave, spectrum, words and classes of the span, one above the other."""
        rows = {"wave": 1.1}
        if self.mel:
            rows["mel"] = 1.6
        if self.transcript is not None:
            rows["words"] = 0.55
        if self.tags is not None:
            rows["tags"] = 0.25 * min(_CLASSES, len(self.tags.names))
        figure = new_figure(9, sum(rows.values()) + 0.9)
        axes = figure.subplots(
            len(rows), 1, sharex=True, squeeze=False, height_ratios=list(rows.values())
        )[:, 0]
        for name, own in zip(rows, axes, strict=True):
            getattr(self, f"_draw_{name}")(own)
        axes[-1].set_xlim(*self.span)
        axes[-1].set_xlabel("seconds")
        return figure

    def _draw_wave(self, axes: Any) -> None:
        from mmadapt.tasks.audio.figure import draw_wave

        draw_wave(axes, self.part, self.span[0])

    def _draw_mel(self, axes: Any) -> None:
        from matplotlib import colormaps

        from mmadapt.tasks.audio import SpectrumFeatures

        colours = colormaps[HEAT].resampled(24)  # noise in fine shades would make large files
        start, end = self.span
        part = self.part
        frames = max(math.ceil(part.seconds * 100) + 2, 4)
        features = SpectrumFeatures(frames=frames, bins=64, mean=0.0, std=0.5, rate=part.rate)
        batch = features.batch([part])
        heard = batch.inputs["input_values"][0][: int(batch.lengths[0])].numpy()
        decibels = heard * 10 / math.log(10)
        image = axes.imshow(
            decibels.T, colours, origin="lower", aspect="auto", extent=(start, end, 0, 64),
            vmin=max(float(decibels.min()), float(decibels.max()) - 80),
        )  # fmt: skip
        axes.set_ylabel("mel bins")
        bar = axes.figure.colorbar(image, ax=axes, label="dB", pad=0.01)
        bar.outline.set_visible(False)

    def _draw_words(self, axes: Any) -> None:
        assert self.transcript is not None
        kinds = [pair[0] for pair in self.alignment.pairs if pair[2]] if self.alignment else []
        for place, word in enumerate(self.transcript.words):
            kind = kinds[place] if kinds else ""
            width = max(word.end - word.start, 0.01)
            axes.broken_barh([(word.start, width)], (0, 1), color=_BEHIND[kind], alpha=0.55)
            label = f"{word.text} ({kind})" if kind else word.text
            axes.text(
                word.start + width / 2, 0.5, label, ha="center", va="center", clip_on=True,
                color=INK, parse_math=False,
            )  # fmt: skip
        axes.set_ylim(0, 1)
        axes.set_yticks([])
        axes.set_ylabel("words", rotation=0, ha="right", va="center")
        axes.spines[:].set_visible(False)

    def _draw_tags(self, axes: Any) -> None:
        from mmadapt.tasks.tagging.figure import draw_classes

        assert self.tags is not None
        draw_classes(axes, self.tags, _CLASSES)
