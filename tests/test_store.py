"""Adapter files: what is written, what is refused, and that a refusal changes nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import BACKBONES, LAYERS, Tiny
from handmade import NormGate
from safetensors.torch import load_file, save_file
from snapshot import assert_close, assert_equal, differ, randomise, state
from torch import Tensor, nn

import mmadapt as mm
from mmadapt.adapter import _REGISTRY, register_adapter
from mmadapt.core import restore, store
from mmadapt.core.card import CARD
from mmadapt.core.store import MANIFEST, TENSORS
from mmadapt.errors import AdapterFileError, AttachError, WrongBackboneError

HOME = BACKBONES["open_clip"]
DOWN = "0/vision.layers[0].mlp:out/down"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good adapter folder."""
    attachment = randomise(mm.attach(HOME.fresh(), mm.Bottleneck(4), name="sketch"))
    return attachment.save(tmp_path / "sketch", licence="CC0-1.0", metrics={"accuracy": 0.5})


def outputs(model: Any, tiny: Tiny = HOME) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return tiny.outputs(model)


def refused(folder: Path, kind: type[Exception] = AdapterFileError, tiny: Tiny = HOME) -> str:
    """The text of the error; the model is bit-identical and carries no hook."""
    model = tiny.fresh()
    before, expected = state(model), outputs(model, tiny)
    with pytest.raises(kind) as caught:
        mm.load_adapter(model, folder)
    assert state(model) == before
    assert mm.attachments(model) == {}
    assert_equal(outputs(model, tiny), expected)
    return str(caught.value)


def manifest_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / MANIFEST).read_text())


def rewrite(
    folder: Path,
    change: Callable[[dict[str, Any]], Any] = lambda manifest: None,
    tensors: Callable[[dict[str, Tensor]], Any] = lambda tensors: None,
) -> Path:
    """The same folder after `change` of its manifest and `tensors` of its numbers."""
    manifest, values = manifest_of(folder), load_file(folder / TENSORS)
    change(manifest)
    tensors(values)
    save_file(values, folder / TENSORS, metadata={"mmadapt": json.dumps(manifest)})
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


# -- what is written ------------------------------------------------------------------------------


def test_the_manifest_says_what_it_is_and_what_it_was_made_for(folder: Path) -> None:
    manifest = manifest_of(folder)
    assert manifest["schema"] == store.SCHEMA
    assert manifest["name"] == "sketch"
    assert manifest["adapters"] == [
        {
            "method": "bottleneck",
            "width": 4,
            "placement": "sequential",
            "activation": "gelu",
            "scale": 1.0,
            "scale_kind": "fixed",
            "norm": "none",
            "dropout": 0.0,
            "start": "zero",
            "reduction": None,
            "drop_path": 0.0,
            "sites": [
                f"{t}.layers[{i}].mlp:out" for t in ("vision", "text") for i in range(LAYERS)
            ],
        }
    ]
    assert manifest["backbone"]["family"] == "clip"
    assert manifest["backbone"]["class"] == "open_clip.model.CLIP"
    assert manifest["backbone"]["facts"]["activation"] == "quick_gelu"
    assert manifest["tensors"][DOWN] == "f32[4,16]"
    assert manifest["licence"] == "CC0-1.0"
    assert manifest["metrics"] == {"accuracy": 0.5}
    assert manifest["versions"]["mmadapt"] == mm.__version__


def test_only_the_adapters_tensors_are_written(folder: Path) -> None:
    tensors = load_file(folder / TENSORS)
    assert set(tensors) == set(manifest_of(folder)["tensors"])
    assert sum(tensor.numel() for tensor in tensors.values()) == 4 * (2 * 16 * 4 + 4 + 16)
    assert sorted(os.listdir(folder)) == [CARD, MANIFEST, TENSORS]


def test_saving_over_an_older_adapter_replaces_both_files(folder: Path) -> None:
    model = HOME.fresh()
    randomise(mm.attach(model, mm.LoRA(2), name="other"))
    expected = outputs(model)
    assert mm.save(model, folder) == folder
    assert sorted(os.listdir(folder)) == [CARD, MANIFEST, TENSORS]
    fresh = HOME.fresh()
    assert mm.load_adapter(fresh, folder).name == "other"
    assert_equal(outputs(fresh), expected)


