"""Sound on its way to a model: what is read, what is refused, what the model sees."""

from __future__ import annotations

import io
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import soundfile
import torch
from backbones import ALL, CLASSES
from snapshot import assert_close

import mmadapt as mm
from mmadapt.errors import DataError, MissingDependencyError
from mmadapt.tasks import audio
from mmadapt.tasks.audio.levels import decibels

RATE = 16_000


def tone(seconds: float = 1.0, rate: int = RATE, hertz: float = 440.0, level: float = 0.3) -> Any:
    """A sine, float32 (N,)."""
    times = numpy.arange(round(seconds * rate)) / rate
    return (level * numpy.sin(2 * numpy.pi * hertz * times)).astype(numpy.float32)


def noise(seconds: float = 1.0, seed: int = 0) -> audio.Audio:
    draw = numpy.random.default_rng(seed)
    return audio.Audio.of(0.1 * draw.standard_normal(round(seconds * RATE)), RATE)


def written(path: Path, samples: Any, rate: int = RATE, **options: Any) -> Path:
    soundfile.write(path, samples, rate, **options)
    return path


# -- files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["wav", "flac", "aiff"])
def test_a_file_without_loss_is_read_as_it_was_written(tmp_path: Path, ending: str) -> None:
    clip = audio.load_audio(written(tmp_path / f"tone.{ending}", tone(), subtype="PCM_16"))
    assert (clip.rate, len(clip), clip.samples.dtype) == (RATE, RATE, numpy.float32)
    assert numpy.abs(clip.samples - tone()).max() < 1e-4
    assert (clip.name, clip.notes) == (f"tone.{ending}", ())


@pytest.mark.parametrize("kind", [("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III")])
def test_files_with_loss_are_read_from_memory_too(kind: tuple[str, str]) -> None:
    buffer = io.BytesIO()
    soundfile.write(buffer, tone(), RATE, format=kind[0], subtype=kind[1])
    buffer.seek(0)
    clip = audio.load_audio(buffer)
    assert clip.rate == RATE
    assert abs(clip.seconds - 1.0) < 0.1
    assert abs(decibels(clip.samples) - decibels(tone())) < 1.0


def test_a_part_of_a_file_is_read_alone(tmp_path: Path) -> None:
    path = written(tmp_path / "ramp.wav", numpy.linspace(0, 0.5, RATE), subtype="FLOAT")
    part = audio.load_audio(path, start=0.5, duration=0.25)
    assert len(part) == RATE // 4
    assert abs(part.samples[0] - 0.25) < 1e-3
    with pytest.raises(DataError, match=r"has 1.00 s, and start is 2"):
        audio.load_audio(path, start=2.0)


def test_another_rate_is_resampled_and_says_so(tmp_path: Path) -> None:
    path = written(tmp_path / "cd.wav", tone(rate=44_100), 44_100)
    clip = audio.load_audio(path)
    assert (clip.rate, len(clip)) == (RATE, RATE)
    assert "resampled from 44100 to 16000" in repr(clip)
    middle = slice(200, -200)
    assert numpy.abs(clip.samples[middle] - tone()[middle]).max() < 0.002
    assert audio.load_audio(path, rate=None).rate == 44_100


def test_nearly_coprime_rates_take_no_longer_than_others() -> None:
    """A windowed-sinc table for 44,101 → 16,000 would have 700 million entries."""
    counted: list[int] = []
    for rate in (44_100, 44_101):
        made = audio.resample(tone(2.0, rate), rate, RATE)
        counted.append(len(made))
        assert numpy.abs(made[200:-200] - tone(2.0)[200 : len(made) - 200]).max() < 0.002
    assert counted == [32_000, 32_000]
    with pytest.raises(DataError, match="sampling rate is 0"):
        audio.resample(tone(), 0, RATE)


def test_frequencies_that_do_not_fit_are_taken_out_not_folded() -> None:
    made = audio.resample(tone(1.0, 44_100, hertz=15_000), 44_100, RATE)
    assert decibels(made[1000:-1000]) < decibels(tone()) - 40


@pytest.mark.parametrize("name", ["talk.m4a", "talk.webm", "talk.AAC"])
def test_formats_that_cannot_be_read_are_named_with_the_way_on(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"\0\0\0\x20ftypM4A " + bytes(64))
    with pytest.raises(DataError, match=r"(?s)talk.*does not read.*ffmpeg -i.*torchcodec"):
        audio.load_audio(path)


