"""`mm.ui.audio`: hearing and seeing a clip, its words and its classes."""

from __future__ import annotations

from typing import Any

import numpy
import pytest

import mmadapt as mm
from mmadapt.tasks import audio
from mmadapt.tasks.asr import Transcript, Word
from mmadapt.tasks.tagging import Tags

torchaudio = pytest.importorskip("torchaudio")


def clip(seconds: float = 2.0, rate: int = 8000) -> audio.Audio:
    times = numpy.arange(int(seconds * rate)) / rate
    return audio.Audio.of(0.5 * numpy.sin(2 * numpy.pi * 440 * times).astype("float32"), rate, name="<tone>")  # fmt: skip


TRANSCRIPT = Transcript((Word("nine", 0.1, 0.5, 0.9), Word("$x_1$", 0.8, 1.2, 0.6)))


def tags() -> Tags:
    each = numpy.array([[0.9, 0.1, 0.0], [0.2, 0.8, 0.3]])
    return Tags(clip(), ("hum", "buzz", "hiss"), each.max(0), (0.0, 1.0), 1.0, each)


def _sound(shown: str) -> int:
    """How much of a page is the sound itself."""
    return len(shown.partition("audio/wav;base64,")[2].partition('"')[0])


def labels(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_a_clip_is_a_wave_over_a_spectrum_under_one_axis() -> None:
    w = mm.ui.audio(clip())
    wave, mel = w.figure().axes[:2]
    assert (wave.get_ylabel(), mel.get_ylabel(), mel.get_xlabel()) == ("samples", "mel bins", "seconds")  # fmt: skip
    assert wave.get_xlim() == mel.get_xlim() == (0.0, 2.0)
    loudest = numpy.asarray(mel.images[0].get_array()).mean(1).argmax()
    assert 3 < loudest < 25  # 440 Hz of 4000
    assert len(mm.ui.audio(clip(), mel=False).figure().axes) == 1


def test_words_stand_at_their_times() -> None:
    w = mm.ui.audio(TRANSCRIPT, clip(), mel=False)
    words = w.figure().axes[1]
    assert labels(words) == ["nine", "$x_1$"]
    assert [text.get_position()[0] for text in words.texts] == pytest.approx([0.3, 1.0])


def test_what_was_said_is_aligned_with_what_was_heard() -> None:
    pytest.importorskip("jiwer")
    w = mm.ui.audio(TRANSCRIPT, clip(), said="nine six", mel=False)
    assert w.alignment is not None
    assert w.alignment.errors.substitutions == 1
    assert labels(w.figure().axes[1]) == ["nine", "$x_1$ (S)"]
    assert "said  nine six" in repr(w)
    assert w.alignment._repr_html_() in w._html()


def test_classes_lie_along_time() -> None:
    w = mm.ui.audio(tags(), mel=False)
    _, classes, _ = w.figure().axes
    assert [label.get_text() for label in classes.get_yticklabels()] == ["hum", "buzz", "hiss"]


def test_the_span_is_what_is_seen_and_heard() -> None:
    w = mm.ui.audio(clip(), mel=False)
    whole = w._html()
    w.span = (0.5, 1.0)
    assert w.part.seconds == pytest.approx(0.5)
    assert w.figure().axes[0].get_xlim() == (0.5, 1.0)
    assert _sound(w._html()) < _sound(whole) / 3
    w.span = (1.5, 9.0)
    assert w.span == (1.5, 2.0)


@pytest.mark.parametrize("span", [(1.0, 0.5), (3.0, 4.0), (0.5, 0.501), 3, "ab", (None, 1)])
def test_a_span_without_sound_is_refused_and_nothing_changes(span: Any) -> None:
    w = mm.ui.audio(clip(), mel=False)
    with pytest.raises(mm.errors.DataError, match="expected .start, end. in seconds"):
        w.span = span
    assert w.span == (0.0, 2.0)


def test_the_slider_and_the_list_of_words_set_the_span() -> None:
    w = mm.ui.audio(TRANSCRIPT, clip(), mel=False)
    slider, words, shown = w.widget.children[0].children
    before = shown.value
    slider.set_state({"value": [0.25, 1.5]})
    assert w.span == (0.25, 1.5)
    assert shown.value != before
    words.set_state({"index": 1})
    assert w.span == pytest.approx((0.05, 0.55))
    assert slider.value == pytest.approx((0.05, 0.55), abs=0.01)
    words.set_state({"index": 0})
    assert w.span == (0.0, 2.0)
    assert w.error is None


def test_the_list_of_classes_goes_to_where_each_is_likeliest() -> None:
    w = mm.ui.audio(tags(), mel=False)
    words = w.widget.children[0].children[1]
    words.set_state({"index": 2})
    assert w.span == (1.0, 2.0)


def test_a_long_clip_is_heard_in_part_only() -> None:
    w = mm.ui.audio(clip(65.0), mel=False)
    assert "the first 30 s" in w._html()
    assert len(w._html()) < 1_000_000


def test_a_view_is_a_picture_and_a_text() -> None:
    bundle = mm.ui.audio(tags())._repr_mimebundle_()
    assert bundle["image/png"][:4] == b"\x89PNG"
    assert bundle["text/plain"].startswith("<tone>: 2.00 s at 8000 Hz")


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ((TRANSCRIPT,), "expected its clip beside it"),
        (("nine.wav",), "expected an Audio, Tags or a Transcript"),
        ((numpy.zeros(100),), "got ndarray"),
    ],
)
def test_what_cannot_be_heard_is_refused(given: tuple[Any, ...], text: str) -> None:
    with pytest.raises(mm.errors.DataError, match=text):
        mm.ui.audio(*given)


def test_what_was_said_needs_words_to_compare_with() -> None:
    with pytest.raises(mm.errors.DataError, match="said is compared with a Transcript"):
        mm.ui.audio(clip(), said="nine")


def test_silence_and_very_short_clips_are_drawn() -> None:
    for samples in (numpy.zeros(8000, "float32"), numpy.zeros(400, "float32")):
        assert mm.ui.audio(audio.Audio(samples, 8000))._repr_mimebundle_()["image/png"]
