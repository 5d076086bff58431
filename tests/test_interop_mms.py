"""MMS language adapters: transformers loads what we write, and we load what it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import LARGE, VOCABULARY, _hf_speech, waves
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from snapshot import assert_close, assert_equal, randomise, values
from torch import Tensor

import mmadapt as mm
from mmadapt.errors import AdapterFileError, BackboneError
from mmadapt.interop import mms_adapters, mms_file, read_mms, write_mms

WIDTH, A = 16, 3
TOKENS = ("<pad>", "|", "a", "b", "ä", "ß", "é")


def speech(own: bool = True, **changes: Any) -> Any:
    """A Wav2Vec2ForCTC as MMS has it, with room for a language of its own, or without."""
    options = {**LARGE, **({"adapter_attn_dim": A} if own else {}), **changes}
    return _hf_speech("Wav2Vec2", "ForCTC", **options)()


def logits(model: Any) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return (model(**waves(3)).logits,)


def hers(folder: Path, language: str, classes: int, seed: int = 1) -> dict[str, Tensor]:
    """A language's file with the keys that transformers itself gives."""
    draw = torch.Generator().manual_seed(seed)
    stored = {
        key: 0.3 * torch.randn(value.shape, generator=draw)
        for key, value in speech()._get_adapters().items()
    }
    stored["lm_head.weight"] = torch.randn(classes, WIDTH, generator=draw)
    stored["lm_head.bias"] = torch.randn(classes, generator=draw)
    save_file(stored, folder / f"adapter.{language}.safetensors", {"format": "pt"})
    return stored


def loaded(folder: Path, language: str, model: Any = None) -> Any:
    """A fresh backbone into which transformers loads the language."""
    model = speech() if model is None else model
    model.config._name_or_path = str(folder)
    model.load_adapter(language)
    return model


def neutral() -> Any:
    """With room for a language whose adapters change nothing: the backbone that has no room."""
    room, bare = speech(), speech(own=False)
    room.load_state_dict(bare.state_dict(), strict=False)
    for layer in room.wav2vec2.encoder.layers:
        torch.nn.init.zeros_(layer.adapter_layer.linear_2.weight)
        torch.nn.init.zeros_(layer.adapter_layer.linear_2.bias)
    assert_equal(logits(room), logits(bare))
    return room


# -- sizes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "layers", "size"), [(768, 12, 322_752), (1024, 24, 860_544), (1280, 48, 2_151_168)]
)
def test_a_language_has_its_known_size(width: int, layers: int, size: int) -> None:
    import transformers

    config = transformers.Wav2Vec2Config(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=16,
        intermediate_size=4 * width,
    )
    with torch.device("meta"):
        model = transformers.Wav2Vec2Model(config)
    assert sum(r["parameters"] for r in mm.plan(model, mm.Bottleneck.mms()).records()) == size


@pytest.mark.slow
def test_a_language_of_the_1b_model_is_290_tensors_and_two_million_numbers() -> None:
    import transformers

    config = transformers.Wav2Vec2Config(
        hidden_size=1280,
        num_hidden_layers=48,
        num_attention_heads=16,
        intermediate_size=5120,
        vocab_size=154,
        adapter_attn_dim=16,
        do_stable_layer_norm=True,
        feat_extract_norm="layer",
        conv_bias=True,
    )
    with torch.device("meta"):
        model = transformers.Wav2Vec2ForCTC(config)
    assert sum(p.numel() for p in model.parameters()) == 964_845_850
    first, head = mms_adapters(model, [f"t{i}" for i in range(154)])
    sizes = [sum(r["parameters"] for r in mm.plan(model, one).records()) for one in (first, head)]
    assert sizes == [2_151_168, 197_274]
    assert len(model._get_adapters()) == 290 == len(mm.plan(model, first).records()) + 2


# -- reading ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [VOCABULARY, 20, 33])
def test_a_language_read_computes_what_transformers_makes_of_it(
    tmp_path: Path, classes: int
) -> None:
    hers(tmp_path, "deu", classes)
    model = speech()
    before, base = values(model), logits(model)
    read = read_mms(model, tmp_path, "deu")
    assert logits(model)[0].shape[-1] == classes
    assert_close(logits(model), logits(loaded(tmp_path, "deu")), 1e-5)
    assert (read.layout, read.tensors) == ("mms", 14)
    assert read.notes[0] == f"deu: {VOCABULARY} output classes before, {classes} now"
    with mm.disabled(model):
        assert_equal(logits(model), base)
    mm.detach(model)
    assert all(torch.equal(value, before[name]) for name, value in values(model).items())


