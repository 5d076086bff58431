"""PEFT's LoRA files, as it wrote them, against what it computed with them, and files for it.

`peers/make_peft_files.py` made both, under a transformers whose modules have their former names.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import ALL
from peer_files import PEERS, distance, fill, outputs, part
from peers.kept import AST, IMAGE, SIZE
from peers.kept import TIMM as TIMM_SIZE
from safetensors.torch import load_file, save_file
from snapshot import assert_close, differ, randomise, state
from test_store import converted
from torch import Tensor, nn

import mmadapt as mm
from mmadapt.errors import AdapterFileError, AttachError
from mmadapt.interop import read_peft, write_peft

FILES = PEERS / "peft"
TIMM, OPEN_CLIP, HF_CLIP = ALL["timm_vit"], ALL["open_clip"], ALL["hf_clip"]


@pytest.fixture(scope="module")
def saved() -> dict[str, Tensor]:
    return load_file(PEERS / "peft_files.safetensors")


def backbone(kind: str, saved: dict[str, Tensor]) -> Any:
    """Today's class with the weights PEFT saw."""
    import timm
    import transformers as t
    from open_clip.transformer import VisionTransformer

    makers: dict[str, Callable[[], nn.Module]] = {
        "vit": lambda: t.ViTForImageClassification(t.ViTConfig(**SIZE, **IMAGE, num_labels=3)),
        "ast": lambda: t.ASTForAudioClassification(t.ASTConfig(**SIZE, **AST, num_labels=3)),
        "dinov2": lambda: t.Dinov2Model(t.Dinov2Config(**SIZE, **IMAGE, mlp_ratio=2)),
        "clip_vision": lambda: t.CLIPVisionModel(t.CLIPVisionConfig(**SIZE, **IMAGE)),
        "open_clip": lambda: VisionTransformer(16, 8, 16, 2, 2, 2.0, output_dim=8),
        "timm": lambda: timm.create_model(**TIMM_SIZE),
    }
    return fill(makers[kind](), part(saved, f"{kind} backbone."))


# -- what it computes -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["vit", "ast", "dinov2", "clip_vision", "open_clip", "timm"])
def test_a_lora_computes_what_peft_did(kind: str, saved: dict[str, Tensor]) -> None:
    model, batch = backbone(kind, saved), saved[f"{kind} batch"]
    assert distance(outputs(model, batch), saved[f"{kind} bare"]) < 5e-6
    assert distance(saved[f"{kind} bare"], saved[kind]) > 0.1
    mm.load_adapter(model, FILES / f"{kind}.zip", name="theirs")
    assert distance(outputs(model, batch), saved[kind]) < 5e-6
    mm.detach(model)
    assert distance(outputs(model, batch), saved[f"{kind} bare"]) < 5e-6


def test_what_the_file_says_becomes_hyper_parameters(
    saved: dict[str, Tensor], folder: Callable[[str], Path]
) -> None:
    report = read_peft(backbone("vit", saved), folder("vit"))
    assert report.attachment is not None
    assert {repr(adapter) for adapter in report.attachment.adapter} == {
        "LoRA(rank=4, alpha=6.0, rank_stabilized=True)",
        "LoRA(rank=4, alpha=10.0, rank_stabilized=True)",
        "LoRA(rank=2, alpha=6.0, rank_stabilized=True)",
        "Head(classes=3)",
    }
    assert report.notes == ("an output layer of 3 classes takes the place of the backbone's",)
    assert str(report).startswith("peft lora: 24 tensors loaded, 0 of them converted")
    assert report.attachment.metadata == {}


def test_the_report_stays_with_what_load_adapter_attached(
    saved: dict[str, Tensor], tmp_path: Path
) -> None:
    model = backbone("ast", saved)
    attachment = mm.load_adapter(model, FILES / "ast.zip")
    assert attachment.metadata["origin"].startswith("peft lora: ")
    manifest = json.loads((attachment.save(tmp_path / "ours") / "adapter.json").read_text())
    assert manifest["origin"] == attachment.metadata["origin"]
    expected = outputs(model, saved["ast batch"])
    again = backbone("ast", saved)
    mm.load_adapter(again, tmp_path / "ours")
    assert distance(outputs(again, saved["ast batch"]), expected) == 0.0