def test_what_is_no_sound_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.wav").write_text("dear diary")
    with pytest.raises(DataError, match=r"(?s)notes.wav cannot be read as sound.*WAV, FLAC"):
        audio.load_audio(tmp_path / "notes.wav")
    with pytest.raises(DataError, match=r"(?s)there is no file.*dog.wav.*notes.wav"):
        audio.load_audio(str(tmp_path / "dog.wav"))
    with pytest.raises(DataError, match="is a folder"):
        audio.load_audio(tmp_path)
    empty = written(tmp_path / "empty.wav", numpy.zeros(0, numpy.float32))
    with pytest.raises(DataError, match="has no samples"):
        audio.load_audio(empty)
    with pytest.raises(DataError, match=r"(?s)a ndarray is no file.*Audio\.of"):
        audio.load_audio(tone())
    broken = written(tmp_path / "broken.wav", tone() * numpy.nan, subtype="FLOAT")
    with pytest.raises(DataError, match="16000 of 16000 samples are not finite"):
        audio.load_audio(broken)


def test_a_file_of_fewer_samples_than_channels_keeps_its_channels(tmp_path: Path) -> None:
    frames = numpy.array([[0.1, 0.3, 0.5]])
    clip = audio.load_audio(written(tmp_path / "click.wav", frames, subtype="FLOAT"))
    assert clip.samples.tolist() == pytest.approx([0.3])
    assert "mean of 3 channels" in repr(clip)
    assert len(audio.load_audio((tmp_path / "click.wav").read_bytes(), mono=2)) == 1


def test_without_soundfile_the_error_is_the_line_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(MissingDependencyError, match=r"mmadapt\[audio\]"):
        audio.load_audio("dog.wav")
    monkeypatch.setitem(sys.modules, "torchaudio.compliance", None)
    with pytest.raises(MissingDependencyError, match=r"mmadapt\[audio\]"):
        audio.SpectrumFeatures().spectrum(noise())


# -- samples ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("samples", "words"),
    [
        ((tone() * 32767).astype(numpy.int16), r"int16, whose loudest is 32768.*/ 32768"),
        ((tone() * 100 + 128).astype(numpy.uint8), r"uint8.*/ 128 - 1"),
        (tone() * 32767, r"reach 98\d\d.*32768 for 16 bits"),
        (numpy.zeros(0), "no samples"),
        (numpy.array(["a"]), "expected floats"),
        (numpy.where(numpy.arange(9) == 4, numpy.nan, 0.1), r"1 of 9 .* first at 4: nan"),
        (numpy.where(numpy.arange(9) > 6, numpy.inf, 0.1), r"2 of 9 .* first at 7: inf"),
        (numpy.zeros((2, 3, 4)) + 0.1, r"shape \(2, 3, 4\)"),
        (numpy.zeros((100, 100)) + 0.1, r"one recording at a time"),
    ],
)
def test_samples_no_model_could_make_sense_of_are_refused(samples: Any, words: str) -> None:
    with pytest.raises(DataError, match=f"(?s){words}"):
        audio.Audio.of(samples, RATE)


@pytest.mark.parametrize("rate", [None, 0, -1, 16e3, True, 10**7])
def test_a_rate_that_is_none_is_refused(rate: Any) -> None:
    with pytest.raises(DataError, match="sampling rate"):
        audio.Audio.of(tone(), rate)


@pytest.mark.parametrize(
    ("samples", "note"),
    [
        (numpy.zeros(100, numpy.float32), "silence: −∞ dB"),
        (tone(level=1e-4), "silence: −83 dB"),
        (numpy.clip(tone(level=3.0), -1, 1), r"clipping: \d+"),
        (tone() + 0.2, "offset: the mean is 0.20"),
    ],
)
def test_what_a_listener_would_notice_is_noted(samples: Any, note: str) -> None:
    import re

    clip = audio.Audio.of(samples, RATE)
    assert any(re.match(note, found) for found in clip.notes)
    assert re.search(note, repr(clip))
    assert audio.Audio.of(tone(), RATE).notes == ()


# -- channels -----------------------------------------------------------------------------------------