def test_a_backbone_without_room_gets_the_language_behind_its_blocks(tmp_path: Path) -> None:
    hers(tmp_path, "deu", 20)
    model = speech(own=False)
    read = read_mms(model, tmp_path, "deu")
    assert_close(logits(model), logits(loaded(tmp_path, "deu", neutral())), 1e-5)
    assert read.attachment is not None
    assert isinstance(read.attachment.adapter[0], mm.Bottleneck)  # type: ignore[index]


@pytest.mark.parametrize("own", [True, False])
def test_languages_switch_with_their_vocabularies_and_heads(tmp_path: Path, own: bool) -> None:
    """20 classes, 33, and 20 again: adapter and head together, each as transformers has it."""
    for seed, (language, classes) in enumerate({"eng": 20, "deu": 33}.items()):
        hers(tmp_path, language, classes, seed)
    model = speech(own)
    for language in ("eng", "deu"):
        read_mms(model, tmp_path, language)
    for language, classes in (("eng", 20), ("deu", 33), ("eng", 20)):
        mm.set_active(model, language)
        ours = logits(model)
        assert ours[0].shape[-1] == classes
        theirs = loaded(tmp_path, language, speech() if own else neutral())
        assert_close(ours, logits(theirs), 1e-5)


def test_the_tokens_beside_a_file_name_the_classes(tmp_path: Path) -> None:
    hers(tmp_path, "deu", len(TOKENS))
    tokens = {token: place for place, token in enumerate(TOKENS)}
    (tmp_path / "vocab.json").write_text(json.dumps({"deu": tokens, "eng": {"x": 0}}))
    read = read_mms(speech(), tmp_path, "deu")
    assert read.attachment is not None
    assert read.attachment.adapter[1].names == TOKENS  # type: ignore[index]
    assert mms_file(tmp_path, "deu").tokens == TOKENS


def test_a_file_is_understood_without_its_backbone(tmp_path: Path) -> None:
    hers(tmp_path, "azj-script_latin", 20)
    file = mms_file(tmp_path)
    assert (file.language, file.layers, file.channels) == ("azj-script_latin", 2, WIDTH)
    assert (file.width, file.classes, file.tokens) == (A, 20, ())


def test_a_pickled_file_is_read_as_transformers_does(tmp_path: Path) -> None:
    stored = hers(tmp_path, "deu", 20)
    (tmp_path / "adapter.deu.safetensors").unlink()
    torch.save(stored, tmp_path / "adapter.deu.bin")
    model = speech()
    read_mms(model, tmp_path)
    assert_close(logits(model), logits(loaded(tmp_path, "deu")), 1e-5)


# -- writing ----------------------------------------------------------------------------------------


def trained(own: bool, tokens: tuple[str, ...] = TOKENS) -> Any:
    model = speech(own)
    randomise(mm.attach(model, mms_adapters(model, tokens, width=A), name="deu"), 0.3)
    return model


@pytest.mark.parametrize("own", [True, False])
def test_transformers_loads_what_is_written(tmp_path: Path, own: bool) -> None:
    model = trained(own)
    written = write_mms(model, tmp_path, "deu")
    assert written.tensors == 14 and written.notes == ()
    theirs = loaded(tmp_path, "deu", speech() if own else neutral())
    assert theirs.config.vocab_size == len(TOKENS)
    assert_close(logits(theirs), logits(model), 1e-5)
    assert set(load_file(tmp_path / "adapter.deu.safetensors")) == set(theirs._get_adapters())
    with safe_open(tmp_path / "adapter.deu.safetensors", "pt") as file:
        assert json.loads(file.metadata()["mmadapt"])["language"] == "deu"
    again = speech(own)
    read_mms(again, tmp_path, "deu")
    assert_close(logits(again), logits(model), 1e-5)


def test_from_pretrained_takes_a_written_language_and_its_tokenizer_the_tokens(
    tmp_path: Path,
) -> None:
    import transformers

    speech().save_pretrained(tmp_path)
    (tmp_path / "vocab.json").write_text(json.dumps({"eng": {"<pad>": 0, "x": 1}}))
    model = trained(True)
    write_mms(model, tmp_path, "deu")
    theirs = transformers.Wav2Vec2ForCTC.from_pretrained(tmp_path, target_lang="deu")
    assert_close(logits(theirs.eval()), logits(model), 1e-5)
    tokenizer = transformers.Wav2Vec2CTCTokenizer(str(tmp_path / "vocab.json"), target_lang="deu")
    assert {token: tokenizer.encoder[token] for token in TOKENS} == {
        t: i for i, t in enumerate(TOKENS)
    }
    tokenizer.set_target_lang("eng")  # the other language is still there
    assert tokenizer.encoder["x"] == 1