def test_a_folder_that_is_missing_is_made_and_a_tilde_is_the_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    model = HOME.fresh()
    mm.attach(model, mm.Bottleneck(4))
    assert mm.save(model, "~/a/b") == tmp_path / "a" / "b"
    assert mm.load_adapter(HOME.fresh(), "~/a/b").name == "default"


def test_a_file_in_the_way_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("mine")
    model = HOME.fresh()
    mm.attach(model, mm.Bottleneck(4))
    with pytest.raises(AdapterFileError, match="is a file") as caught:
        mm.save(model, path)
    assert caught.value.hint == "adapters are saved to a folder"
    assert path.read_text() == "mine"


@pytest.mark.parametrize("value", [float("nan"), torch.tensor(1.0), object()])
def test_metrics_that_json_cannot_hold_are_refused_by_name(tmp_path: Path, value: Any) -> None:
    model = HOME.fresh()
    mm.attach(model, mm.Bottleneck(4))
    with pytest.raises(mm.MmadaptError, match="metrics"):
        mm.save(model, tmp_path / "x", metrics={"loss": value})


def test_metrics_that_json_cannot_hold_write_nothing(tmp_path: Path) -> None:
    model = HOME.fresh()
    mm.attach(model, mm.Bottleneck(4))
    with pytest.raises((ValueError, TypeError)):
        mm.save(model, tmp_path / "x", metrics={"loss": float("nan")})
    assert not (tmp_path / "x").exists()


# -- what is loaded ---------------------------------------------------------------------------------


def test_it_loads_under_its_own_name_or_another(folder: Path) -> None:
    model = HOME.fresh()
    one = mm.load_adapter(model, folder)
    two = mm.load_adapter(model, str(folder), name="copy")
    assert (one.name, two.name) == ("sketch", "copy")
    assert two.metadata == {"licence": "CC0-1.0", "metrics": {"accuracy": 0.5}}
    assert mm.active(model) == mm.Sum("copy")


def test_a_taken_name_is_refused_and_replace_puts_the_file_in_its_place(folder: Path) -> None:
    model = HOME.fresh()
    mm.load_adapter(model, folder)
    expected = outputs(model)
    randomise(mm.attachments(model)["sketch"])
    changed = outputs(model)
    before = state(model)
    with pytest.raises(AttachError, match="'sketch' is already there"):
        mm.load_adapter(model, folder)
    assert state(model) == before
    assert_equal(outputs(model), changed)
    mm.load_adapter(model, folder, replace=True)
    assert_equal(outputs(model), expected)


def test_half_precision_tensors_load_into_float32_layers(folder: Path) -> None:
    def halve(tensors: dict[str, Tensor]) -> None:
        tensors.update({key: value.half() for key, value in tensors.items()})

    attachment = mm.load_adapter(HOME.fresh(), rewrite(folder, tensors=halve))
    assert {p.dtype for p in attachment.parameters()} == {torch.float32}


def test_the_global_random_state_is_left_alone(folder: Path) -> None:
    before = torch.get_rng_state()
    mm.load_adapter(HOME.fresh(), folder)
    assert torch.equal(torch.get_rng_state(), before)


# -- what is not there ------------------------------------------------------------------------------


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    text = refused(tmp_path / "nowhere")
    assert f"there is no adapter at {tmp_path / 'nowhere'}" in text
    assert "give the folder mmadapt.save wrote" in text


def test_a_file_is_no_folder(folder: Path) -> None:
    for part in (TENSORS, MANIFEST):
        assert f"{folder / part} is one file of an adapter" in refused(folder / part)
        assert f"give its folder, {str(folder)!r}" in refused(folder / part)


@pytest.mark.parametrize(("gone", "left"), [(MANIFEST, TENSORS), (TENSORS, MANIFEST)])
def test_a_missing_file_is_named_with_what_is_there(folder: Path, gone: str, left: str) -> None:
    (folder / gone).unlink()
    text = refused(folder)
    assert f"has no {gone}; it holds README.md, {left}" in text
    assert "a folder with adapter.json and adapter.safetensors" in text


def test_an_empty_folder_holds_nothing(tmp_path: Path) -> None:
    assert "it holds nothing" in refused(tmp_path)