def test_channels_are_mixed_down_and_never_taken_for_a_batch() -> None:
    left, right = tone(), tone(hertz=880.0)
    both = numpy.stack([left, right], 1)
    for array in (both, both.T, torch.from_numpy(both).requires_grad_(True)):
        assert_same(audio.Audio.of(array, RATE).samples, (left + right) / 2)
    assert_same(audio.Audio.of(both, RATE, mono="first").samples, left)
    assert_same(audio.Audio.of(both, RATE, mono=1).samples, right)
    with pytest.raises(DataError, match="expected 'mean', 'first' or a channel from 0 to 1"):
        audio.Audio.of(both, RATE, mono=2)
    with pytest.raises(DataError, match=r"(?s)one channel.*Audio\.of"):
        audio.Audio(both, RATE)


def assert_same(one: Any, other: Any) -> None:
    assert numpy.abs(one - other).max() < 1e-6


def test_channels_that_cancel_out_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "wired.wav", numpy.stack([tone(), -tone()], 1), subtype="FLOAT")
    with pytest.raises(DataError, match=r'(?s)cancel out.*mono="first"'):
        audio.load_audio(path)
    assert_same(audio.load_audio(path, mono="first").samples, tone())
    silent = numpy.zeros((100, 2), numpy.float32)
    assert "silence" in repr(audio.Audio.of(silent, RATE))


# -- spectrograms ---------------------------------------------------------------------------------------


def test_spectrograms_are_exactly_those_of_transformers() -> None:
    from transformers import ASTFeatureExtractor

    clips = [noise(0.6), noise(1.0, 1)]
    batch = audio.SpectrumFeatures(frames=128).batch(clips)
    theirs = ASTFeatureExtractor(max_length=128)([c.samples for c in clips], sampling_rate=RATE)
    expected = torch.as_tensor(numpy.stack(theirs["input_values"]))
    assert torch.equal(batch.inputs["input_values"], expected)
    assert batch.lengths.tolist() == [58, 98]


def test_padding_is_louder_than_silence_as_published() -> None:
    features = audio.SpectrumFeatures()
    silence = audio.Audio.of(numpy.zeros(RATE, numpy.float32), RATE)
    (seen,) = features.batch([silence]).inputs["input_values"]
    assert abs(float(seen[200, 0]) - 0.46703) < 1e-4
    assert abs(float(seen[50].mean()) + 1.27759) < 1e-4


def test_a_clip_of_a_batch_is_what_it_is_alone() -> None:
    clips = [noise(0.5), noise(1.5, 1)]
    for features in (audio.SpectrumFeatures(frames=160, masked=True), audio.WaveFeatures()):
        whole = features.batch(clips)
        alone = features.batch(clips[:1])
        length = alone.inputs["input_values"].shape[1]
        for name, value in alone.inputs.items():
            assert torch.equal(whole.inputs[name][0, : value.shape[1]], value[0])
            assert length


@pytest.mark.parametrize(
    ("frames", "tokens"), [(100, 110), (400, 470), (500, 590), (800, 950), (1024, 1214)]
)
def test_the_tokens_of_ast_are_counted_as_it_counts_them(frames: int, tokens: int) -> None:
    features = audio.SpectrumFeatures(frames=frames)
    bands, columns = features.grid
    assert 2 + bands * columns == tokens
    assert features.token_mask(torch.tensor([frames, 1])).sum(1).tolist() == [tokens, 2 + 12]


def test_spectra_of_the_wrong_clips_are_refused() -> None:
    features = audio.SpectrumFeatures(frames=100)
    short = audio.Audio.of(tone()[:399], RATE, name="click")
    for clips, words in (
        ([short], r"clip 0 \(click\) has 399 samples, 25 ms, and the model needs 400"),
        ([audio.Audio.of(tone(rate=8000), 8000)], r"8000 .* expects 16000.*resampled\(16000\)"),
        ([tone()], r"clip 0 is a ndarray, whose sampling rate is not known.*Audio.of"),
        ([noise(2.0)], r"2\.00 s long, 198 frames.*takes 100, 1\.01 s.*cut.*over_windows"),
        ([], "no clips"),
    ):
        with pytest.raises(DataError, match=f"(?s){words}"):
            features.batch(clips)  # type: ignore[arg-type]


def test_statistics_of_a_data_set_bring_it_to_zero_and_a_half() -> None:
    clips = [noise(0.5, seed) for seed in range(3)]
    fitted = audio.SpectrumFeatures(frames=100).fitted(clips)
    batch = fitted.batch(clips)
    values = torch.cat(
        [v[:n] for v, n in zip(batch.inputs["input_values"], batch.lengths, strict=True)]
    )
    assert abs(float(values.mean())) < 1e-4
    assert abs(float(values.std()) - 0.5) < 1e-3
    with pytest.raises(DataError, match="digital silence"):
        fitted.fitted([audio.Audio.of(numpy.zeros(RATE, numpy.float32), RATE)])