# -- other keys, other libraries ---------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Callable[[str], Path]:
    """A folder as PEFT wrote it."""

    def unzip(kind: str) -> Path:
        with zipfile.ZipFile(FILES / f"{kind}.zip") as archive:
            archive.extractall(tmp_path / kind)
        return tmp_path / kind

    return unzip


def rewrite(
    folder: Path,
    tensors: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict,
    **settings: Any,
) -> Path:
    """The same folder with other tensors and settings."""
    path, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    save_file(tensors(load_file(path)), path)
    config.write_text(json.dumps({**json.loads(config.read_text()), **settings}))
    return folder


@pytest.mark.parametrize(
    "rename",
    [
        lambda key: key.replace(".weight", ".default.weight"),
        lambda key: key.removeprefix("base_model.model."),
        lambda key: key.replace("vision_model.", ""),
    ],
    ids=["adapter's name left in", "no prefix", "names of transformers 5"],
)
def test_other_spellings_of_the_keys_are_read(
    rename: Callable[[str], str], folder: Callable[[str], Path], saved: dict[str, Tensor]
) -> None:
    file = rewrite(folder("clip_vision"), lambda t: {rename(k): v for k, v in t.items()})
    model = backbone("clip_vision", saved)
    mm.load_adapter(model, file)
    assert distance(outputs(model, saved["clip_vision batch"]), saved["clip_vision"]) < 5e-6


def test_a_pickled_file_is_read(folder: Callable[[str], Path], saved: dict[str, Tensor]) -> None:
    file = folder("clip_vision")
    torch.save(load_file(file / "adapter_model.safetensors"), file / "adapter_model.bin")
    (file / "adapter_model.safetensors").unlink()
    model = backbone("clip_vision", saved)
    mm.load_adapter(model, file)
    assert distance(outputs(model, saved["clip_vision batch"]), saved["clip_vision"]) < 5e-6


def test_what_was_trained_in_one_library_fits_the_same_clip_in_the_other(tmp_path: Path) -> None:
    here = OPEN_CLIP.fresh()
    there = converted(here)
    randomise(mm.attach(here, mm.LoRA(2), at=["*.layers[*].attn.*", "*.layers[*].mlp.up"]))
    write_peft(here, tmp_path / "open_clip")
    read_peft(there, tmp_path / "open_clip")
    assert_close(unit(HF_CLIP, there), unit(OPEN_CLIP, here), 1e-5)
    write_peft(there, tmp_path / "transformers")
    again = OPEN_CLIP.fresh()
    read_peft(again, tmp_path / "transformers")
    assert_close(unit(OPEN_CLIP, again), unit(OPEN_CLIP, here), 1e-5)


def unit(tiny: Any, model: Any) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return tuple(nn.functional.normalize(one, dim=-1) for one in tiny.outputs(model))


def test_both_sams_read_one_file(tmp_path: Path) -> None:
    first, second = ALL["hf_sam"].fresh(), ALL["segment_anything"].fresh()
    randomise(mm.attach(first, mm.LoRA(2), at="vision.layers[*].attn.q"))
    write_peft(first, tmp_path)
    attachment = read_peft(second, tmp_path).attachment
    assert attachment is not None
    for key, layer in mm.attachments(first)["default"].layers.items():
        assert torch.equal(layer.a, attachment.layers[key].a)
        assert torch.equal(layer.b, attachment.layers[key].b)


# -- writing -----------------------------------------------------------------------------------------


def test_a_written_file_says_what_peft_needs(tmp_path: Path) -> None:
    model = ALL["hf_vit_classifier"].fresh()
    adapters = [
        mm.LoRA(2, alpha=3.0, at="vision.layers[*].attn.q"),
        mm.LoRA(4, alpha=3.0, dropout=0.1, at="vision.layers[0].mlp.up"),
        mm.Unlock(at="vision.norm"),
        mm.Head(5),
    ]
    randomise(mm.attach(model, adapters))
    report = write_peft(model, tmp_path / "lora")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["inference_mode"] is True
    assert config["target_modules"] == [
        "vit.layers.0.attention.q_proj",
        "vit.layers.1.attention.q_proj",
        "vit.layers.0.mlp.fc1",
    ]
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (2, 3, 0.1)
    assert config["rank_pattern"] == {"^vit.layers.0.mlp.fc1": 4}
    assert config["alpha_pattern"] == {}
    assert config["modules_to_save"] == ["classifier", "vit.layernorm"]
    assert config["auto_mapping"]["base_model_class"] == "ViTForImageClassification"
    assert report.notes == ("PEFT has one dropout for all: 0.1",)
    keys = set(load_file(tmp_path / "lora" / "adapter_model.safetensors"))
    assert {"base_model.model.classifier.weight", "base_model.model.vit.layernorm.bias"} <= keys


