"""What is in a sound: metrics, scores, losses, models of both kinds, recordings of any length."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import numpy
import pytest
import torch
from backbones import ALL, CLASSES, LARGE, _hf_speech
from snapshot import assert_close, randomise
from torch.nn import functional as F

import mmadapt as mm
from mmadapt.errors import BackboneError, DataError
from mmadapt.tasks import audio, tagging
from mmadapt.tasks.tagging import metrics

RATE = 16_000
NAMES = ("low", "high", "noise")
DRAW = numpy.random.default_rng(0)


def clip(samples: int, seed: int = 0, name: str = "") -> audio.Audio:
    draw = numpy.random.default_rng(seed)
    return audio.Audio.of(0.1 * draw.standard_normal(samples), RATE, name=name)


def spectral(samples: int = 3000) -> list[audio.Audio]:
    """Noise, over a low tone, a high tone, or neither."""
    tones = [(400, 0.5), (4000, 0.5), (1, 0.0)]
    time = numpy.arange(samples) / RATE
    return [
        audio.Audio.of(
            0.05 * numpy.random.default_rng(seed).standard_normal(samples)
            + level * numpy.sin(2 * numpy.pi * hertz * time),
            RATE,
        )
        for seed, (hertz, level) in enumerate(2 * tones)
    ]


LABELS = [0, 1, 2, 0, 1, 2]


def ast() -> Any:
    return ALL["hf_ast"].fresh()


def scored(truth: Any, probabilities: Any, **options: Any) -> tagging.Scores:
    return tagging.Scores(NAMES, numpy.array(truth, bool), numpy.array(probabilities), **options)


# -- metrics --------------------------------------------------------------------------------------


def test_average_precision_is_its_definition() -> None:
    truth, score = [True, False, True, False], [0.9, 0.8, 0.7, 0.1]
    assert tagging.average_precision(numpy.array(truth), numpy.array(score)) == pytest.approx(
        0.5 * 1 + 0.5 * 2 / 3
    )


@pytest.mark.parametrize("levels", [3, 1000])
def test_average_precision_counts_equal_scores_together(levels: int) -> None:
    from sklearn.metrics import average_precision_score

    for _ in range(20):
        score = DRAW.integers(0, levels, 30) / levels
        truth = DRAW.random(30) < 0.3
        truth[0] = True
        ours = tagging.average_precision(truth, score)
        assert ours == pytest.approx(average_precision_score(truth, score))
        order = DRAW.permutation(30)
        assert tagging.average_precision(truth[order], score[order]) == pytest.approx(ours)
    constant = tagging.average_precision(truth, numpy.zeros(30))
    assert constant == pytest.approx(truth.mean())


def test_a_class_without_clips_is_left_out_of_means_and_named() -> None:
    truth = [[1, 0, 0], [1, 0, 0], [0, 1, 0]]
    found = scored(truth, [[0.8, 0.1, 0.1], [0.2, 0.7, 0.1], [0.3, 0.6, 0.1]])
    assert numpy.isnan(found.average_precisions[2])
    low = (1 + 2 / 3) / 2  # ranked first and third
    assert found.average_precisions[:2].tolist() == pytest.approx([low, 0.5])
    assert found.mean_average_precision == pytest.approx((low + 0.5) / 2)
    assert found.f1 == pytest.approx((2 / 3 + 2 / 3) / 2)
    assert found.absent == ("noise",)
    assert "no clips of noise: left out of means" in repr(found)
    assert found.by_class.rows[2][1:] == (0, None, None, None, None, "")
    assert numpy.isnan(metrics.mean_over_classes(numpy.array([numpy.nan])))


def test_precision_recall_and_f1_are_those_of_sklearn() -> None:
    from sklearn.metrics import precision_recall_fscore_support

    truth, answer = DRAW.random((40, 3)) < 0.4, DRAW.random((40, 3)) < 0.5
    ours = metrics.precision_recall(truth, answer)
    theirs = precision_recall_fscore_support(truth, answer, average=None)
    for mine, other in zip(ours, theirs, strict=False):
        assert mine == pytest.approx(other)
    precision, recall, f1 = metrics.precision_recall(truth, numpy.zeros_like(answer))
    assert numpy.isnan(precision).all()  # never said
    assert recall.tolist() == f1.tolist() == [0, 0, 0]


def test_a_confusion_matrix_counts_rows_of_truth() -> None:
    truth, answer = numpy.array([0, 0, 2]), numpy.array([1, 0, 1])
    assert metrics.confusion(truth, answer, 3).tolist() == [[1, 1, 0], [0, 0, 0], [0, 1, 0]]


# -- scores ---------------------------------------------------------------------------------------


def test_scores_of_one_class_a_clip() -> None:
    truth = numpy.eye(3)[[0, 0, 0, 1, 2]]
    said = numpy.eye(3)[[0, 1, 1, 1, 0]] * 0.6 + 0.1
    found = scored(truth, said)
    assert (found.accuracy, len(found)) == (0.4, 5)
    assert found.score.interval[0] < 0.4 < found.score.interval[1]
    assert found.confusion.tolist() == [[1, 2, 0], [0, 1, 0], [1, 0, 0]]
    assert found.mistakes.rows == [("low", "high", 2), ("noise", "low", 1)]
    assert found.by_class.rows[0][-1] == "high (2)"
    assert found.row()[-1] == "noise (0 %)"
    assert "40.0" in repr(found) and "<table>" in found._repr_html_()


def test_scores_of_several_tags() -> None:
    truth = [[1, 1, 0], [0, 0, 0], [0, 0, 1]]
    found = scored(truth, [[0.9, 0.8, 0.2], [0.1, 0.6, 0.1], [0.3, 0.2, 0.7]], several=True)
    assert found.accuracy == pytest.approx(2 / 3)  # all tags of a clip, and none too many
    assert found.answers.tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 1]]
    assert "most often" not in repr(found.by_class)
    assert "all right %" in repr(found)
    with pytest.raises(DataError, match=r"(?s)no confusion matrix.*by_class"):
        _ = found.confusion
    assert scored(truth, found.probabilities, several=True, threshold=0.65).accuracy == 1


def test_probabilities_that_are_none_are_refused() -> None:
    with pytest.raises(DataError, match=r"of 1 clips are not finite, first those of clip 1"):
        scored(numpy.eye(3), [[1, 0, 0], [numpy.nan, 0, 0], [0, 0, 1]])
    with pytest.raises(DataError, match=r"(?s)several tags, or none.*several=True"):
        scored([[1, 1, 0]], [[0.3, 0.3, 0.4]])
    with pytest.raises(DataError, match="a clip or more"):
        scored(numpy.zeros((0, 3)), numpy.zeros((0, 3)))


def test_evaluations_stand_side_by_side() -> None:
    right = scored(numpy.eye(3), numpy.eye(3))
    wrong = scored(numpy.eye(3), numpy.roll(numpy.eye(3), 1, 1))
    both = {"frozen": wrong, "adapted": right}
    rows = tagging.side_by_side(both).rows
    assert [row[:3] for row in rows] == [("frozen", 3, "0.0"), ("adapted", 3, "100.0")]
    assert tagging.by_class(both).rows == [(name, "0", "100") for name in NAMES]
    other = tagging.Scores(("a", "b", "c"), right.truth, right.probabilities)
    with pytest.raises(DataError, match=r"(?s)name other classes.*side_by_side"):
        tagging.by_class({"one": right, "two": other})


# -- clips with tags ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("clips", "labels", "names", "words"),
    [
        ([], [], NAMES, "no clips"),
        ([numpy.zeros(9)], [0], NAMES, r"clip 0 is a ndarray.*Audio\.of"),
        (spectral(), [0, 1, 2], NAMES, r"6 clips, and labels of shape \(3,\)"),
        (spectral(), LABELS, ("one",), "at least two texts"),
        (spectral(), LABELS, ("one", "one", "two"), "repeat: one"),
        (spectral(), [0, 1, 3, 0, 1, 2], NAMES, "clip 2 has the label 3, and there are 3"),
        (spectral(), [0, -1, 0, 0, 1, 2], NAMES, "clip 1 has the label -1"),
        (spectral(), ["low"] * 6, NAMES, r"expected whole numbers.*names\.index"),
        (spectral(), numpy.zeros((6, 2)), NAMES, "2 columns, and there are 3 names"),
        (spectral(), numpy.full((6, 3), 0.5), NAMES, "yes or no"),
    ],
)
def test_clips_and_tags_that_do_not_fit_are_refused(
    clips: Any, labels: Any, names: Any, words: str
) -> None:
    with pytest.raises(DataError, match=f"(?s){words}"):
        tagging.tagged(clips, labels, names)


def test_shots_are_drawn_class_by_class() -> None:
    data = tagging.tagged(spectral(), LABELS, NAMES)
    one, same, other = (data.sample(1, seed) for seed in (0, 0, 3))
    assert one.labels.tolist() == [0, 1, 2]
    assert one.clips == same.clips != other.clips
    assert len(set(data.sample(2).clips)) == 6
    with pytest.raises(DataError, match=r"too few of low \(2\), high \(2\), noise \(2\)"):
        data.sample(3)
    with pytest.raises(DataError, match="shots is 0"):
        data.sample(0)
    several = tagging.tagged(spectral(), numpy.eye(3)[LABELS], NAMES)
    assert several.several and several.labels.dtype == bool
    assert numpy.array_equal(several.truth, data.truth)
    with pytest.raises(DataError, match="class by class"):
        several.sample(1)
    assert "6 clips, 1 s, 3 tags" in repr(several)


# -- the loss -------------------------------------------------------------------------------------


def test_the_loss_is_what_the_labels_ask_for() -> None:
    logits, loss = torch.randn(4, 3), tagging.TaggingLoss()
    single, several = torch.tensor([0, 2, 1, 1]), torch.rand(4, 3) > 0.5
    assert torch.equal(loss.of(logits, single), F.cross_entropy(logits, single))
    expected = F.binary_cross_entropy_with_logits(logits, several.float())
    assert torch.equal(loss.of(logits, several), expected)
    weight = torch.tensor([1.0, 5.0, 1.0])
    weighed = tagging.TaggingLoss(weight=weight).of(logits, single)
    assert torch.equal(weighed, F.cross_entropy(logits, single, weight))


def test_what_the_loss_cannot_take_is_refused() -> None:
    loss, batch = tagging.TaggingLoss(), tagging.tensors(ast(), data_of(ast()))
    for labels, words in (
        (torch.tensor([0, 1]), r"logits \(6, 5\) and labels \(2,\)"),
        (torch.zeros(6, 3), r"labels \(6, 3\).*Head"),
        (torch.full((6,), 7), r"a label is 7, and the model has 5 logits.*Head"),
    ):
        with pytest.raises(DataError, match=f"(?s){words}"):
            loss(ast(), {**batch, "labels": labels})
    with pytest.raises(DataError, match=r"(?s)no labels, but input_values.*tagging\.tensors"):
        loss(ast(), {"input_values": batch["input_values"]})
    with pytest.raises(DataError, match=r"(?s)without logits.*PooledEncoder"):
        loss(ALL["hf_ast_bare"].fresh(), batch)


def data_of(m: Any, several: bool = False) -> tagging.Tagged:
    labels = numpy.eye(3)[LABELS] if several else LABELS
    return tagging.tagged(spectral(), labels, NAMES)


def test_masks_over_spectrograms_are_drawn_anew_in_every_step() -> None:
    model = ast()
    batch = tagging.tensors(model, data_of(model))
    seen: list[torch.Tensor] = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_values"].clone()), with_kwargs=True
    )
    for seed in (1, 1, 2):
        loss = tagging.TaggingLoss(audio.SpecAugment(4, 4), seed=seed)
        loss(model, batch), loss(model, batch)
    first, second = seen[:2], seen[2:4]
    assert not torch.equal(first[0], first[1])
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert not torch.equal(first[0], seen[4])


# -- models ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("several", [False, True])
def test_a_spectrogram_transformer_learns_tags(several: bool) -> None:
    model = ast()
    data = data_of(model, several)
    mm.attach(model, [mm.ConvAdapter(4, kernel=3), mm.Head(names=NAMES)])
    before = tagging.evaluate(model, data)
    fit(model, data)
    after = tagging.evaluate(model, data)
    assert after.names == NAMES and after.several == several
    assert after.accuracy == 1 > before.accuracy
    assert after.mean_average_precision == 1


def fit(m: Any, data: tagging.Tagged) -> None:
    mm.fit(
        m, tagging.tensors(m, data), loss=tagging.TaggingLoss(), steps=60, lr=3e-2, progress=False
    )


SPEECH = {
    "wav2vec2": _hf_speech("Wav2Vec2", "Model", **LARGE),
    "hubert": _hf_speech("Hubert", "Model", **LARGE),
    "wavlm": _hf_speech("WavLM", "Model", **LARGE),
}


def waves() -> tagging.Tagged:
    """Waves of different lengths; the tiny front end makes a frame of a few samples."""
    clips = [clip(40 + 12 * seed, seed) for seed in range(6)]
    return tagging.tagged(clips, LABELS, NAMES)


@pytest.mark.parametrize("kind", SPEECH)
def test_an_encoder_of_waves_is_pooled_and_learns_tags(kind: str) -> None:
    model = tagging.PooledEncoder(SPEECH[kind]().eval())
    mm.attach(model, [mm.Bottleneck.audio(4), mm.Head(names=NAMES, at="audio.pooled")])
    data = waves()
    fit(model, data)
    assert tagging.evaluate(model, data).accuracy == 1
    assert tagging.Tagger(model).names == NAMES


def test_classifiers_of_transformers_take_part_as_they_are() -> None:
    model: Any = ALL["hf_hubert_large"].fresh()
    data = waves()
    mm.attach(model, [mm.ConvAdapter(4, kernel=3), mm.Head(names=NAMES)])
    fit(model, data)
    assert tagging.evaluate(model, data).accuracy == 1


def test_frames_of_padding_are_no_part_of_the_mean() -> None:
    encoder: Any = SPEECH["wav2vec2"]().eval()
    model = tagging.PooledEncoder(encoder)
    randomise(mm.attach(model, [mm.ConvAdapter(2), mm.SoftMoA(2)]), 0.3)
    features = tagging.features_for(model)
    clips = list(waves().clips)
    with torch.no_grad():
        together = model(**features.batch(clips).inputs)
        for place, one in enumerate(clips):
            alone = features.batch([one]).inputs
            assert_close((together[place],), (model(**alone)[0],), 2e-5)
            hidden = encoder(**alone).last_hidden_state
            assert_close((together[place],), (hidden[0].mean(0),), 2e-5)


def test_the_tokens_of_a_spectrogram_are_pooled_too() -> None:
    encoder: Any = ALL["hf_ast_bare"].fresh()
    model = tagging.PooledEncoder(encoder)
    values = tagging.tensors(model, data_of(model))["input_values"]
    with torch.no_grad():
        hidden = encoder(values).last_hidden_state
        assert_close((model(values),), (hidden.mean(1),), 1e-6)
        mask = torch.ones(hidden.shape[:2], dtype=torch.long)
        mask[:, 4] = 0
        kept = encoder(values, attention_mask=mask).last_hidden_state[:, mask[0].bool()]
        assert_close((model(values, mask),), (kept.mean(1),), 1e-5)
        randomise(mm.attach(model, mm.ConvAdapter(2)), 0.3)
        twin = pickle.loads(pickle.dumps(model))
        assert torch.equal(twin(values), model(values))


def test_a_pooled_encoder_keeps_the_encoders_sites_and_files(tmp_path: Any) -> None:
    """So that what is trained for tags can be used in the bare encoder, and the other way round."""
    model = tagging.PooledEncoder(SPEECH["wavlm"]().eval())
    randomise(mm.attach(model, [mm.ConvAdapter(2), mm.LoRA(2)]), 0.3)
    mm.save(model, tmp_path)
    bare: Any = SPEECH["wavlm"]().eval()
    mm.load_adapter(bare, tmp_path)
    wave = torch.randn(1, 60)
    with torch.no_grad():
        assert_close((model(wave),), (bare(wave).last_hidden_state.mean(1),), 1e-6)
        assert torch.equal(copy.deepcopy(model)(wave), model(wave))
    frozen = SPEECH["wavlm"]().eval()
    mm.detach(model)
    assert torch.equal(model(wave), tagging.PooledEncoder(frozen)(wave))


def test_what_pools_by_itself_is_not_pooled_again() -> None:
    with pytest.raises(BackboneError, match=r"(?s)bare encoder.*pools by itself"):
        tagging.PooledEncoder(ast())
    with pytest.raises(BackboneError, match="bare encoder"):
        tagging.PooledEncoder(torch.nn.Linear(2, 2))


# -- taggers --------------------------------------------------------------------------------------


def test_clips_keep_their_order_whatever_goes_together() -> None:
    model: Any = ALL["hf_hubert_large"].fresh()
    clips = [clip(60 + 10 * (seed % 3), seed) for seed in range(7)]
    tagger = tagging.Tagger(model)
    alone = torch.cat([tagger.probabilities([one]) for one in clips])
    assert_close((tagger.probabilities(clips),), (alone,), 1e-5)
    tagger.batch_size = 2
    assert_close((tagger.probabilities(clips),), (alone,), 1e-5)
    assert_close((alone.sum(1),), (torch.ones(7),), 1e-5)
    tagger.several = True
    assert not torch.allclose(tagger.probabilities(clips).sum(1), torch.ones(7))


def test_where_padding_would_be_heard_only_equal_clips_go_together() -> None:
    model = tagging.PooledEncoder(_hf_speech("Wav2Vec2", "Model")().eval())
    mm.attach(model, mm.Head(names=NAMES, at="audio.pooled"))
    tagger, seen = tagging.Tagger(model), []
    once = tagger._once
    tagger._once = lambda part: seen.append([len(one) for one in part]) or once(part)  # type: ignore[method-assign]
    tagger.probabilities([clip(60), clip(80, 1), clip(60, 2)])
    assert seen == [[60, 60], [80]]


def test_long_recordings_are_heard_in_windows() -> None:
    model = ast()
    tagger = tagging.Tagger(model)
    assert tagger.seconds == audio.SpectrumFeatures.for_model(model).seconds
    long = clip(round(2.6 * tagger.seconds * RATE))
    found = tagger.tag(long)
    parts = [part for _, part in audio.windows(long, tagger.seconds, tagger.hop)]
    each = tagger.probabilities(parts)
    assert len(found.starts) == len(parts) == 5
    assert numpy.allclose(found.each, each, atol=1e-6)
    assert numpy.allclose(found.probabilities, each.mean(0), atol=1e-6)
    short = clip(3000, 1)
    both = tagger.probabilities([long, short])
    assert numpy.allclose(both[0], found.probabilities, atol=1e-6)
    assert numpy.allclose(both[1], tagger.tag(short).probabilities, atol=1e-6)
    assert len(tagger.tag(short).starts) == 1


def test_names_are_those_of_the_head_that_is_active() -> None:
    model = ast()
    assert tagging.Tagger(model).names == tuple(f"LABEL_{k}" for k in range(CLASSES))
    mm.attach(model, [mm.Bottleneck(2), mm.Head(names=NAMES)], name="mine")
    assert tagging.Tagger(model).names == NAMES
    with mm.disabled(model):
        assert tagging.Tagger(model).names[0] == "LABEL_0"
    with pytest.raises(
        DataError, match=r"(?s)\(1, 3\), and there are 2 names.*order of the logits"
    ):
        tagging.Tagger(model, ("a", "b")).tag(clip(3000))
    with pytest.raises(DataError, match=r"(?s)names no classes.*Head"):
        tagging.Tagger(ALL["hf_ast_bare"].fresh())
    with pytest.raises(DataError, match="the tagger names"):
        tagging.evaluate(model, data_of(model), tagging.Tagger(model, ("a", "b", "c")))
    with pytest.raises(DataError, match="features="):
        tagging.features_for(ALL["hf_vit"].fresh())
    with pytest.raises(DataError, match="no clips"):
        tagging.Tagger(model).probabilities([])


# -- seen -----------------------------------------------------------------------------------------


def tags() -> tagging.Tags:
    each = numpy.array([[0.9, 0.1, 0.0], [0.5, 0.3, 0.2], [0.1, 0.9, 0.6]])
    return tagging.Tags(clip(RATE, name="street"), NAMES, each.mean(0), (0.0, 0.25, 0.5), 0.5, each)


def test_tags_tell_what_was_heard_and_where() -> None:
    found = tags()
    assert found.best == "low"
    assert found.over(0.4) == ["low", "high"]
    assert found.top(2).rows == [
        ("low", pytest.approx(0.5), "0.00–0.50 s"),
        ("high", pytest.approx(1.3 / 3), "0.50–1.00 s"),
    ]
    assert repr(found) == "low 0.50, high 0.43, noise 0.27 (1.00 s, 3 windows)"
    page = found._repr_html_()
    assert "<audio" in page and "street" in page and "likeliest at" in page


def test_the_timeline_shows_each_window() -> None:
    figure = tags().figure(count=2)
    wave, shown = figure.axes[:2]
    assert wave.get_xlim() == shown.get_xlim() == (0, 1)
    (mesh,) = shown.collections
    assert mesh.get_array().tolist() == [[0.9, 0.5, 0.1], [0.1, 0.3, 0.9]]
    assert [text.get_text() for text in shown.get_yticklabels()] == ["low", "high"]
    figure.savefig(io.BytesIO())


def test_the_confusion_matrix_begins_with_what_is_found_worst() -> None:
    truth = numpy.eye(3)[[0, 0, 1, 1]]
    figure = scored(truth, numpy.eye(3)[[0, 0, 0, 1]]).figure()
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["high", "low", "noise"]
    assert numpy.array_equal(axes.images[0].get_array(), [[50, 50, 0], [0, 100, 0], [0, 0, 0]])
    assert [text.get_text() for text in axes.texts] == ["50", "50", "100"]
    figure.savefig(io.BytesIO())


def test_bars_compare_classes() -> None:
    right = scored(numpy.eye(3), numpy.eye(3))
    wrong = scored(numpy.eye(3), numpy.eye(3)[[0, 2, 1]])
    axes = tagging.class_bars({"frozen": wrong, "adapted": right}).axes[0]
    assert [bar.get_height() for bar in axes.patches] == [0, 0, 100, 100, 100, 100]
    several = scored(numpy.eye(3), numpy.eye(3), several=True).figure().axes[0]
    assert several.get_ylabel() == "average precision %"


def test_pictures_of_clips_share_one_scale() -> None:
    features = audio.SpectrumFeatures(frames=40, bins=16)
    figure = tagging.clips_figure([clip(3000, name="a"), clip(1500, 1, "b")], features, columns=2)
    first, second = figure.axes
    assert [axis.get_title() for axis in (first, second)] == ["a", "b"]
    assert first.images[0].get_clim() == second.images[0].get_clim()
    assert second.images[0].get_array().shape == (16, 7)  # without its padding


def test_the_page_about_tags_runs_as_it_is_written() -> None:
    import re
    from pathlib import Path

    page = (Path(__file__).parents[1] / "docs" / "tagging.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 4
    names: dict[str, Any] = {
        "encoder": SPEECH["wav2vec2"]().eval(),
        "clips": waves(),
        "long": audio.Audio.of(DRAW.standard_normal(20_000) / 10, 8_000),
    }
    for block in blocks:
        exec(block.replace(", loss=", ", steps=2, progress=False, loss="), names)
    assert isinstance(names["tags"], tagging.Tags)
    assert list(mm.attachments(names["ast"])) == ["hall", "several"]