def test_features_are_those_the_model_was_made_for() -> None:
    ast, speech = ALL["hf_ast"].fresh(), ALL["hf_wav2vec2"].fresh()
    features = audio.SpectrumFeatures.for_model(ast)
    assert (features.frames, features.bins, features.grid) == (24, 16, (3, 5))
    assert not audio.WaveFeatures.for_model(speech).masked
    assert audio.WaveFeatures.for_model(ALL["hf_wavlm"].fresh()).masked
    with pytest.raises(DataError, match=r"WaveFeatures\.for_model"):
        audio.SpectrumFeatures.for_model(speech)
    with pytest.raises(DataError, match=r"SpectrumFeatures\.for_model"):
        audio.WaveFeatures.for_model(ast)


# -- waves ----------------------------------------------------------------------------------------------


def test_frames_of_a_wave_are_counted_and_too_few_samples_refused() -> None:
    features = audio.WaveFeatures()
    counts = {400: 1, 720: 2, 16_000: 49, 160_000: 499, 399: 0, 0: 0}
    assert {samples: features.frames(samples) for samples in counts} == counts
    assert features.least == 400
    with pytest.raises(DataError, match="needs 400 for one frame"):
        features.batch([audio.Audio.of(tone()[:399], RATE)])


def test_waves_are_those_of_transformers_with_its_mask() -> None:
    from transformers import Wav2Vec2FeatureExtractor

    clips = [noise(0.1), noise(0.2, 1)]
    batch = audio.WaveFeatures().batch(clips)
    theirs: Any = Wav2Vec2FeatureExtractor(return_attention_mask=True)(
        [c.samples for c in clips], sampling_rate=RATE, padding=True, return_tensors="pt"
    )
    assert_close((batch.inputs["input_values"],), (theirs["input_values"],), 1e-5)
    assert torch.equal(batch.inputs["attention_mask"], theirs["attention_mask"].long())


def test_where_the_front_end_leaks_unequal_lengths_are_refused_unless_asked() -> None:
    clips = [noise(0.1), noise(0.2, 1)]
    features = audio.WaveFeatures(masked=False)
    with pytest.raises(DataError, match=r'(?s)1600 to 3200.*depend on those beside.*unequal="pad"'):
        features.batch(clips)
    assert "attention_mask" not in features.batch(clips[:1]).inputs
    padded = replace(features, unequal="pad").batch(clips).inputs["input_values"]
    assert padded.shape == (2, 3200)
    assert not padded[0, 1600:].any()


@pytest.mark.parametrize("name", ["hf_wav2vec2_large", "hf_wavlm"])
def test_what_a_model_makes_of_a_clip_is_the_same_in_every_batch(name: str) -> None:
    model: Any = ALL[name].fresh()
    mm.attach(model, [mm.ConvAdapter(2), mm.SoftMoA(2)])
    features = audio.WaveFeatures.for_model(model)
    clips = [audio.Audio.of(tone()[:60], RATE), audio.Audio.of(tone(hertz=3000.0)[:90], RATE)]
    with torch.no_grad():
        together, alone = (
            model(**features.batch(some).inputs, output_hidden_states=True).hidden_states[-1]
            for some in (clips, clips[:1])
        )
    frames = features.frames(60)
    assert_close((together[0, :frames],), (alone[0],), 2e-5)


# -- positions ------------------------------------------------------------------------------------------


def test_positions_are_interpolated_along_time_alone() -> None:
    model: Any = ALL["hf_ast"].fresh()
    old = model.audio_spectrogram_transformer.embeddings.position_embeddings.detach().clone()
    assert audio.fit_positions(model, 16) == (3, 3)
    new = model.audio_spectrogram_transformer.embeddings.position_embeddings
    assert new.shape == (1, 2 + 9, 16)
    assert model.config.max_length == 16
    assert torch.equal(new[:, :2], old[:, :2])
    bands, before = new[0, 2:].unflatten(0, (3, 3)), old[0, 2:].unflatten(0, (3, 5))
    for place in range(3):  # centre of the new column in the old ones: (place + ½)·5/3 − ½
        at = (place + 0.5) * 5 / 3 - 0.5
        low = int(at)
        expected = before[:, low] * (1 - at + low) + before[:, low + 1] * (at - low)
        assert_close((bands[:, place],), (expected,), 1e-5)
    features = audio.SpectrumFeatures.for_model(model)
    clip = audio.Audio.of(tone()[: 400 + 15 * 160], RATE)
    assert model(**features.batch([clip]).inputs).logits.shape == (1, CLASSES)


