"""Whisper's features, labels, training and what is longer than it hears at once."""

from __future__ import annotations

import warnings
from typing import Any

import numpy
import pytest
import torch
from backbones import ALL, VOCABULARY, _hf_whisper, spoken
from snapshot import assert_close, assert_same_values, values
from torch import Tensor

import mmadapt as mm
from mmadapt.errors import BackboneError, DataError
from mmadapt.tasks import audio
from mmadapt.tasks.whisper import IGNORED, WhisperFeatures, generate_parts

RATE = 16_000


def clip(seconds: float, name: str = "") -> audio.Audio:
    draw = numpy.random.default_rng(3)
    return audio.Audio.of(0.1 * draw.standard_normal(round(RATE * seconds)), RATE, name=name)


def whisper() -> Any:
    model: Any = _hf_whisper("ForConditionalGeneration")()
    model.generation_config.max_length = None
    return model


# -- features -----------------------------------------------------------------------------------------


def test_thirty_seconds_are_three_thousand_frames_and_silence_is_one_value() -> None:
    import transformers

    features = WhisperFeatures()
    batch = features.batch([clip(1.0), audio.Audio(numpy.zeros(RATE, numpy.float32), RATE)])
    assert batch.inputs["input_features"].shape == (2, 80, 3000)
    assert bool((batch.inputs["input_features"][1] == -1.5).all())
    assert batch.lengths.tolist() == [100, 100]
    theirs = transformers.WhisperFeatureExtractor()(
        clip(1.0).samples, sampling_rate=RATE, return_tensors="pt"
    )
    assert torch.equal(batch.inputs["input_features"][:1], theirs["input_features"])


def test_features_are_as_long_and_as_high_as_the_model_takes() -> None:
    model = whisper()
    features = WhisperFeatures.for_model(model)
    assert (features.mel_bins, features.samples) == (16, 24 * 160)
    assert WhisperFeatures.for_model(ALL["hf_whisper_bare"].fresh()) == features
    heard = features.batch([clip(0.1)]).inputs["input_features"]
    assert model.generate(heard, max_new_tokens=2).shape == (1, 2)
    with pytest.raises(BackboneError, match="no Whisper"):
        WhisperFeatures.for_model(ALL["hf_wav2vec2"].fresh())


def test_what_is_longer_than_whisper_hears_is_refused_with_the_way_on() -> None:
    with pytest.raises(
        DataError, match=r"(?s)clip 1 \(talk\) lasts 40\.0 s.*30 s at once.*windows\(clip, 30, 30\)"
    ):
        WhisperFeatures().batch([clip(1.0), clip(40.0, "talk")])
    cut = WhisperFeatures(long="cut").batch([clip(31.0)])
    assert cut.inputs["input_features"].shape == (1, 80, 3000)
    assert cut.lengths.tolist() == [3000]
    with pytest.raises(DataError, match="long is 'warn'"):
        WhisperFeatures(long="warn")  # type: ignore[arg-type]


def test_parts_of_a_long_clip_are_heard_one_by_one() -> None:
    model = whisper()
    seconds = WhisperFeatures.for_model(model).seconds
    long = clip(2.5 * seconds)
    parts = generate_parts(model, long, max_new_tokens=3)
    assert [start for start, _ in parts] == pytest.approx([0.0, seconds, 1.5 * seconds])
    features = WhisperFeatures.for_model(model)
    for start, tokens in parts:
        one = features.batch([long.cut(start, seconds)]).inputs["input_features"]
        assert torch.equal(model.generate(one, max_new_tokens=3)[0], tokens)
    assert len(generate_parts(model, long, hop=seconds / 2, max_new_tokens=1)) == 4


def test_clips_of_another_rate_or_without_samples_are_refused() -> None:
    with pytest.raises(DataError, match="8000 samples a second"):
        WhisperFeatures().batch([audio.Audio(numpy.zeros(8000, numpy.float32), 8000)])
    with pytest.raises(DataError, match="200 samples"):
        WhisperFeatures().batch([audio.Audio(numpy.zeros(200, numpy.float32), RATE)])
    with pytest.raises(DataError, match=r"(?s)sampling rate is not known.*Audio\.of"):
        WhisperFeatures().batch([clip(1.0).samples])  # type: ignore[list-item]
    with pytest.raises(DataError, match="no clips"):
        WhisperFeatures().batch([])


