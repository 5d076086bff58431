"""Generated sounds, and the small AST that knows them."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
import torch

import mmadapt as mm
from mmadapt.errors import DataError
from mmadapt.tasks import audio, tagging
from mmadapt.tasks.audio.levels import decibels
from mmadapt.tasks.tagging import compare
from mmadapt.tasks.tagging.kinds import SAMPLES
from mmadapt.tasks.tagging.sounds import (
    HALL,
    NEW,
    RATE,
    SOURCE,
    STUDIO,
    Place,
    _echoing,
    mixtures,
    sounds,
)
from mmadapt.zoo import manifest

# -- the generator --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*SOURCE, *NEW])
def test_every_kind_is_one_second_of_sound_and_drawn_anew(name: str) -> None:
    draw = numpy.random.default_rng(3)
    one, other = ((SOURCE | NEW)[name](draw) for _ in range(2))
    assert one.shape == other.shape == (8000,)
    assert numpy.isfinite(one).all() and numpy.abs(one).max() > 0.1
    assert not numpy.allclose(one, other)


def test_clips_are_those_of_their_seed_and_of_no_other() -> None:
    one, labels = sounds(26, 1)
    again, _ = sounds(26, 1)
    assert labels.tolist() == [*range(13), *range(13)]
    assert all(numpy.array_equal(a.samples, b.samples) for a, b in zip(one, again, strict=True))
    splits = {"train": one, "test": sounds(26, 2)[0], "hall": sounds(26, 1, place=HALL)[0]}
    assert [row[1] for row in audio.check_splits(splits)] == [26, 26, 26]
    assert {clip.rate for clip in one} == {RATE}
    assert [clip.name for clip in one[:13]] == list(SOURCE)
    with pytest.raises(DataError, match="count is 0"):
        sounds(0, 1)


def test_a_place_has_the_noise_and_the_echo_it_is_said_to_have() -> None:
    """A drum is over after half a second; then noise is heard, or the hall."""
    one = {"kick": SOURCE["kick"]}

    def after(place: Place) -> float:
        clips = sounds(20, 4, one, place)[0]
        loud = [decibels(clip.samples[7000:]) - decibels(clip.samples) for clip in clips]
        return float(numpy.mean(loud))

    assert after(Place((20.0, 20.0))) == pytest.approx(-20, abs=2)  # wind swells
    assert after(Place((6.0, 6.0))) == pytest.approx(-7, abs=2)
    assert STUDIO.echo is None and HALL.echo is not None


def test_an_echo_falls_by_60_decibels_in_its_time() -> None:
    impulse = numpy.zeros(SAMPLES)
    impulse[1000] = 1.0
    heard = _echoing(numpy.random.default_rng(0), impulse, 0.4)
    assert not heard[:1000].any() or numpy.abs(heard[:1000]).max() < 1e-9
    early, late = heard[1400:2200], heard[3000:3800]  # 0.2 s apart
    assert decibels(late) - decibels(early) == pytest.approx(-30, abs=2)
    assert heard[1000] > 3


def test_mixtures_hold_what_their_tags_say() -> None:
    clips, tags = mixtures(60, 5, most=3)
    assert tags.dtype == bool and tags.shape == (60, 13)
    assert set(tags.sum(1)) == {1, 2, 3}
    names = list(SOURCE)
    for clip, row in zip(clips, tags, strict=True):
        assert clip.name == " + ".join(names[k] for k in numpy.flatnonzero(row))
    assert max(numpy.abs(clip.samples).max() for clip in clips) <= 0.951


# -- tiny/ast -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ast() -> mm.Backbone:
    return mm.load("tiny/ast")


def test_it_loads_with_its_classifier_and_its_features(ast: mm.Backbone) -> None:
    from transformers import ASTFeatureExtractor, ASTForAudioClassification

    state = torch.get_rng_state()
    model: Any = mm.load("tiny/ast").model
    assert torch.equal(torch.get_rng_state(), state)
    assert isinstance(model, ASTForAudioClassification) and not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert sum(p.numel() for p in model.parameters()) == ast.entry.parameters < 1e6
    assert [model.config.id2label[k] for k in range(13)] == list(SOURCE)
    clips = sounds(3, 6)[0]
    folder = manifest.data_folder() / "tiny" / "ast"
    theirs = ASTFeatureExtractor.from_pretrained(folder)(
        [clip.samples for clip in clips], sampling_rate=RATE
    )
    ours = ast.preprocess(clips).inputs["input_values"]  # type: ignore[misc]
    assert torch.equal(ours, torch.as_tensor(numpy.stack(theirs["input_values"])))
    assert torch.equal(ast.preprocess(clips[0]).inputs["input_values"], ours[:1])  # type: ignore[misc]


def test_it_knows_its_sounds_and_loses_them_in_a_hall(ast: mm.Backbone) -> None:
    """Far below its measured numbers, on other clips."""
    reported = ast.entry.metrics["accuracy"]
    assert ast.entry.metrics["n"] >= 2000 and reported["studio"] > 0.94 > reported["hall"] + 0.3
    found = {
        name: tagging.evaluate(ast, tagging.tagged(*sounds(130, 7, SOURCE, place), tuple(SOURCE)))
        for name, place in (("studio", STUDIO), ("hall", HALL))
    }
    assert found["studio"].accuracy > 0.9
    assert found["hall"].accuracy < 0.7
    assert found["studio"].mean_average_precision > 0.93


def test_a_recording_of_several_sounds_is_told_window_by_window(ast: mm.Backbone) -> None:
    names = ("falling sweep", "snare", "buzz", "clicks")
    clips = [sounds(1, 8, {name: SOURCE[name]})[0][0] for name in names]
    whole = audio.Audio.of(numpy.concatenate([clip.samples for clip in clips]), RATE)
    found = tagging.Tagger(ast, hop=0.5).tag(whole)
    at = [
        found.names[int(found.each[found.starts.index(k)].argmax())] for k in (0.0, 1.0, 2.0, 3.0)
    ]
    assert at == list(names)
    assert len(found.starts) == 8


def test_shorter_clips_fit_after_their_positions_are_interpolated() -> None:
    ast = mm.load("tiny/ast")
    short = [clip.cut(0.2, 0.66) for clip in sounds(130, 9)[0]]
    labels = sounds(130, 9)[1]
    data = tagging.tagged(short, labels, tuple(SOURCE))
    padded = tagging.evaluate(ast, data).accuracy
    assert audio.fit_positions(ast, 64) == (4, 4)
    assert ast.preprocess.frames == 64  # type: ignore[union-attr]
    fitted = tagging.evaluate(ast, data).accuracy
    assert fitted > 0.5 > 1 / 13
    assert fitted >= padded - 0.05


def test_names_of_a_class_without_an_anatomy_give_the_bare_encoder(tmp_path: Any) -> None:
    from backbones import _hf_speech
    from transformers import Wav2Vec2ForPreTraining, Wav2Vec2Model

    _hf_speech(
        "Wav2Vec2", "ForPreTraining", codevector_dim=8, proj_codevector_dim=8
    )().save_pretrained(tmp_path)
    model = mm.load(tmp_path).model
    assert isinstance(model, Wav2Vec2Model) and not isinstance(model, Wav2Vec2ForPreTraining)


# -- the comparison -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(ast: mm.Backbone) -> tuple[compare.Prepared, compare.Prepared, compare.Prepared]:
    """Clips to train on, to test on, and of the source; ten kinds that are new."""
    task = compare.new_kinds(2, test=20)
    parts = (task.draw(0), task.test(), compare.source(26))
    assert len(audio.check_splits({str(k): part.clips for k, part in enumerate(parts)})) == 3
    return tuple(compare.Prepared(ast, part) for part in parts)  # type: ignore[return-value]


@pytest.mark.parametrize("name", ["LoRA", "full fine-tuning", "from scratch"])
def test_a_method_is_measured_on_new_kinds_and_on_the_source(small: Any, name: str) -> None:
    train, test, source = small
    method, model = compare.METHODS[name], mm.load("tiny/ast")
    frozen = source.scores(model)
    if method.scratch:
        model = compare.random_backbone(model, 0)
    history, seconds = compare.adapt(model, method, train, head=True, seed=0, steps=2, batch=10)
    found = compare.finish(model, name, history, seconds, 0, test, source, head=True)
    head = 10 * 129 + 2 * 128
    classifier = 13 * 129 + 2 * 128
    inside = {"LoRA": 4 * 2 * 8 * 256}.get(name, 831_757 - classifier)
    assert found.parameters == inside + head
    assert len(found.by_class) == 10 and 0 <= found.accuracy <= 1 and seconds > 0
    if name == "LoRA":
        assert found.source_off == frozen.accuracy
    assert (found.source_on is None) == method.scratch


def test_baselines_need_no_adapter(small: Any, ast: mm.Backbone) -> None:
    train, test, source = small
    statistics = compare.run_statistics(train, test, 0)
    assert statistics.parameters == 10 * (2 * 64 + 1)
    probe = compare.run_probe(ast, train, test, 0)
    assert probe.parameters == 10 * 129
    assert min(statistics.accuracy, probe.accuracy) > 0.1
    one = compare.Prepared(ast, compare.new_kinds(1).draw(0))
    with pytest.raises(DataError, match="2 clips of every class"):
        compare.run_statistics(one, test, 0)
    hall = compare.Prepared(ast, compare.hall(2, 26).test())
    frozen = compare.run_frozen(ast, hall, source)
    assert frozen.source_on == frozen.source_off == source.scores(ast).accuracy