def test_positions_may_be_cropped_or_grow_but_not_under_adapters() -> None:
    model: Any = ALL["hf_ast_bare"].fresh()
    old = model.embeddings.position_embeddings.detach()[0, 2:].unflatten(0, (3, 5))
    audio.fit_positions(model, 16, how="crop")
    new = model.embeddings.position_embeddings[0, 2:].unflatten(0, (3, 3))
    assert torch.equal(new, old[:, 1:4])
    with pytest.raises(DataError, match="9 columns cannot be cropped from 3"):
        audio.fit_positions(model, 40, how="crop")
    assert audio.fit_positions(model, 40) == (3, 9)
    with pytest.raises(DataError, match="fewer than one patch"):
        audio.fit_positions(model, 7)
    mm.attach(model, mm.Bottleneck(2))
    with pytest.raises(DataError, match=r"(?s)adapters are attached.*before attach"):
        audio.fit_positions(model, 24)
    with pytest.raises(mm.errors.BackboneError):
        audio.fit_positions(ALL["hf_wav2vec2"].fresh(), 24)


def test_a_model_built_from_the_same_config_is_left_alone() -> None:
    from transformers import ASTForAudioClassification

    one: Any = ALL["hf_ast"].fresh()
    other: Any = ASTForAudioClassification(one.config)
    frames = other.config.max_length
    audio.fit_positions(one, 16)
    assert one.config.max_length == one.audio_spectrogram_transformer.config.max_length == 16
    assert (
        other.config.max_length == other.audio_spectrogram_transformer.config.max_length == frames
    )


def test_an_adapter_file_fits_a_model_for_shorter_clips(tmp_path: Path) -> None:
    model: Any = ALL["hf_ast"].fresh()
    mm.attach(model, mm.ConvAdapter(2)).save(tmp_path)
    shorter: Any = ALL["hf_ast"].fresh()
    audio.fit_positions(shorter, 16)
    mm.load_adapter(shorter, tmp_path)
    assert shorter(torch.randn(1, 16, 16)).logits.shape == (1, CLASSES)


# -- augmentation, windows, splits -----------------------------------------------------------------------


def test_spec_augment_masks_each_clip_by_itself_and_no_padding() -> None:
    features = audio.SpectrumFeatures(frames=160)
    batch = features.batch([noise(0.8), noise(1.5, 1), noise(1.5, 2)])
    before = batch.inputs["input_values"].clone()
    augment = audio.SpecAugment(bins=30, frames=40)
    widths: list[tuple[int, int]] = []
    for seed in range(20):
        made = augment(batch, torch.Generator().manual_seed(seed)).inputs["input_values"]
        changed = made != before
        assert not made[changed].any()
        for one, length in zip(changed, batch.lengths.tolist(), strict=True):
            assert not one[length:].any()
            rows, columns = one[:length].all(1), one[:length].all(0)
            widths.append((int(rows.sum()), int(columns.sum())))
            assert rows.sum() <= min(40, 0.2 * length)
            assert columns.sum() <= 30
    assert torch.equal(batch.inputs["input_values"], before)
    assert len(set(widths)) > 20
    assert max(tall for _, tall in widths) > 20
    with pytest.raises(DataError, match="raw waves have no bands"):
        augment(audio.WaveFeatures().batch([noise()]))
    with pytest.raises(DataError, match="share"):
        audio.SpecAugment(share=2.0)


def test_windows_cover_a_long_recording_and_the_last_ends_with_it() -> None:
    clip = noise(2.7)
    found = list(audio.windows(clip, seconds=1.0, hop=0.5))
    assert [start for start, _ in found] == [0.0, 0.5, 1.0, 1.5, 1.7]
    for start, part in found:
        first = round(start * RATE)
        assert numpy.array_equal(part.samples, clip.samples[first : first + RATE])
    assert [s for s, _ in audio.windows(noise(0.4), 1.0, 0.5)] == [0.0]
    assert [s for s, _ in audio.windows(noise(1.0), 1.0, 0.5)] == [0.0]
    with pytest.raises(DataError, match="leave sound out or never end"):
        list(audio.windows(clip, 1.0, 0.0))