def test_silence_may_be_heard_and_is_warned_of_where_it_has_a_text() -> None:
    silent = audio.Audio(numpy.zeros(RATE, numpy.float32), RATE)
    features = WhisperFeatures.for_model(whisper(), long="cut")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        features.batch([silent])
        features.batch([clip(1.0)], [[5, 9]])
    with pytest.warns(UserWarning, match="clip 1 is silent, and Whisper learns to write 1 tokens"):
        batch = features.batch([clip(1.0), silent], [[5, 9], [7]])
    assert batch.inputs["labels"].tolist() == [[5, 9], [7, IGNORED]]


def test_both_channels_are_one_clip_of_whisper() -> None:
    both = numpy.stack([clip(1.0).samples] * 2, 1)
    stereo = WhisperFeatures().batch([audio.Audio.of(both, RATE)])
    mono = WhisperFeatures().batch([clip(1.0)])
    assert torch.equal(stereo.inputs["input_features"], mono.inputs["input_features"])


# -- labels -------------------------------------------------------------------------------------------


def test_labels_are_padded_with_what_the_loss_leaves_out() -> None:
    features = WhisperFeatures(start=1, vocabulary=9)
    labels = features.labels([[1, 5, 6], torch.tensor([7]), [2, 3, 4]])
    assert labels.tolist() == [[5, 6, IGNORED], [7, IGNORED, IGNORED], [2, 3, 4]]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([[]], "text 0 has no tokens"),
        ([[2], [1]], "text 1 has no tokens"),
        ([[2.5]], "holds 2.5"),
        (["one"], "text 0 is 'one', expected ids of tokens"),
        ([[2], None], "text 1 is None"),
        ([[9]], "token 9, and the model knows those from 0 to 8"),
        ([[-3]], "token -3"),
        ([[2] * 5], "5 tokens, and Whisper's decoder takes 4"),
        ([], "no texts"),
    ],
)
def test_labels_the_model_cannot_learn_from_are_named(texts: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        WhisperFeatures(start=1, vocabulary=9, most_tokens=4).labels(texts)


def test_every_clip_has_its_text() -> None:
    with pytest.raises(DataError, match="2 clips have the tokens of 1 texts"):
        WhisperFeatures().batch([clip(1.0), clip(1.0)], [[3]])


# -- training and generation ----------------------------------------------------------------------------


def batch(rows: int = 2) -> dict[str, Tensor]:
    end = VOCABULARY - 1
    texts = [[5, 9, 7, end], [8, 6, end]][:rows]
    features = WhisperFeatures.for_model(whisper())
    return {"input_features": spoken(rows)["input_features"], "labels": features.labels(texts)}


def test_padding_of_the_labels_has_no_part_in_the_loss() -> None:
    model, both = whisper(), batch()
    mm.attach(model, mm.Bottleneck(2))
    with torch.no_grad():
        whole = model(**both).loss
        longer = torch.nn.functional.pad(both["labels"], (0, 3), value=IGNORED)
        assert_close((model(both["input_features"], labels=longer).loss,), (whole,), 1e-6)
        each = [
            model(both["input_features"][i : i + 1], labels=both["labels"][i : i + 1, :n]).loss
            for i, n in ((0, 4), (1, 3))
        ]
    assert_close(((4 * each[0] + 3 * each[1]) / 7,), (whole,), 1e-5)


def test_whisper_learns_to_say_something_and_says_the_old_with_adapters_off() -> None:
    model, both = whisper(), batch()
    features = both["input_features"]
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    base = model.generate(features, **options)
    before = values(model)
    branches = ("text.layers[*].attn", "text.layers[*].cross", "text.layers[*].mlp")
    mm.attach(model, [mm.ConvAdapter(8), mm.Bottleneck(16, at=branches)])
    history = mm.fit(model, [both], steps=60, lr=3e-2, progress=False)
    assert history.losses[-1] < 0.25 * history.losses[0]  # the frozen norm and head allow no less
    learnt = model.generate(features, **options)
    assert [learnt[0, :3].tolist(), learnt[1, :2].tolist()] == [[5, 9, 7], [8, 6]]
    with mm.disabled(model):
        assert torch.equal(model.generate(features, **options), base)
    assert torch.equal(model.generate(features, **options), learnt)
    mm.detach(model)
    assert_same_values(before, values(model))