# -- what is damaged ----------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1])
def test_a_truncated_file_is_damaged(folder: Path, keep: int) -> None:
    content = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(content[:keep])
    text = refused(folder)
    assert f"{folder / TENSORS} is damaged or not a safetensors file" in text
    assert "copy or save it again" in text


@pytest.mark.parametrize(
    "content",
    [b"not safetensors", b"PK\x03\x04" + bytes(64), b"\xff" * 64],
    ids=["text", "zip", "noise"],
)
def test_something_else_under_that_name_is_damaged(folder: Path, content: bytes) -> None:
    (folder / TENSORS).write_bytes(content)
    assert "is damaged or not a safetensors file" in refused(folder)


@pytest.mark.parametrize("text", ["", "{", "not json"])
def test_a_manifest_that_is_no_json_is_named(folder: Path, text: str) -> None:
    save_file(load_file(folder / TENSORS), folder / TENSORS)  # no manifest in the header
    (folder / MANIFEST).write_text(text)
    assert f"{folder / MANIFEST} is not JSON" in refused(folder)


@pytest.mark.parametrize("manifest", [[], 3, {}, {"schema": "1"}])
def test_a_manifest_without_a_schema_is_none(folder: Path, manifest: Any) -> None:
    save_file(load_file(folder / TENSORS), folder / TENSORS)
    (folder / MANIFEST).write_text(json.dumps(manifest))
    assert "is not an adapter manifest: it has no schema" in refused(folder)


@pytest.mark.parametrize("key", ["name", "adapters", "backbone", "tensors", "versions", "metrics"])
def test_a_manifest_that_lacks_a_part_is_refused(folder: Path, key: str) -> None:
    text = refused(rewrite(folder, lambda manifest: manifest.pop(key)))
    assert f"{key!r} is None, expected a " in text


def test_a_file_without_a_header_is_read_by_its_manifest(folder: Path) -> None:
    save_file(load_file(folder / TENSORS), folder / TENSORS)
    assert mm.load_adapter(HOME.fresh(), folder).name == "sketch"


# -- what is too new or unknown -------------------------------------------------------------------


def test_a_newer_schema_is_refused_by_number(folder: Path) -> None:
    newer = store.SCHEMA + 1
    text = refused(rewrite(folder, lambda manifest: manifest.update(schema=newer)))
    assert f"has schema {newer}; this mmadapt reads up to {store.SCHEMA}" in text
    assert "upgrade mmadapt" in text


def test_a_schema_nobody_wrote_is_refused(folder: Path) -> None:
    text = refused(rewrite(folder, lambda manifest: manifest.update(schema=0)))
    assert "has the unknown schema 0" in text