def test_a_long_recording_is_the_mean_of_its_windows() -> None:
    clip = noise(2.7)
    seen: list[int] = []

    def predict(parts: list[audio.Audio]) -> torch.Tensor:
        seen.append(len(parts))
        return torch.tensor([[float(part.samples.mean()), 1.0] for part in parts])

    mean, starts, each = audio.over_windows(clip, predict, 1.0, 0.5, batch_size=2)
    assert seen == [2, 2, 1]
    assert (len(starts), each.shape) == (5, (5, 2))
    assert_close((mean,), (each.mean(0),), 1e-6)


def test_clips_that_stand_in_two_splits_are_found() -> None:
    one, two, three = noise(0.1), noise(0.2, 1), noise(0.3, 2)
    table = audio.check_splits({"train": [one, two], "test": [three]})
    assert [row[:3] for row in table.rows] == [
        ("train", 2, pytest.approx(0.3)),
        ("test", 1, pytest.approx(0.3)),
    ]
    with pytest.raises(DataError, match=r"test\[0\] is the same recording as train\[1\]"):
        audio.check_splits({"train": [one, two], "test": [replace(two, name="")]})
    silent = audio.Audio.of(numpy.zeros(900, numpy.float32), RATE)
    with pytest.raises(DataError, match=r"(?s)train\[0\] is silent.*silent=True"):
        audio.check_splits({"train": [silent]})
    assert audio.check_splits({"train": [silent]}, silent=True).rows[0][-1] == 1


# -- seen and heard ---------------------------------------------------------------------------------------


def test_a_clip_is_heard_at_its_own_level_and_not_for_ever() -> None:
    pytest.importorskip("IPython")
    quiet, long = audio.Audio.of(tone(0.2, level=0.1), RATE), noise(40.0)
    data = numpy.frombuffer(quiet.player().data[44:], numpy.int16) / 32767
    assert abs(numpy.abs(data).max() - 0.1) < 1e-3
    assert len(long.player().data) == 44 + 2 * 30 * RATE
    page = audio.Audio.of(1.2 * tone(0.2, level=1.0), RATE)._repr_html_()
    assert "clipping" in page
    assert "<audio" in page
    assert "its beginning" in long._repr_html_()


def test_the_picture_shows_the_wave_and_what_the_model_sees() -> None:
    clip = audio.Audio.of(numpy.clip(tone(level=2.0), -1, 1), RATE)
    features = audio.SpectrumFeatures(frames=160)
    figure = clip.figure(features)
    wave, mel = figure.axes[:2]
    shown = mel.images[0].get_array()
    expected = features.batch([clip]).inputs["input_values"][0]
    assert numpy.allclose(shown, expected.T)
    assert [round(float(line.get_xdata()[0]), 2) for line in mel.lines] == [0.98]
    assert wave.get_xlim() == mel.get_xlim() == (0, 1.6)
    assert "full scale" in [text.get_text() for text in wave.get_legend().get_texts()]
    (alone,) = noise(0.2).figure().axes
    assert alone.get_xlim() == (0, 0.2)
    figure.savefig(io.BytesIO())


def test_the_envelope_misses_no_peak() -> None:
    from mmadapt.tasks.audio.figure import envelope

    samples = numpy.zeros(50_000, numpy.float32)
    samples[12_345], samples[49_999] = 0.9, -0.8
    _, low, high = envelope(audio.Audio.of(samples, RATE))
    assert (round(float(high.max()), 3), round(float(low.min()), 3)) == (0.9, -0.8)
    assert len(high) == 1200


def test_cuts_stay_inside() -> None:
    clip = noise(1.0)
    assert len(clip.cut(0.25, 0.5)) == RATE // 2
    for start, seconds in ((1.0, None), (-0.1, None), (0.0, 0.0)):
        with pytest.raises(DataError, match="holds no samples"):
            clip.cut(start, seconds)


def test_the_page_about_sound_runs_as_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import re

    page = (Path(__file__).parents[1] / "docs" / "audio.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 2
    written(tmp_path / "dog.flac", tone(0.2))  # the tiny model hears a quarter of a second
    monkeypatch.chdir(tmp_path)
    ast: Any = ALL["hf_ast"].fresh()
    names: dict[str, Any] = {"ast": ast, "speech": ALL["hf_wav2vec2"].fresh()}
    for block in blocks:
        exec(block, names)
    assert list(mm.attachments(ast)) == ["light", "in-time", "mixed"]