def test_transformers_switches_between_written_languages(tmp_path: Path) -> None:
    model = trained(True)
    write_mms(model, tmp_path, "deu")
    hers(tmp_path, "eng", 20)
    theirs = loaded(tmp_path, "deu")
    theirs.load_adapter("eng")
    assert logits(theirs)[0].shape[-1] == 20
    theirs.load_adapter("deu")
    assert_close(logits(theirs), logits(model), 1e-5)


@pytest.mark.parametrize(
    "adapter",
    [
        mm.Bottleneck.mms(A, scale=0.5),
        mm.Bottleneck.mms(A, scale_kind="learned"),
        mm.Bottleneck.mms(A, scale_kind="channel", scale=2.0),
    ],
    ids=repr,
)
def test_scales_are_folded_and_the_backbones_head_is_written_without_another(
    tmp_path: Path, adapter: mm.Bottleneck
) -> None:
    model = speech(own=False)
    randomise(mm.attach(model, adapter), 0.3)
    written = write_mms(model, tmp_path, "eng", vocabulary={str(i): i for i in range(VOCABULARY)})
    assert_close(logits(loaded(tmp_path, "eng", neutral())), logits(model), 1e-5)
    assert written.notes == ()


def test_a_backbone_with_norms_behind_writes_and_says_transformers_has_no_room(
    tmp_path: Path,
) -> None:
    model: Any = _hf_speech(
        "Wav2Vec2", "ForCTC", adapter_attn_dim=A
    )()  # sets nothing up: post-norm
    randomise(mm.attach(model, mms_adapters(model, TOKENS, A)), 0.3)
    written = write_mms(model, tmp_path, "deu")
    assert "no room" in written.notes[0]
    again: Any = _hf_speech("Wav2Vec2", "ForCTC")()
    read_mms(again, tmp_path)
    assert_close(logits(again), logits(model), 1e-5)


@pytest.mark.parametrize("own", [True, False])
def test_training_moves_the_language_and_leaves_the_backbone(tmp_path: Path, own: bool) -> None:
    """A few steps of CTC on new tokens, from logits, then over to transformers."""
    model = speech(own)
    mm.attach(model, mms_adapters(model, TOKENS, A), name="deu", seed=3)
    before = values(model)
    batch = {**waves(3), "labels": torch.tensor([[2, 3], [4, 2], [5, 6]])}

    def loss(model: Any, batch: Any) -> Tensor:
        output = model(batch["input_values"], attention_mask=batch["attention_mask"]).logits
        spoken = output.log_softmax(-1).transpose(0, 1)
        frames = model._get_feat_extract_output_lengths(batch["attention_mask"].sum(-1))
        lengths = torch.full((3,), 2)
        return torch.nn.functional.ctc_loss(spoken, batch["labels"], frames, lengths)

    history = mm.fit(model, [batch], loss=loss, steps=30, lr=1e-2, progress=False)
    assert history.losses[-1] < 0.7 * history.losses[0]
    assert all(torch.equal(value, before[name]) for name, value in values(model).items())
    write_mms(model, tmp_path, "deu")
    theirs = loaded(tmp_path, "deu", speech() if own else neutral())
    assert_close(logits(theirs), logits(model), 1e-4)


# -- what does not fit --------------------------------------------------------------------------------


def changed(folder: Path, change: Any) -> Path:
    stored = hers(folder, "deu", 20)
    change(stored)
    save_file(stored, folder / "adapter.deu.safetensors", {"format": "pt"})
    return folder


