"""AdapterHub's files, as it wrote them, against what it computed with them.

`peers/make_adapterhub_files.py` made both.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peer_files import PEERS, distance, fill, outputs, part
from peers.kept import IMAGE, SIZE, TEXT, WHISPER
from safetensors.torch import load_file, save_file
from snapshot import assert_equal, state
from torch import Tensor, nn

import mmadapt as mm
from mmadapt.errors import AdapterFileError
from mmadapt.interop import read_adapterhub

FILES = PEERS / "adapterhub"
CONFIGS = ("seq", "double", "par", "plus", "norms", "lora")


@pytest.fixture(scope="module")
def saved() -> dict[str, Tensor]:
    return load_file(PEERS / "adapterhub_files.safetensors")


def backbone(kind: str, saved: dict[str, Tensor]) -> Any:
    """Today's class of transformers with the weights that AdapterHub's release had."""
    import transformers as t

    if kind == "vit":
        model: nn.Module = t.ViTModel(t.ViTConfig(**SIZE, **IMAGE))
    elif kind == "clip":
        vision, text = {**SIZE, **IMAGE}, {**SIZE, **TEXT}
        config = t.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
        model = t.CLIPModel(config)
    else:
        model = t.WhisperModel(t.WhisperConfig(**WHISPER))
    return fill(model, part(saved, f"{kind} backbone."))


def outputs_of(kind: str, model: Any, saved: dict[str, Tensor]) -> Tensor:
    return outputs(model, **part(saved, f"{kind} batch."))


# -- what it computes -------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("kind", ["vit", "clip", "whisper"])
def test_an_adapter_computes_what_adapterhub_did(
    kind: str, config: str, saved: dict[str, Tensor]
) -> None:
    model = backbone(kind, saved)
    bare = saved[f"{kind} bare"]
    assert distance(outputs_of(kind, model, saved), bare) < 5e-6
    attachment = mm.load_adapter(model, FILES / f"{kind}_{config}.zip")
    assert attachment.name == "mine"
    expected = saved[f"{kind} {config}"]
    assert distance(bare, expected) > 0.05
    assert distance(outputs_of(kind, model, saved), expected) < 5e-6
    mm.detach(model)
    assert distance(outputs_of(kind, model, saved), bare) < 5e-6


def test_the_other_names_of_transformers_5_fit_too(
    saved: dict[str, Tensor], tmp_path: Path
) -> None:
    folder = unzip("vit_seq", tmp_path)
    path = folder / "adapter.safetensors"
    renamed = {f"vit.{key}": value for key, value in load_file(path).items()}
    save_file(renamed, path)
    model = backbone("vit", saved)
    mm.load_adapter(model, folder)
    assert distance(outputs_of("vit", model, saved), saved["vit seq"]) < 5e-6


def test_configurations_become_hyper_parameters(saved: dict[str, Tensor]) -> None:
    expected = {
        "seq": {
            mm.Bottleneck(4, activation="relu"),
            mm.Bottleneck(4, activation="relu", placement="joined"),
        },
        "double": {mm.Bottleneck(4, activation="silu")},
        "par": {
            mm.Bottleneck(4, activation="relu", placement="residual", scale_kind="learned"),
        },
        "plus": {mm.Bottleneck(4, scale_kind="channel", drop_path=0.1)},
        "norms": {mm.Bottleneck(4, activation="relu", norm="both", scale=0.5)},
        "lora": {mm.LoRA(2, alpha=6.0)},
    }
    for config, adapters in expected.items():
        attachment = mm.load_adapter(backbone("vit", saved), FILES / f"vit_{config}.zip")
        made = attachment.adapter
        assert set(made if isinstance(made, tuple) else (made,)) == adapters, config


def test_what_was_read_is_saved_and_loaded_as_mmadapts_own(
    saved: dict[str, Tensor], tmp_path: Path
) -> None:
    model = backbone("clip", saved)
    attachment = mm.load_adapter(model, FILES / "clip_norms.zip", name="theirs")
    attachment.save(tmp_path / "ours")
    again = backbone("clip", saved)
    assert mm.load_adapter(again, tmp_path / "ours").name == "theirs"
    expected = outputs_of("clip", model, saved)
    assert_equal((outputs_of("clip", again, saved),), (expected,))


# -- heads -------------------------------------------------------------------------------------------


def classifier(saved: dict[str, Tensor], classes: int = 3) -> Any:
    from transformers import ViTConfig, ViTForImageClassification

    model = ViTForImageClassification(ViTConfig(**SIZE, **IMAGE, num_labels=classes))
    weights = part(saved, "vit backbone.")
    fill(model.vit, {key: value for key, value in weights.items() if "pooler" not in key})
    return model.eval()


@pytest.mark.parametrize("kind", ["pets", "own"])
def test_a_plain_classifier_comes_with_its_adapter(kind: str, saved: dict[str, Tensor]) -> None:
    model = classifier(saved, classes=5)
    attachment = mm.load_adapter(model, FILES / f"vit_{kind}.zip")
    assert distance(outputs_of("vit", model, saved), saved[f"vit {kind}"]) < 5e-6
    assert isinstance(attachment.adapter, tuple)
    names = ("cat", "dog", "newt") if kind == "pets" else ()  # its labels are LABEL_0 and so on
    assert attachment.adapter[-1] == mm.Head(3, names)


def test_without_a_place_for_it_the_classifier_is_left_out_and_said_so(
    saved: dict[str, Tensor],
) -> None:
    model = backbone("vit", saved)
    attachment = mm.load_adapter(model, FILES / "vit_pets.zip")
    assert attachment.adapter == mm.Bottleneck(4, activation="relu")
    assert "was left out: ViTModel has no site 'logits'" in attachment.metadata["origin"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"head_type": "masked_lm"}, "a masked_lm head is no single classifier"),
        ({"use_pooler": True}, "it reads pooled features"),
    ],
)
def test_other_heads_are_left_out_and_said_so(
    settings: Any, said: str, saved: dict[str, Tensor], tmp_path: Path
) -> None:
    folder = unzip("vit_pets", tmp_path)
    rewrite(folder, "head_config.json", **settings)
    model = classifier(saved)
    attachment = mm.load_adapter(model, folder)
    assert said in attachment.metadata["origin"]
    assert attachment.adapter == mm.Bottleneck(4, activation="relu")


def test_a_head_of_several_layers_is_left_out(saved: dict[str, Tensor], tmp_path: Path) -> None:
    folder = unzip("vit_pets", tmp_path)
    path = folder / "pytorch_model_head.bin"
    weights = folder / "model_head.safetensors"
    tensors = load_file(weights) if weights.is_file() else torch.load(path)
    tensors = {**tensors, "heads.mine.4.weight": torch.zeros(3, 3)}
    path.unlink(missing_ok=True)
    save_file({key: value.contiguous() for key, value in tensors.items()}, weights)
    report = read_adapterhub(classifier(saved), folder)
    assert "is no single classifier" in str(report)


# -- what is refused ---------------------------------------------------------------------------------


def unzip(name: str, place: Path) -> Path:
    with zipfile.ZipFile(FILES / f"{name}.zip") as archive:
        archive.extractall(place / name)
    return place / name


def rewrite(folder: Path, file: str = "adapter_config.json", **settings: Any) -> Path:
    """The same folder with other settings, of the configuration around them where they stand there."""
    path = folder / file
    config = json.loads(path.read_text())
    for key, value in settings.items():
        (config if key in ("model_type", "version", "name") else config["config"])[key] = value
    path.write_text(json.dumps(config))
    return folder


def refused(file: Path, saved: dict[str, Tensor], kind: str = "vit") -> str:
    """The text of the error; the model is as it was."""
    model = backbone(kind, saved)
    before, expected = state(model), outputs_of(kind, model, saved)
    with pytest.raises(AdapterFileError) as caught:
        mm.load_adapter(model, file)
    assert state(model) == before
    assert mm.attachments(model) == {}
    assert_equal((outputs_of(kind, model, saved),), (expected,))
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("gated", "gating (UniPELT)"),
        ("phm", "PHM layers (Compacter)"),
        ("ia3", "(IA)³"),
        ("dora", "DoRA"),
        ("prefix", "the architecture 'prefix_tuning'"),
    ],
)
def test_other_methods_are_refused_by_name(name: str, said: str, saved: dict[str, Tensor]) -> None:
    text = refused(FILES / f"vit_{name}.zip", saved)
    assert f"is an adapter of AdapterHub with {said}, which cannot be read" in text


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"inv_adapter": "nice"}, "invertible adapters"),
        ({"vera_d": 0.1}, "VeRA"),
        ({"model_type": "bert"}, "bottlenecks of a 'bert' backbone"),
        ({"model_type": "beit"}, "bottlenecks of a 'beit' backbone"),
        ({"non_linearity": "leakyrelu"}, "the activation 'leakyrelu'"),
        ({"original_ln_after": False}, "original_ln_after=False, residual_before_ln=True"),
        ({"residual_before_ln": False}, "the residual stream would be lost or counted twice"),
        ({"residual_before_ln": "post_add"}, "residual_before_ln='post_add'"),
        ({"is_parallel": True, "original_ln_after": False}, "no residual connection"),
        ({"ln_after": True, "adapter_residual_before_ln": True}, "a norm over its own residual"),
        ({"scaling": "much"}, "scaling is 'much', expected a number"),
        (
            {"scaling": "channel"},
            "missing: encoder.layer.0.attention_adapters.adapters.mine.scaling",
        ),
    ],
)
def test_settings_that_no_bottleneck_here_stands_for_are_named(
    settings: Any, said: str, saved: dict[str, Tensor], tmp_path: Path
) -> None:
    assert said in refused(rewrite(unzip("vit_seq", tmp_path), **settings), saved)


UP = "encoder.layer.0.output.output_adapters.adapters.mine.adapter_up.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: {k: v for k, v in t.items() if k != UP}, f"1 missing: {UP}"),
        (lambda t: {**t, UP: t[UP][:, :2].clone()}, f"{UP} is f32[16,2], expected [16,4]"),
        (lambda t: {**t, "stray": t[UP].clone()}, "1 unexpected: stray"),
        (lambda t: {**t, f"vit.{UP}": t[UP].clone()}, "1 unexpected: "),
        (
            lambda t: {**t, UP.replace("mine", "other"): t[UP].clone()},
            "holds several adapters in one file: mine, other",
        ),
        (
            lambda t: {k.replace("layer.1.", "layer.9."): v for k, v in t.items()},
            "8 unexpected: encoder.layer.9.",
        ),
        (
            lambda t: {k: v for k, v in t.items() if "layer.1." not in k},
            "2 missing: a change of vision.layers[1].attn, a change of vision.layers[1].mlp",
        ),
        (
            lambda t: {k.replace("output_ad", "cross_attention_ad"): v for k, v in t.items()},
            "unexpected",
        ),
    ],
)
def test_keys_and_shapes_that_do_not_fit_are_listed(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    said: str,
    saved: dict[str, Tensor],
    tmp_path: Path,
) -> None:
    folder = unzip("vit_seq", tmp_path)
    path = folder / "adapter.safetensors"
    save_file(change(load_file(path)), path)
    assert said in refused(folder, saved)


def test_layers_that_were_left_out_are_not_missed(saved: dict[str, Tensor], tmp_path: Path) -> None:
    folder = rewrite(unzip("vit_seq", tmp_path), leave_out=[1])
    path = folder / "adapter.safetensors"
    save_file({k: v for k, v in load_file(path).items() if "layer.1." not in k}, path)
    attachment = mm.load_adapter(backbone("vit", saved), folder)
    assert attachment.sites == ("vision.layers[0].attn:out", "vision.layers[0]:out")


@pytest.mark.parametrize("lost", ["lora_A", "lora_B"])
def test_half_a_lora_is_refused(lost: str, saved: dict[str, Tensor], tmp_path: Path) -> None:
    folder = unzip("vit_lora", tmp_path)
    path = folder / "adapter.safetensors"
    key = f"encoder.layer.0.intermediate.dense.loras.mine.{lost}"
    save_file({k: v for k, v in load_file(path).items() if k != key}, path)
    assert f"1 missing: {key}" in refused(folder, saved)


def test_an_older_release_scaled_its_lora_by_one(saved: dict[str, Tensor], tmp_path: Path) -> None:
    folder = rewrite(unzip("vit_lora", tmp_path), version="adapters.1.0.1")
    report = read_adapterhub(backbone("vit", saved), folder)
    assert report.attachment is not None and report.attachment.adapter == mm.LoRA(2, alpha=2.0)
    assert "scaled by 1, so alpha is 2 instead of 6" in report.notes[0]


def test_the_predecessor_called_activations_otherwise(
    saved: dict[str, Tensor], tmp_path: Path
) -> None:
    folder = rewrite(unzip("vit_plus", tmp_path), version="3.2.1", non_linearity="gelu")
    made = mm.load_adapter(backbone("vit", saved), folder).adapter
    assert isinstance(made, mm.Bottleneck) and made.activation == "gelu_new"


def test_the_predecessors_keys_are_read(saved: dict[str, Tensor], tmp_path: Path) -> None:
    folder = unzip("vit_seq", tmp_path)
    path = folder / "adapter.safetensors"
    old = {
        k.replace(".adapters.", ".layer_text_task_adapters."): v for k, v in load_file(path).items()
    }
    save_file(old, path)
    model = backbone("vit", saved)
    mm.load_adapter(model, folder)
    assert distance(outputs_of("vit", model, saved), saved["vit seq"]) < 5e-6


def test_a_pickle_with_more_than_tensors_is_not_run(
    saved: dict[str, Tensor], tmp_path: Path
) -> None:
    folder = unzip("vit_norms", tmp_path)
    torch.save({"a": Path("x")}, folder / "pytorch_adapter.bin")
    assert "cannot be read as tensors" in refused(folder, saved)


@pytest.mark.parametrize(
    ("file", "said"),
    [("adapter_fusion_config.json", "a fusion"), ("adapter_setup.json", "a composition")],
)
def test_fusions_and_compositions_are_refused_by_name(
    file: str, said: str, saved: dict[str, Tensor], tmp_path: Path
) -> None:
    folder = unzip("vit_seq", tmp_path)
    (folder / file).write_text("{}")
    assert f"holds {said} of adapters of AdapterHub ({file})" in refused(folder, saved)


def test_an_adapter_for_another_backbone_does_not_fit(saved: dict[str, Tensor]) -> None:
    text = refused(FILES / "vit_seq.zip", saved, kind="clip")
    assert "16 unexpected: encoder.layer.0" in text


def test_a_name_that_cannot_name_an_attachment_is_not_taken_over(
    saved: dict[str, Tensor], tmp_path: Path
) -> None:
    folder = rewrite(unzip("vit_lora", tmp_path), name="a/b c")
    assert mm.load_adapter(backbone("vit", saved), folder).name == "default"