@pytest.mark.parametrize(
    ("name", "adapters"),
    [
        ("open_clip", [mm.LoRA(2, alpha=3.0), mm.LoRA(2, at="vision.patches")]),
        ("open_clip", [mm.LoRA(2, at="*.layers[*].attn.o")]),
        ("timm_vit", [mm.LoRA(2), mm.LoRA(3, at="vision.layers[1].attn.k"), mm.Head(4)]),
        (
            "hf_vit_classifier",
            [
                mm.LoRA(4, alpha=2.0, rank_stabilized=True),
                mm.Unlock(at=["vision.norm", "*.layers[*].norm1.bias", "*.layers[*].attn.q.bias"]),
            ],
        ),
        ("hf_whisper", [mm.LoRA(2, at=["audio.conv1", "text.layers[*].cross.*"])]),
        ("hf_llama", [mm.LoRA(2), mm.Unlock(at="text.layers[*].norm1")]),
        ("open_clip", [mm.LoRA(2), mm.Unlock(at="*.layers[*].attn.o.bias")]),
        ("open_clip", [mm.LoRA(2, alpha=0.0), mm.LoRA(3, alpha=2.0, at="*.layers[*].attn.o")]),
    ],
    ids=[
        "packed",
        "output alone",
        "rows",
        "biases",
        "convolution",
        "decoder",
        "bias of a packed output",
        "a scale of zero",
    ],
)
def test_what_is_written_is_read_back(name: str, adapters: Any, tmp_path: Path) -> None:
    tiny = ALL[name]
    model = tiny.fresh()
    with torch.no_grad():
        bare = tiny.outputs(model)
        randomise(mm.attach(model, adapters))
        expected = tiny.outputs(model)
        assert differ(expected, bare)
        write_peft(model, tmp_path)
        again = tiny.fresh()
        mm.load_adapter(again, tmp_path)
        assert_close(tiny.outputs(again), expected, 2e-6)