LAYER = "wav2vec2.encoder.layers.1.adapter_layer"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update(extra=torch.zeros(1)), "1 unexpected: extra"),
        (lambda s: s.pop(f"{LAYER}.norm.bias"), rf"1 missing: {LAYER}.norm.bias"),
        (lambda s: s.pop("lm_head.bias"), "1 missing: lm_head.bias"),
        (
            lambda s: s.update({f"{LAYER.replace('1', '5', 1)}.norm.bias": torch.zeros(WIDTH)}),
            "missing",
        ),
        (lambda s: s.update({f"{LAYER}.linear_1.weight": torch.zeros(A + 1, WIDTH)}), "4, 16"),
        (lambda s: s.update({"lm_head.bias": torch.zeros(3)}), r"\[3\], expected f32\[20\]"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_and_nothing_is_attached(
    tmp_path: Path, change: Any, message: str
) -> None:
    model = speech()
    with pytest.raises(AdapterFileError, match=message):
        read_mms(model, changed(tmp_path, change), "deu")
    assert not mm.attachments(model)


def test_transformers_refuses_a_foreign_key_too(tmp_path: Path) -> None:
    changed(tmp_path, lambda stored: stored.update(extra=torch.zeros(1)))
    with pytest.raises(ValueError, match="extra"):
        loaded(tmp_path, "deu")


def test_files_and_languages_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match=r"(?s)no file or folder.*hf_hub_download"):
        read_mms(speech(), tmp_path / "nowhere", "deu")
    with pytest.raises(AdapterFileError, match=r"adapter\.\{language\}"):
        mms_file(tmp_path)
    hers(tmp_path, "eng", 20)
    with pytest.raises(AdapterFileError, match=r"(?s)adapter\.deu\.safetensors.*eng"):
        read_mms(speech(), tmp_path, "deu")
    hers(tmp_path, "fra", 20)
    with pytest.raises(AdapterFileError, match="eng, fra"):
        mms_file(tmp_path)
    (tmp_path / "adapter.fra.safetensors").write_bytes(b"no tensors")
    with pytest.raises(AdapterFileError, match="no safetensors file"):
        mms_file(tmp_path, "fra")


def test_a_vocabulary_of_another_size_is_refused(tmp_path: Path) -> None:
    hers(tmp_path, "deu", 20)
    (tmp_path / "vocab.json").write_text(json.dumps({"deu": {"a": 0, "b": 1}}))
    with pytest.raises(
        AdapterFileError, match="2 tokens of 'deu', and its output layer has 20 rows"
    ):
        read_mms(speech(), tmp_path, "deu")
    model = trained(True)
    with pytest.raises(AdapterFileError, match="3 tokens, and the output layer has 7 rows"):
        write_mms(model, tmp_path / "new", "deu", vocabulary=("a", "b", "c"))
    with pytest.raises(AdapterFileError, match="expected 0 to 1, each once"):
        mms_adapters(model, {"a": 1, "b": 2})
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0}))
    with pytest.raises(AdapterFileError, match=r"(?s)without its name.*\{language"):
        write_mms(model, tmp_path, "deu")
    assert not (tmp_path / "new").exists()
    (tmp_path / "vocab.json").write_text("{no json")
    with pytest.raises(AdapterFileError, match=r"vocab\.json is not JSON"):
        read_mms(speech(), tmp_path, "deu")


@pytest.mark.parametrize(
    ("adapters", "own", "message"),
    [
        (mm.LoRA(2), True, "a bottleneck behind every block and an output layer"),
        ([mm.Bottleneck.mms(A), mm.LoRA(2)], False, "a bottleneck behind every block"),
        (mm.Bottleneck.pfeiffer(A), False, "ReLU and a norm before it"),
        (mm.Bottleneck.mms(A, activation="gelu"), False, "ReLU and a norm before it"),
        (mm.Bottleneck.mms(A, at="audio.layers[0]"), False, "ReLU and a norm before it"),
        (mm.Bottleneck.mms(A), True, "act beside the bottlenecks"),
        (mm.Unlock(at="audio.layers[*].norm1"), True, "no place for what the attachment changes"),
        ([mm.Bottleneck.mms(A), mm.Head(7, norm=True)], False, "no plain output layer"),
    ],
)
def test_what_the_layout_cannot_say_is_not_written(
    tmp_path: Path, adapters: Any, own: bool, message: str
) -> None:
    model = speech(own)
    mm.attach(model, adapters)
    with pytest.raises(AdapterFileError, match=message):
        write_mms(model, tmp_path / "new", "deu")
    assert not (tmp_path / "new").exists()


def test_a_name_that_is_no_language_and_a_model_without_a_head_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match="names no language"):
        write_mms(trained(True), tmp_path, "../deu")
    hers(tmp_path, "deu", 20)
    bare: Any = _hf_speech("Wav2Vec2", "Model", **LARGE)()
    with pytest.raises(BackboneError, match=r"(?s)Wav2Vec2Model.*Wav2Vec2ForCTC"):
        read_mms(bare, tmp_path, "deu")
