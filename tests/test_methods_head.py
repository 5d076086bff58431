"""New output layers: formula, sites, losses of other libraries, files with class names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import BACKBONES, CLASSES, WIDTH, pixels
from safetensors.torch import load_file
from snapshot import assert_close, assert_equal, randomise, state, values
from torch import Tensor
from torch.nn import functional as F

import mmadapt as mm
from mmadapt.adapter import from_json
from mmadapt.errors import AdapterError, SiteError

VIT = BACKBONES["hf_vit_classifier"]
NAMES = ("cat", "dog", "owl")


def features_of(model: Any, path: str = "classifier") -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}
    model.get_submodule(path).register_forward_pre_hook(
        lambda module, args: seen.__setitem__("x", args[0].detach())
    )
    return seen


@pytest.mark.parametrize("norm", [False, True])
def test_it_maps_what_the_classifier_reads(norm: bool) -> None:
    model: Any = VIT.fresh()
    seen = features_of(model)
    layer: Any
    (layer,) = randomise(mm.attach(model, mm.Head(3, norm=norm))).layers.values()
    with torch.no_grad():
        (logits,) = VIT.outputs(model)
        f = seen["x"]
        if norm:
            f = (f - f.mean(-1, keepdim=True)) / (
                f.var(-1, correction=0, keepdim=True) + 1e-5
            ).sqrt()
            f = f * layer.norm_weight + layer.norm_bias
        assert logits.shape == (3, 3)
        assert_close((logits,), (f @ layer.matrix.T + layer.bias,), 1e-5)


def test_it_starts_at_zero_and_cross_entropy_moves_it_at_once() -> None:
    model: Any = VIT.fresh()
    attachment = mm.attach(model, mm.Head(3))
    logits = model(**VIT.batch(3)).logits
    assert not logits.any()
    F.cross_entropy(logits, torch.tensor([0, 1, 2])).backward()
    assert all(float(p.grad.abs().max()) > 0 for p in attachment.parameters())


@pytest.mark.parametrize(
    ("name", "path", "inputs"),
    [
        ("hf_vit_classifier", "classifier", WIDTH),
        ("timm_vit", "head", WIDTH),
        ("hf_bert_classifier", "classifier", WIDTH),
        ("zero_shot_classifier", "head", 8),
    ],
)
def test_the_backbones_own_classifier_is_left_frozen_and_unsaved(
    name: str, path: str, inputs: int, tmp_path: Path
) -> None:
    tiny = BACKBONES[name]
    model: Any = tiny.fresh()
    before = values(model)
    attachment = mm.attach(model, mm.Head(7))
    assert attachment.num_parameters == 7 * (inputs + 1)
    assert tiny.outputs(model)[0].shape == (3, 7)
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    tiny.outputs(model)[0][:, 0].sum().backward()
    optimiser.step()
    for key, value in values(model).items():
        assert torch.equal(value, before[key])
    assert model.get_submodule(path).weight.grad is None
    attachment.save(tmp_path)
    assert sorted(load_file(tmp_path / "adapter.safetensors")) == [
        "0/logits:out/bias",
        "0/logits:out/matrix",
    ]
    attachment.detach()
    assert tiny.outputs(model)[0].shape[-1] == CLASSES


def test_tokens_get_logits_where_the_classifier_reads_tokens() -> None:
    from backbones import _bert_config, tokens
    from transformers import BertForTokenClassification

    model = BertForTokenClassification(_bert_config(num_labels=CLASSES)).eval()
    mm.attach(model, mm.Head(3))
    assert model(input_ids=tokens(2)).logits.shape == (2, 6, 3)


def test_transformers_own_loss_works_with_as_many_classes_and_else_refuses() -> None:
    model: Any = VIT.fresh()
    randomise(mm.attach(model, mm.Head(CLASSES), "same"))
    labels = torch.tensor([0, 4, 2])
    output = model(**VIT.batch(3), labels=labels)
    assert_close((output.loss,), (F.cross_entropy(output.logits, labels),), 1e-6)
    mm.attach(model, mm.Head(7), "more")
    with pytest.raises(RuntimeError, match="is invalid for input of size 21"):
        model(**VIT.batch(3), labels=labels)
    loss = F.cross_entropy(model(**VIT.batch(3)).logits, labels)  # what its docstring advises
    assert torch.isfinite(loss)
    mm.set_active(model, "same")
    assert torch.isfinite(model(**VIT.batch(3), labels=labels).loss)


def test_a_head_trains_beside_other_adapters() -> None:
    model: Any = VIT.fresh()
    attachment = mm.attach(model, [mm.LoRA(2), mm.Head(names=NAMES)], name="birds")
    labels = torch.tensor([0, 1, 2])

    def loss(module: Any, batch: Any) -> Tensor:
        return F.cross_entropy(module(pixel_values=batch).logits, labels)

    first = float(loss(model, pixels(3)).detach())
    mm.fit(model, [pixels(3)], loss=loss, steps=30, lr=0.05, progress=False)
    assert float(loss(model, pixels(3)).detach()) < 0.5 * first
    assert attachment.adapter[1].names == NAMES  # type: ignore[index]


# -- features -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["open_clip_vision", "hf_siglip_vision", "hf_clip_vision_projection"]
)
def test_pooled_features_of_a_tower_become_logits(name: str) -> None:
    tiny = BACKBONES[name]
    bare, model = tiny.fresh(), tiny.fresh()
    layer: Any
    (layer,) = randomise(mm.attach(model, mm.Head(3, at="vision.pooled"))).layers.values()
    with torch.no_grad():
        outputs = zip(tiny.outputs(model), tiny.outputs(bare), strict=True)
        changed = [(a, b) for a, b in outputs if a.shape != b.shape]
        ((found, features),) = changed
        assert_close((found,), (features @ layer.matrix.T + layer.bias,), 1e-5)


@pytest.mark.parametrize("name", ["hf_vit", "hf_dinov2", "hf_dinov2_registers"])
def test_without_a_classifier_the_error_shows_the_ways_on(name: str) -> None:
    model = BACKBONES[name].fresh()
    before = state(model)
    with pytest.raises(SiteError, match="this backbone has no site 'logits'") as caught:
        mm.attach(model, mm.Head(3))
    assert "mmadapt.Anatomy.from_paths" in caught.value.hint
    assert state(model) == before


@pytest.mark.parametrize(("name", "path"), [("hf_vit", "pooler"), ("hf_dinov2", "layernorm")])
def test_the_way_on_that_names_the_last_module_works(name: str, path: str) -> None:
    model: Any = BACKBONES[name].fresh()
    backbone = mm.Backbone(model, anatomy=mm.Anatomy.from_paths(model, {"pooled": path}))
    with torch.no_grad():
        features = model(**BACKBONES[name].batch(3)).pooler_output
        layer: Any
        (layer,) = randomise(mm.attach(backbone, mm.Head(3), at="pooled")).layers.values()
        found = model(**BACKBONES[name].batch(3)).pooler_output
    assert_close((found,), (features @ layer.matrix.T + layer.bias,), 1e-5)


def test_sites_the_backbone_computes_with_are_refused() -> None:
    model = BACKBONES["hf_vit"].fresh()
    for at in ("vision.layers[-1]", "vision.layers[*].mlp.down"):
        with pytest.raises(
            AdapterError, match="the backbone goes on computing with vision"
        ) as caught:
            mm.attach(model, mm.Head(3), at=at)
        assert "choose its outputs: 'logits'" in caught.value.hint
    assert mm.attachments(model) == {}


def test_two_heads_do_not_sum_and_switching_changes_the_width() -> None:
    model = VIT.fresh()
    mm.attach(model, mm.Head(3), "a")
    mm.attach(model, mm.Head(4), "b")
    with pytest.raises(mm.errors.AttachError, match="does not add a change"):
        mm.set_active(model, "a", "b")
    for name, classes in (("a", 3), ("b", 4)):
        mm.set_active(model, name)
        assert VIT.outputs(model)[0].shape == (3, classes)
    with mm.disabled(model):
        assert VIT.outputs(model)[0].shape == (3, CLASSES)


# -- names ----------------------------------------------------------------------------------------


def test_class_names_are_counted_and_travel_in_the_file(tmp_path: Path) -> None:
    adapter = mm.Head(names=NAMES)
    assert adapter.classes == 3
    assert adapter == mm.Head(3, names=NAMES)
    assert mm.Head().classes == 2
    model = VIT.fresh()
    randomise(mm.attach(model, adapter)).save(tmp_path)
    manifest = json.loads((tmp_path / "adapter.json").read_text())
    assert manifest["adapters"][0]["names"] == list(NAMES)
    assert from_json(json.loads(json.dumps(adapter.to_json()))) == adapter
    other = VIT.fresh()
    loaded: Any = mm.load_adapter(other, tmp_path)
    assert loaded.adapter.names == NAMES
    with torch.no_grad():
        assert_equal(VIT.outputs(other), VIT.outputs(model))


def test_names_without_meaning_are_refused() -> None:
    with pytest.raises(AdapterError, match="3 names were given for 5 classes"):
        mm.Head(5, names=NAMES)
    for names in (("a", "a"), ("a", ""), "ab", (1, 2)):
        with pytest.raises(AdapterError, match="expected different names, one a class"):
            mm.Head(names=names)  # type: ignore[arg-type]
    with pytest.raises(AdapterError, match="classes is 0, expected a whole number"):
        mm.Head(0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_beside_half_precision_it_trains_in_float32(dtype: torch.dtype) -> None:
    model = VIT.fresh().to(dtype)
    attachment = mm.attach(model, mm.Head(3, norm=True))
    assert {p.dtype for p in attachment.parameters()} == {torch.float32}
    logits = model(pixel_values=pixels(2).to(dtype)).logits
    assert logits.dtype == dtype