def test_rows_of_a_packed_projection_that_a_file_does_not_change_get_no_layer(
    tmp_path: Path,
) -> None:
    model = TIMM.fresh()
    mine = randomise(mm.attach(model, mm.LoRA(2, alpha=3.0)))
    write_peft(model, tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert stored["base_model.model.blocks.0.attn.qkv.lora_A.weight"].shape == (4, 16)
    theirs = read_peft(TIMM.fresh(), tmp_path).attachment
    assert theirs is not None
    assert theirs.sites == mine.sites  # k is left alone
    assert theirs.adapter == mm.LoRA(2, alpha=3.0)


def test_a_packed_change_that_was_never_trained_keeps_its_rank(tmp_path: Path) -> None:
    model = TIMM.fresh()
    mm.attach(model, mm.LoRA(2))
    write_peft(model, tmp_path)
    attachment = read_peft(TIMM.fresh(), tmp_path).attachment
    assert attachment is not None
    assert attachment.adapter == mm.LoRA(4, alpha=4.0)  # zeros do not tell whose columns they are


@pytest.mark.parametrize(
    ("name", "adapters", "said"),
    [
        ("hf_vit", mm.Bottleneck(2), "have no place for Bottleneck"),
        ("hf_vit", mm.Unlock(at="vision.norm"), "has no LoRA"),
        (
            "hf_vit",
            [mm.LoRA(2), mm.LoRA(3, at="*.layers[*].attn.q")],
            r"two LoRAs of the attachment change vision.layers\[0\].attn.q",
        ),
        (
            "hf_vit",
            [mm.LoRA(2), mm.Unlock(at="*.layers[*].attn.q")],
            "changed by a LoRA and trained itself",
        ),
        (
            "open_clip",
            [mm.LoRA(2), mm.Unlock(at="*.layers[*].attn.k")],
            "in_proj_weight', whose module holds others",
        ),
        (
            "open_clip",
            [mm.LoRA(2), mm.Unlock(at="*.layers[*].attn.o")],
            "trained itself inside an attention that a LoRA changes",
        ),
        ("hf_vit_classifier", [mm.LoRA(2), mm.Head(3, norm=True)], "no plain output layer"),
        ("hf_sam", mm.LoRA(2, at="vision.layers[*].attn.rel_h"), "PEFT changes weights of modules"),
    ],
)
def test_what_peft_cannot_say_is_not_written(
    name: str, adapters: Any, said: str, tmp_path: Path
) -> None:
    model = ALL[name].fresh()
    mm.attach(model, adapters)
    with pytest.raises(AdapterFileError, match=said):
        write_peft(model, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_a_file_in_the_way_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "lora").write_text("mine")
    model = ALL["hf_vit"].fresh()
    mm.attach(model, mm.LoRA(2))
    with pytest.raises(AdapterFileError, match="is a file"):
        write_peft(model, tmp_path / "lora")
    assert (tmp_path / "lora").read_text() == "mine"


# -- what is refused ---------------------------------------------------------------------------------


def refused(file: Path, saved: dict[str, Tensor], kind: str = "clip_vision") -> str:
    """The text of the error; the model is as it was, with what was attached before."""
    model = backbone(kind, saved)
    randomise(mm.attach(model, mm.LoRA(2), name="mine"))
    expected = outputs(model, saved[f"{kind} batch"])  # the first forward's check is gone then
    before = state(model)
    for replace, name in ((False, None), (True, "mine")):
        with pytest.raises(AdapterFileError) as caught:
            mm.load_adapter(model, file, name=name, replace=replace)
        assert state(model) == before
        assert list(mm.attachments(model)) == ["mine"]
        assert distance(outputs(model, saved[f"{kind} batch"]), expected) == 0.0
    return str(caught.value)


def test_files_of_variants_are_refused_by_name(saved: dict[str, Tensor]) -> None:
    assert "a LoRA of PEFT with DoRA, which cannot be read" in refused(FILES / "dora.zip", saved)
    text = refused(FILES / "pissa.zip", saved)
    assert "the start 'pissa', which changes the backbone's own weights" in text
    assert "path_initial_model_for_weight_conversion" in text


@pytest.mark.parametrize(
    ("option", "value", "word"),
    [
        ("alora_invocation_tokens", [1, 2], "aLoRA"),
        ("use_bdlora", {"nblocks": 2}, "BD-LoRA"),
        ("velora_config", {"num_groups": 2}, "VeLoRA"),
        ("monteclora_config", {"num_samples": 2}, "MonteCLoRA"),
        ("kasa_config", {"beta": 1.0}, "KaSA"),
        ("use_qalora", True, "QALoRA"),
        ("arrow_config", {"top_k": 1}, "Arrow"),
        ("layer_replication", [[0, 2]], "replicated layers"),
        ("target_parameters", ["experts"], "target_parameters"),
        ("trainable_token_indices", [3], "trainable_token_indices"),
        ("init_lora_weights", "olora", "the start 'olora'"),
        ("init_lora_weights", "loftq", "the start 'loftq'"),
    ],
)
def test_variants_are_named(
    option: str, value: Any, word: str, folder: Callable[[str], Path], saved: dict[str, Tensor]
) -> None:
    assert word in refused(rewrite(folder("clip_vision"), **{option: value}), saved)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"peft_type": "VERA"}, "holds PEFT's VERA, which cannot be read"),
        ({"lora_alpha": "much"}, "lora_alpha is 'much', expected a number"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan, expected a number"),
        ({"alpha_pattern": [1]}, "alpha_pattern is [1], expected an object"),
        ({"rank_pattern": {"(": 1}}, "rank_pattern has '('"),
        ({"lora_dropout": 4}, "dropout is 4"),
        ({"r": 0}, "r is 0, expected a whole number of at least 1"),
        (
            {"rank_pattern": {"q_proj": 2.5}},
            "rank_pattern['q_proj'] is 2.5, expected a whole number",
        ),
    ],
)
def test_settings_without_meaning_are_named(
    settings: Any, said: str, folder: Callable[[str], Path], saved: dict[str, Tensor]
) -> None:
    assert said in refused(rewrite(folder("clip_vision"), **settings), saved)