def test_an_older_schema_is_upgraded_step_by_step(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def from_zero(old: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
        return {**old, "schema": 1, "name": "upgraded"}, {**tensors, DOWN: tensors[DOWN] * 0}

    monkeypatch.setattr(restore, "UPGRADES", {0: from_zero, **restore.UPGRADES})
    rewrite(folder, lambda manifest: manifest.update(schema=0))
    attachment = mm.load_adapter(HOME.fresh(), folder)
    assert attachment.name == "upgraded"
    assert not attachment.layers[DOWN.rpartition("/")[0]].down.any()  # type: ignore[operator,union-attr]


def test_upgrades_leave_what_they_are_given_alone_and_know_broken_manifests() -> None:
    from mmadapt.core.upgrades import UPGRADES

    old: dict[str, Any] = {
        "schema": 1,
        "adapters": [{"method": "compacter"}, {"method": "lora"}, 7],
    }
    new, _ = UPGRADES[1](old, {})
    assert old == {"schema": 1, "adapters": [{"method": "compacter"}, {"method": "lora"}, 7]}
    assert new["schema"] == 2
    assert new["adapters"] == [{"method": "compacter", "shared_rule": False}, {"method": "lora"}, 7]
    for broken in ({"schema": 1}, {"schema": 1, "adapters": 3}, {"schema": 1, "adapters": {}}):
        assert UPGRADES[1](broken, {})[0] == {**broken, "schema": 2}


def test_an_unknown_method_is_refused_with_near_names(folder: Path) -> None:
    text = refused(rewrite(folder, lambda m: m["adapters"][0].update(method="botleneck")))
    assert "unknown adapter method 'botleneck'" in text
    assert "did you mean 'bottleneck'?" in text


def test_the_method_of_a_plug_in_that_is_gone_is_named(tmp_path: Path) -> None:
    register_adapter(NormGate)
    try:
        attachment = mm.attach(HOME.fresh(), NormGate(), at="vision.layers[*].mlp")
        folder = attachment.save(tmp_path / "gate")
    finally:
        del _REGISTRY[NormGate.method]
    assert "unknown adapter method 'handmade_norm_gate'" in refused(folder)


def test_an_unknown_hyper_parameter_is_refused_with_near_names(folder: Path) -> None:
    text = refused(rewrite(folder, lambda m: m["adapters"][0].update(widht=4)))
    assert "Bottleneck has no hyper-parameter 'widht'" in text
    assert "did you mean 'width'?" in text


@pytest.mark.parametrize("value", [0, -1, 2.5, "4", True])
def test_a_hyper_parameter_without_meaning_is_refused(folder: Path, value: Any) -> None:
    text = refused(rewrite(folder, lambda m: m["adapters"][0].update(width=value)))
    assert f"width is {value!r}, expected a whole number of at least 1" in text


def test_an_adapter_without_its_sites_is_refused(folder: Path) -> None:
    text = refused(rewrite(folder, lambda m: m["adapters"][0].pop("sites")))
    assert "an adapter lacks its list of sites" in text


def test_a_file_without_any_adapter_is_refused(folder: Path) -> None:
    rewrite(folder, lambda m: m.update(adapters=[]), lambda tensors: tensors.clear())
    refused(folder)


def test_a_layer_that_cannot_be_built_here_names_the_file(tmp_path: Path) -> None:
    folder = mm.attach(HOME.fresh(), mm.LoRA(2)).save(tmp_path / "lora")
    rewrite(folder, lambda m: m["adapters"][0].update(rank=1000))
    assert "exceeds the weight" in refused(folder)


def test_a_name_that_cannot_name_an_attachment_names_the_file(folder: Path) -> None:
    refused(rewrite(folder, lambda manifest: manifest.update(name="a b")))


# -- tensors that do not fit --------------------------------------------------------------------------


def test_a_missing_tensor_is_listed(folder: Path) -> None:
    text = refused(rewrite(folder, tensors=lambda tensors: tensors.pop(DOWN)))
    assert f"the tensors do not fit: 1 missing: {DOWN}" in text
    assert str(folder) in text
    assert "nothing was loaded" in text


def test_an_unexpected_tensor_is_listed(folder: Path) -> None:
    text = refused(rewrite(folder, tensors=lambda t: t.update(extra=torch.zeros(1))))
    assert "1 unexpected: extra" in text


def test_a_tensor_of_another_shape_is_listed_with_both(folder: Path) -> None:
    text = refused(rewrite(folder, tensors=lambda t: t.update({DOWN: torch.zeros(4, 17)})))
    assert f"1 of another shape or kind: {DOWN} is f32[4,17], expected f32[4,16]" in text


def test_a_tensor_of_another_kind_is_listed(folder: Path) -> None:
    whole = torch.zeros(4, 16, dtype=torch.int64)
    text = refused(rewrite(folder, tensors=lambda t: t.update({DOWN: whole})))
    assert f"{DOWN} is i64[4,16], expected f32[4,16]" in text


def test_all_mismatches_are_told_at_once(folder: Path) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors.pop(DOWN)
        tensors["extra"] = torch.zeros(1)
        tensors["0/vision.layers[0].mlp:out/up"] = torch.zeros(1)

    text = refused(rewrite(folder, tensors=spoil))
    assert "1 missing" in text
    assert "1 unexpected" in text
    assert "1 of another shape or kind" in text


def test_a_long_list_is_cut(folder: Path) -> None:
    text = refused(rewrite(folder, tensors=lambda tensors: tensors.clear()))
    assert "16 missing" in text
    assert "…" in text


# -- another backbone ---------------------------------------------------------------------------------


def test_another_family_is_refused_by_name(folder: Path) -> None:
    text = refused(folder, WrongBackboneError, BACKBONES["hf_vit"])
    assert "was made for open_clip.model.CLIP (family 'clip')" in text
    assert "this is a ViTModel (family 'vit')" in text


def test_another_activation_is_refused(folder: Path) -> None:
    text = refused(
        folder, WrongBackboneError, BACKBONES["open_clip_custom_text"]
    )  # gelu, not quick
    assert "activation is 'gelu' here and 'quick_gelu' in the file" in text
    assert "load it into open_clip.model.CLIP" in text


@pytest.mark.parametrize("part", ["facts", "widths"])
def test_another_size_is_refused_with_both_numbers(folder: Path, part: str) -> None:
    key = {"facts": "vision_layers", "widths": "vision.layers[*].mlp"}[part]
    text = refused(
        rewrite(folder, lambda m: m["backbone"][part].update({key: 99})), WrongBackboneError
    )
    assert f"{key} is " in text
    assert "here and 99 in the file" in text


def test_a_site_this_backbone_lacks_is_refused_with_near_names(folder: Path) -> None:
    def move(manifest: dict[str, Any]) -> None:
        manifest["adapters"][0]["sites"][0] = "vision.layers[0].mpl:out"

    text = refused(rewrite(folder, move), WrongBackboneError)
    assert "site 'vision.layers[0].mpl:out' is not in this CLIP" in text
    assert "vision.layers[0].mlp" in text


@pytest.mark.parametrize("site", ["vision.layers[0].mlp:weight", "vision.layers[0].mlp", ":out", 3])
def test_a_port_this_site_lacks_is_refused(folder: Path, site: Any) -> None:
    def move(manifest: dict[str, Any]) -> None:
        manifest["adapters"][0]["sites"][0] = site

    assert f"site {site!r} is not in this CLIP" in refused(
        rewrite(folder, move), WrongBackboneError
    )


class _Entry:
    name = "tiny/clip"
    revision = "1"

    def __init__(self, sha256: str) -> None:
        self.sha256 = sha256


def test_other_weights_of_the_same_backbone_are_a_warning(tmp_path: Path) -> None:
    one = mm.Backbone(HOME.fresh(), entry=_Entry("a" * 64))
    folder = mm.attach(one, mm.Bottleneck(4)).save(tmp_path / "x")
    assert manifest_of(folder)["backbone"]["zoo"] == "tiny/clip"
    with pytest.warns(UserWarning, match=r"trained on weights aaaaaaaaaaaa….* has bbbbbbbbbbbb…"):
        mm.load_adapter(mm.Backbone(HOME.fresh(), entry=_Entry("b" * 64)), folder)


# -- a save that is killed ------------------------------------------------------------------------


def test_a_save_killed_between_its_files_leaves_the_new_adapter(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = HOME.fresh()
    randomise(mm.attach(model, mm.LoRA(2), name="newer"))
    original = store.replace_file

    def killed(path: Path, content: bytes) -> None:
        if path.name == MANIFEST:
            raise KeyboardInterrupt
        original(path, content)

    monkeypatch.setattr(store, "replace_file", killed)
    with pytest.raises(KeyboardInterrupt):
        mm.save(model, folder)
    monkeypatch.undo()
    assert manifest_of(folder)["name"] == "sketch"  # stale, and it does not decide
    fresh = HOME.fresh()
    assert mm.load_adapter(fresh, folder).adapter == mm.LoRA(2)
    assert_equal(outputs(fresh), outputs(model))


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_save_killed_within_a_file_leaves_the_old_adapter(
    folder: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    model = HOME.fresh()
    mm.attach(model, mm.LoRA(2), name="newer")

    def killed(*args: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(store.os, step, killed)
    with pytest.raises(OSError, match="no space left"):
        mm.save(model, folder)
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


# -- the same file in two libraries -----------------------------------------------------------------


def _from_open_clip(source: dict[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's CLIP weights under transformers' names (specs: key map of the two)."""
    target = {
        "vision_model.embeddings.class_embedding": source["visual.class_embedding"],
        "vision_model.embeddings.patch_embedding.weight": source["visual.conv1.weight"],
        "vision_model.embeddings.position_embedding.weight": source["visual.positional_embedding"],
        "visual_projection.weight": source["visual.proj"].T,
        "text_projection.weight": source["text_projection"].T,
        "text_model.embeddings.token_embedding.weight": source["token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": source["positional_embedding"],
        "logit_scale": source["logit_scale"],
    }
    towers = (("visual.transformer", "vision_model"), ("transformer", "text_model"))
    norms = {
        "visual.ln_pre": "vision_model.pre_layrnorm",
        "visual.ln_post": "vision_model.post_layernorm",
        "ln_final": "text_model.final_layer_norm",
    }
    inner = {
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "attn.out_proj": "self_attn.out_proj",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }
    for kind in ("weight", "bias"):
        for ours, theirs in norms.items():
            target[f"{theirs}.{kind}"] = source[f"{ours}.{kind}"]
        for ours, theirs in towers:
            for i in range(LAYERS):
                block, layer = f"{ours}.resblocks.{i}", f"{theirs}.encoder.layers.{i}"
                for name, other in inner.items():
                    target[f"{layer}.{other}.{kind}"] = source[f"{block}.{name}.{kind}"]
                packed = source[f"{block}.attn.in_proj_{kind}"].chunk(3)
                for word, part in zip("qkv", packed, strict=True):
                    target[f"{layer}.self_attn.{word}_proj.{kind}"] = part
    return {key: value.clone() for key, value in target.items()}


def converted(source: nn.Module) -> nn.Module:
    target = BACKBONES["hf_clip"].fresh()
    weights = _from_open_clip(dict(source.state_dict()))
    missing, unexpected = target.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all(key.endswith("position_ids") for key in missing)
    return target


@pytest.mark.parametrize(
    "adapter",
    [
        mm.Bottleneck(4),
        mm.Bottleneck(4, placement="parallel"),
        mm.ClipAdapter(reduction=2),
        mm.ScaleShift(),
        mm.Unlock(at=("*.layers[*].norm1", "*.layers[*].attn.*.bias", "vision.norm.bias")),
    ],
    ids=lambda adapter: f"{adapter.method}-{getattr(adapter, 'placement', '')}",
)
def test_one_file_fits_clip_in_both_libraries(adapter: mm.Adapter, tmp_path: Path) -> None:
    here = HOME.fresh()
    there = converted(here)
    theirs = BACKBONES["hf_clip"]
    bare = outputs(here)
    attachment = randomise(mm.attach(here, adapter))
    expected = outputs(here)
    assert differ(expected, bare)
    folder = attachment.save(tmp_path / "adapter")
    mm.load_adapter(there, folder)
    unit = tuple(nn.functional.normalize(o, dim=-1) for o in outputs(there, theirs))
    assert_close(unit, tuple(nn.functional.normalize(o, dim=-1) for o in expected), 1e-5)
    mm.save(there, tmp_path / "back")
    fresh = HOME.fresh()
    mm.load_adapter(fresh, tmp_path / "back")
    assert_equal(outputs(fresh), expected)


def test_lora_fits_both_libraries_where_both_offer_the_port(tmp_path: Path) -> None:
    here = HOME.fresh()
    there = converted(here)
    attachment = randomise(mm.attach(here, mm.LoRA(2, alpha=4.0), at="*.layers[*].mlp.*"))
    mm.load_adapter(there, attachment.save(tmp_path / "adapter"))
    unit = [
        tuple(nn.functional.normalize(o, dim=-1) for o in found)
        for found in (outputs(here), outputs(there, BACKBONES["hf_clip"]))
    ]
    assert_close(unit[1], unit[0], 1e-5)


def test_lora_at_packed_weights_fits_transformers_too(tmp_path: Path) -> None:
    here = HOME.fresh()
    there = converted(here)
    attachment = randomise(mm.attach(here, mm.LoRA(2, alpha=4.0)))
    assert all(site.endswith(":weight") for site in attachment.sites)
    mm.load_adapter(there, attachment.save(tmp_path / "adapter"))
    unit = [
        tuple(nn.functional.normalize(o, dim=-1) for o in found)
        for found in (outputs(here), outputs(there, BACKBONES["hf_clip"]))
    ]
    assert_close(unit[1], unit[0], 1e-5)


def test_lora_from_transformers_fits_open_clips_packed_weights(tmp_path: Path) -> None:
    here = HOME.fresh()
    there = converted(here)
    attachment = randomise(mm.attach(there, mm.LoRA(2)))
    expected = outputs(there, BACKBONES["hf_clip"])
    mm.load_adapter(here, attachment.save(tmp_path / "adapter"))
    assert_close(
        tuple(nn.functional.normalize(o, dim=-1) for o in outputs(here)),
        tuple(nn.functional.normalize(o, dim=-1) for o in expected),
        1e-5,
    )