A0 = "base_model.model.vision_model.encoder.layers.0.self_attn.q_proj.lora_A.weight"
WRONG: list[tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = [
    (lambda t: {k: v for k, v in t.items() if k != A0}, f"1 missing: {A0}"),
    (
        lambda t: {k: v for k, v in t.items() if ".layers.1." not in k},
        "3 missing: a change of vision.layers[1].attn.q, a change of vision.layers[1].attn.v",
    ),
    (
        lambda t: {**t, A0.replace("layers.0", "layers.7"): t[A0].clone()},
        "1 unexpected: base_model.model.",
    ),
    (lambda t: {**t, "stray": t[A0].clone()}, "1 unexpected: stray"),
    (lambda t: {**t, A0.replace(".weight", ".default.weight"): t[A0].clone()}, "1 unexpected: "),
    (
        lambda t: {**t, **{k.replace("vision_model.", ""): v.clone() for k, v in t.items()}},
        "12 unexpected: base_model.model.",
    ),
    (
        lambda t: {**t, A0.replace(".weight", ".bias"): t[A0].clone()},
        "unexpected: base_model.model.",
    ),
    (lambda t: {**t, A0.replace("_A.", "_embedding_A."): t[A0].clone()}, "1 unexpected"),
    (
        lambda t: {**t, A0: t[A0][:, :5].contiguous()},
        f"1 of another shape: {A0} is f32[2,5], expected [2,16]",
    ),
    (lambda t: {**t, A0: t[A0][:1].clone()}, f"{A0} is f32[1,16], expected [2,16]"),
    (lambda t: {**t, A0: t[A0][0].clone()}, f"{A0} is f32[16], expected [2,16]"),
    (
        lambda t: {**t, "base_model.model.vision_model.post_layernorm.weight": t[A0].clone()},
        "another shape",
    ),
]


@pytest.mark.parametrize(("change", "said"), WRONG)
def test_keys_and_shapes_that_do_not_fit_are_listed(
    change: Any, said: str, folder: Callable[[str], Path], saved: dict[str, Tensor]
) -> None:
    assert said in refused(rewrite(folder("clip_vision"), change), saved)


def test_a_file_for_the_text_tower_does_not_land_in_the_image_tower(
    folder: Callable[[str], Path], saved: dict[str, Tensor]
) -> None:
    file = rewrite(
        folder("clip_vision"),
        lambda t: {k.replace("vision_model", "text_model"): v for k, v in t.items()},
    )
    assert "12 unexpected" in refused(file, saved)


def test_a_name_of_target_modules_that_nothing_belongs_to_is_told(
    folder: Callable[[str], Path], saved: dict[str, Tensor]
) -> None:
    file = rewrite(folder("clip_vision"), target_modules=["q_proj", "v_proj", "fc1", "fc9"])
    report = read_peft(backbone("clip_vision", saved), file)
    assert report.notes == ("target_modules names 'fc9', which no tensor of the file belongs to",)


def test_a_name_of_one_layer_beside_names_of_all_asks_for_that_layer_alone(
    folder: Callable[[str], Path], saved: dict[str, Tensor]
) -> None:
    file = rewrite(
        folder("clip_vision"),
        lambda t: {k: v for k, v in t.items() if "layers.1.mlp.fc1" not in k},
        target_modules=["q_proj", "v_proj", "layers.0.mlp.fc1"],
    )
    report = read_peft(backbone("clip_vision", saved), file)
    assert report.tensors == 10 and report.notes == ()


def test_a_damaged_or_incomplete_folder_is_told(
    folder: Callable[[str], Path], saved: dict[str, Tensor]
) -> None:
    file = folder("clip_vision")
    tensors = file / "adapter_model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:100])
    assert "is no safetensors file" in refused(file, saved)
    tensors.unlink()
    assert "has no adapter_model.safetensors or adapter_model.bin" in refused(file, saved)
    (file / "adapter_config.json").write_text("[1]")
    assert "holds list, expected an object" in refused(file, saved)
    (file / "adapter_config.json").write_text("{")
    assert "cannot be read as JSON" in refused(file, saved)


def test_a_taken_name_is_refused_and_replaced_on_request(saved: dict[str, Tensor]) -> None:
    model = backbone("clip_vision", saved)
    mm.attach(model, mm.Bottleneck(2), name="mine")
    with pytest.raises(AttachError, match="is already there"):
        mm.load_adapter(model, FILES / "clip_vision.zip", name="mine")
    mm.load_adapter(model, FILES / "clip_vision.zip", name="mine", replace=True)
    assert distance(outputs(model, saved["clip_vision batch"]), saved["clip_vision"]) < 5e-6
