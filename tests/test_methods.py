"""Each method against its formula written out, with random tensors; counts; what is refused."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from backbones import BACKBONES, CLASSES, DIM, LAYERS, WIDTH, embeddings, pixels
from snapshot import assert_close, assert_equal, differ, randomise
from straight import vision
from torch import Tensor
from torch.nn import functional as F

import mmadapt as mm
from mmadapt.adapter import ACTIVATIONS, Adapter, adapters, from_json
from mmadapt.core.bank import bank_of
from mmadapt.errors import AdapterError
from mmadapt.ops import reference

VISION = BACKBONES["open_clip_vision"]
CLASSIFIER = BACKBONES["zero_shot_classifier"]

WRITTEN_OUT = {
    "relu": lambda x: x * (x > 0),
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
    "gelu_new": lambda x: 0.5 * x * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3))),
    "quick_gelu": lambda x: x / (1 + torch.exp(-1.702 * x)),
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "tanh": lambda x: 1 - 2 / (torch.exp(2 * x) + 1),
    "identity": lambda x: x,
}


def only_layer(attachment: Any) -> Any:
    """The layer of an attachment at one site."""
    (layer,) = attachment.layers.values()
    return layer


# -- activations ------------------------------------------------------------------------------------


def test_adapters_and_operations_name_the_same_activations() -> None:
    assert set(ACTIVATIONS) == set(reference.ACTIVATIONS) == set(WRITTEN_OUT)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_is_its_formula(name: str) -> None:
    x = torch.randn(50, dtype=torch.float64) * 3
    assert torch.allclose(reference.ACTIVATIONS[name](x), WRITTEN_OUT[name](x), atol=1e-12)


# -- bottleneck -------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("placement", ["sequential", "parallel"])
def test_the_bottleneck_is_its_formula(placement: Any, activation: Any) -> None:
    model: Any = VISION.fresh()
    adapter = mm.Bottleneck(4, placement=placement, activation=activation, scale=0.7)
    attachment = randomise(mm.attach(model, adapter))

    def branch(i: int, y: Tensor, x: Tensor, norm1: Tensor) -> Tensor:
        layer = attachment.layers[f"0/vision.layers[{i}].mlp:out"]
        z = {"sequential": y, "parallel": x}[placement]
        hidden = WRITTEN_OUT[activation](z @ layer.down.T + layer.down_bias)
        return y + 0.7 * (hidden @ layer.up.T + layer.up_bias)

    with torch.no_grad():
        adapted = model(pixels(3))
        assert differ((adapted,), (vision(model, pixels(3)),))
        assert_close((adapted,), (vision(model, pixels(3), branch),), 1e-5)


def test_the_bottleneck_starts_with_nothing_but_a_drawn_down_projection() -> None:
    for layer in mm.attach(VISION.fresh(), mm.Bottleneck(4)).layers.values():
        zero = {name for name, p in layer.named_parameters() if not p.any()}
        assert zero == {"down_bias", "up", "up_bias"}
        assert 0 < float(layer.down.detach().abs().max()) <= WIDTH**-0.5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_operations_compute_in_their_parameters_dtype_and_return_their_inputs(
    dtype: torch.dtype,
) -> None:
    z = torch.randn(3, 5, WIDTH).to(dtype)
    down, down_bias, up, up_bias = (
        torch.randn(s) for s in ((4, WIDTH), (4,), (WIDTH, 4), (WIDTH,))
    )
    found = reference.bottleneck(z, down, down_bias, up, up_bias, "gelu", 0.5)
    expected = reference.bottleneck(z.float(), down, down_bias, up, up_bias, "gelu", 0.5).to(dtype)
    assert found.dtype == dtype
    assert torch.equal(found, expected)
    found = reference.low_rank(z, down, up, 2.0)
    assert found.dtype == dtype
    assert torch.equal(found, reference.low_rank(z.float(), down, up, 2.0).to(dtype))
    square = torch.randn(WIDTH, WIDTH).to(dtype)
    assert reference.low_rank_weight(square, down, up, 1.0).dtype == dtype


# -- LoRA -------------------------------------------------------------------------------------------


def _folded_hf(model: Any, attachment: Any) -> Any:
    twin: Any = BACKBONES["hf_clip"].fresh()
    with torch.no_grad():
        for key, layer in attachment.layers.items():
            site = key.partition("/")[2].rpartition(":")[0]
            tower, index, word = site.partition(".")[0], int(site.split("[")[1][0]), site[-1]
            blocks = getattr(twin, f"{tower}_model").encoder.layers
            linear = getattr(blocks[index].self_attn, f"{word}_proj")
            linear.weight += 1.5 * layer.b @ layer.a
    return twin


@pytest.mark.parametrize("port", ["out", "weight"])
def test_lora_equals_folded_weights_at_called_linears(port: str) -> None:
    tiny = BACKBONES["hf_clip"]
    model = tiny.fresh()
    at = [f"*.layers[*].attn.{word}:{port}" for word in "qv"]
    attachment = randomise(mm.attach(model, mm.LoRA(2, alpha=3.0), at=at))
    assert {site.rpartition(":")[2] for site in attachment.sites} == {port}
    with torch.no_grad():
        adapted, folded = tiny.outputs(model), tiny.outputs(_folded_hf(model, attachment))
        assert differ(adapted, tiny.outputs(tiny.fresh()))
        assert_close(adapted, folded, 1e-5)


@pytest.mark.parametrize("words", ["q", "k", "v", "qv", "qkv", "o", "qvo"])
def test_lora_equals_folded_rows_of_a_packed_projection(words: str) -> None:
    model: Any = VISION.fresh()
    at = [f"vision.layers[*].attn.{word}" for word in words]
    attachment = randomise(mm.attach(model, mm.LoRA(2, alpha=3.0), at=at))
    twin: Any = VISION.fresh()
    with torch.no_grad():
        for i, block in enumerate(twin.transformer.resblocks):
            for word in words:
                layer: Any = attachment.layers[f"0/vision.layers[{i}].attn.{word}:weight"]
                change = 1.5 * layer.b @ layer.a
                if word == "o":
                    block.attn.out_proj.weight += change
                else:
                    start = "qkv".index(word) * WIDTH
                    block.attn.in_proj_weight[start : start + WIDTH] += change
        bare = VISION.fresh()(pixels(3))
    for mode in (torch.no_grad(), torch.enable_grad()):
        with mode:
            adapted = model(pixels(3))
            assert_close((adapted,), (twin(pixels(3)),), 1e-5)
    if words != "k":  # a change of k alone may be small behind the softmax
        assert differ((adapted,), (bare,))


def test_gradients_through_the_weight_port_are_those_of_the_formula() -> None:
    model: Any = VISION.fresh()
    attachment = randomise(mm.attach(model, mm.LoRA(2), at="vision.layers[0].attn.q"))
    layer = only_layer(attachment)
    model(pixels(2)).square().sum().backward()
    twin: Any = VISION.fresh()
    attention = twin.transformer.resblocks[0].attn
    with torch.no_grad():
        attention.in_proj_weight[:WIDTH] += layer.b @ layer.a
    twin(pixels(2)).square().sum().backward()
    rows = attention.in_proj_weight.grad[:WIDTH]
    assert_close((layer.a.grad,), (layer.b.detach().T @ rows,), 1e-4)
    assert_close((layer.b.grad,), (rows @ layer.a.detach().T,), 1e-4)


def test_lora_without_alpha_has_a_scale_of_one() -> None:
    assert mm.LoRA(4).scale == 1.0
    assert mm.LoRA(4, alpha=8).scale == 2.0
    assert mm.LoRA(4, alpha=1.0).scale == 0.25


def test_lora_dropout_acts_only_in_training() -> None:
    tiny = BACKBONES["hf_vit"]
    model = tiny.fresh()
    attachment = randomise(mm.attach(model, mm.LoRA(2, dropout=0.5)))
    with torch.no_grad():
        plain = tiny.outputs(model)
        assert_equal(tiny.outputs(model), plain)
        with mm.train_mode(model):
            assert all(layer.training for layer in attachment.layers.values())
            assert differ(tiny.outputs(model), plain)
        assert_equal(tiny.outputs(model), plain)


def test_lora_is_refused_where_it_has_no_weight_to_change() -> None:
    with pytest.raises(AdapterError) as caught:
        mm.attach(VISION.fresh(), mm.LoRA(2), at="vision.layers[*].mlp")
    assert "LoRA changes a weight, and vision.layers[0].mlp:out stands for none" in str(
        caught.value
    )
    assert "'*.layers[*].attn.q'" in caught.value.hint


def test_lora_dropout_is_refused_at_a_weight() -> None:
    with pytest.raises(AdapterError, match="the `weight` port at .* does not see") as caught:
        mm.attach(VISION.fresh(), mm.LoRA(2, dropout=0.1))
    assert "dropout=0.0" in caught.value.hint


# -- CLIP-Adapter -----------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["published", "identity"])
def test_clip_adapter_is_its_formula(start: Any) -> None:
    model: Any = VISION.fresh()
    with torch.no_grad():
        f = model(pixels(4))
    adapter = mm.ClipAdapter(reduction=2, ratio=0.3, start=start)
    layer = only_layer(randomise(mm.attach(model, adapter)))
    ratio = layer.ratio if start == "identity" else 0.3
    assert float(torch.as_tensor(ratio).detach()) != 0
    a = torch.clamp(torch.clamp(f @ layer.first.T, min=0) @ layer.second.T, min=0)
    expected = ratio * a + (1 - ratio) * f
    assert_close((model(pixels(4)),), (expected,), 1e-5)
    assert differ((expected,), (f,))


def test_clip_adapter_never_starts_with_two_zero_factors() -> None:
    for start in ("published", "identity"):
        layer = only_layer(mm.attach(VISION.fresh(), mm.ClipAdapter(start=start)))  # type: ignore[arg-type]
        assert layer.first.any()
        assert layer.second.any()
    assert float(layer.ratio.detach()) == 0.0
    assert isinstance(layer.ratio, torch.nn.Parameter)


def test_clip_adapter_needs_a_reduction_that_divides() -> None:
    for reduction in (3, 2 * DIM):
        with pytest.raises(AdapterError) as caught:
            mm.attach(VISION.fresh(), mm.ClipAdapter(reduction=reduction))
        assert (
            f"reduction {reduction} does not divide the {DIM} channels at vision.pooled:out"
            in str(caught.value)
        )


# -- Tip-Adapter ------------------------------------------------------------------------------------


def test_tip_votes_have_their_closed_form() -> None:
    f = torch.tensor([[1.0, 0.0]])
    keys = torch.tensor([[0.6, 0.8], [1.0, 0.0]])
    votes = reference.cache_votes(f, keys, torch.tensor([0, 1]), 2, 5.5)
    assert votes[0].tolist() == pytest.approx([0.110803, 1.0], abs=1e-6)


def _cache(entries: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    f, keys = torch.randn(4, DIM), F.normalize(torch.randn(entries, DIM), dim=-1)
    return f, keys, torch.randint(0, CLASSES, (entries,))


def test_counting_votes_equals_the_product_with_one_hot_labels() -> None:
    f, keys, labels = (t.double() if t.is_floating_point() else t for t in _cache())
    affinity = torch.exp(-5.5 * (1 - F.normalize(f, dim=-1) @ keys.T))
    dense = torch.zeros(4, CLASSES, dtype=torch.float64)
    for entry, label in enumerate(labels.tolist()):
        dense[:, label] += affinity[:, entry]
    found = reference.cache_votes(f, keys, labels, CLASSES, 5.5)
    assert torch.equal(found, dense)
    assert torch.allclose(found, affinity @ F.one_hot(labels, CLASSES).double(), atol=1e-14)


def test_the_order_of_the_cache_and_the_length_of_a_feature_do_not_matter() -> None:
    f, keys, labels = _cache()
    votes = reference.cache_votes(f, keys, labels, CLASSES, 5.5)
    order = torch.randperm(len(labels))
    assert torch.allclose(reference.cache_votes(f, keys[order], labels[order], CLASSES, 5.5), votes)
    assert torch.allclose(
        reference.cache_votes(7 * f, keys, labels, CLASSES, 5.5), votes, atol=1e-6
    )


def test_empty_slots_cast_no_vote() -> None:
    f, keys, labels = _cache()
    padded = torch.cat([labels, torch.full((3,), -1)])
    with_empty = torch.cat([keys, torch.randn(3, DIM)])
    votes = reference.cache_votes(f, keys, labels, CLASSES, 5.5)
    assert torch.equal(reference.cache_votes(f, with_empty, padded, CLASSES, 5.5), votes)
    nothing = reference.cache_votes(f, keys, torch.full_like(labels, -1), CLASSES, 5.5)
    assert torch.equal(nothing, torch.zeros(4, CLASSES))


@pytest.mark.parametrize("train_keys", [False, True])
def test_tip_adapter_adds_its_votes_to_the_logits(train_keys: bool) -> None:
    from mmadapt.tasks.few_shot import remember

    model: Any = CLASSIFIER.fresh()
    f = embeddings(6)
    zero_shot = model(f)
    adapter = mm.TipAdapter(12, residual=3.0, sharpness=2.0, train_keys=train_keys)
    attachment = mm.attach(model, adapter)
    assert torch.equal(model(f), zero_shot)
    shots, labels = torch.randn(10, DIM), torch.randint(0, CLASSES, (10,))
    remember(attachment, shots, labels)  # two slots stay empty
    unit, keys = f / f.norm(dim=1, keepdim=True), shots / shots.norm(dim=1, keepdim=True)
    expected = (
        zero_shot + 3.0 * torch.exp(-2.0 * (1 - unit @ keys.T)) @ F.one_hot(labels, CLASSES).float()
    )
    assert_close((model(f).detach(),), (expected,), 1e-5)
    assert attachment.num_parameters == (12 * DIM if train_keys else 0)
    only_layer(attachment).residual.fill_(0.0)
    assert torch.equal(model(f).detach(), zero_shot)


# -- counts -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real() -> dict[str, Any]:
    """Models of published sizes, without values."""
    from open_clip import get_model_config
    from open_clip.model import CLIP

    with torch.device("meta"):
        return {
            name: CLIP(**get_model_config(name))  # type: ignore[arg-type]
            for name in ("ViT-B-32", "ViT-L-14", "RN50")
        }


def planned(model: Any, adapter: Adapter, at: Any = None) -> int:
    return sum(record["parameters"] for record in mm.plan(model, adapter, at).records())


@pytest.mark.parametrize(
    ("name", "count"), [("ViT-B-32", 131_072), ("ViT-L-14", 294_912), ("RN50", 524_288)]
)
def test_clip_adapter_has_the_published_size(real: dict[str, Any], name: str, count: int) -> None:
    assert planned(real[name], mm.ClipAdapter()) == count
    assert planned(real[name], mm.ClipAdapter(start="identity")) == count + 1


def test_bottlenecks_in_vit_b_have_the_published_size(real: dict[str, Any]) -> None:
    assert planned(real["ViT-B-32"], mm.Bottleneck(64), "vision.layers[*].mlp") == 1_189_632


def test_lora_in_vit_b_has_rank_times_both_widths(real: dict[str, Any]) -> None:
    count = planned(real["ViT-B-32"], mm.LoRA(8), "vision.layers[*].attn.q")
    assert count == 12 * 8 * (768 + 768)


def test_planning_changes_nothing_and_the_backbone_keeps_its_count(real: dict[str, Any]) -> None:
    model = real["ViT-B-32"]
    table = mm.plan(model, mm.Bottleneck(64))
    assert bank_of(model) is None
    assert sum(p.numel() for p in model.parameters()) == 151_277_313
    assert "24 sites" in table.title
    assert "of 151 M parameters" in table.title


@pytest.mark.parametrize("method", sorted(adapters()))
def test_a_plan_counts_what_attach_builds(method: str) -> None:
    adapter = adapters()[method]()
    for tiny in BACKBONES.values():
        try:
            expected = planned(tiny.fresh(), adapter)
        except mm.errors.MmadaptError:
            continue
        assert mm.attach(tiny.fresh(), adapter).num_parameters == expected


# -- hyper-parameters -------------------------------------------------------------------------------

WHOLE = "expected a whole number of at least 1"


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: mm.Bottleneck(0), f"Bottleneck: width is 0, {WHOLE}"),
        (lambda: mm.Bottleneck(2.0), f"Bottleneck: width is 2.0, {WHOLE}"),  # type: ignore[arg-type]
        (lambda: mm.Bottleneck(True), f"Bottleneck: width is True, {WHOLE}"),
        (lambda: mm.Bottleneck("8"), f"Bottleneck: width is '8', {WHOLE}"),  # type: ignore[arg-type]
        (
            lambda: mm.Bottleneck(placement="paralel"),  # type: ignore[arg-type]
            "placement is 'paralel', expected one of sequential, parallel, residual, joined\n"
            "  Next: did you mean 'parallel'?",
        ),
        (
            lambda: mm.Bottleneck(activation="quickgelu"),  # type: ignore[arg-type]
            "activation is 'quickgelu', expected one of relu, gelu, gelu_new, "
            "quick_gelu, silu, tanh, identity",
        ),
        (lambda: mm.Bottleneck(scale=float("nan")), "scale is nan, expected a number in"),
        (lambda: mm.Bottleneck(scale=float("inf")), "scale is inf, expected a number in"),
        (lambda: mm.Bottleneck(scale="1"), "scale is '1', expected a number in"),  # type: ignore[arg-type]
        (
            lambda: mm.Bottleneck(scale_kind="fix"),  # type: ignore[arg-type]
            "scale_kind is 'fix', expected one of fixed, learned, channel",
        ),
        (
            lambda: mm.Bottleneck(norm="in"),  # type: ignore[arg-type]
            "norm is 'in', expected one of none, before, after",
        ),
        (lambda: mm.Bottleneck(dropout=1.0), "dropout is 1.0, expected a number in [0, 0.999]"),
        (
            lambda: mm.Bottleneck(start="bert"),  # type: ignore[arg-type]
            "start is 'bert', expected one of zero, houlsby",
        ),
        (
            lambda: mm.Bottleneck(at=()),
            "Bottleneck: at is (), expected a site pattern or several\n"
            '  Next: for example at="vision.layers[-6:].mlp"',
        ),
        (lambda: mm.Bottleneck(at=3), "Bottleneck: at is 3, expected a site pattern"),  # type: ignore[arg-type]
        (lambda: mm.LoRA(-1), f"LoRA: rank is -1, {WHOLE}"),
        (lambda: mm.LoRA(alpha=float("nan")), "LoRA: alpha is nan, expected a number in"),
        (lambda: mm.LoRA(dropout=1.0), "LoRA: dropout is 1.0, expected a number in [0, 0.999]"),
        (lambda: mm.LoRA(dropout=-0.1), "LoRA: dropout is -0.1, expected a number in [0, 0.999]"),
        (lambda: mm.ClipAdapter(0), f"ClipAdapter: reduction is 0, {WHOLE}"),
        (
            lambda: mm.ClipAdapter(ratio=1.5),
            "ClipAdapter: ratio is 1.5, expected a number in [0, 1]",
        ),
        (
            lambda: mm.ClipAdapter(start="random"),  # type: ignore[arg-type]
            "ClipAdapter: start is 'random', expected one of published, identity",
        ),
        (lambda: mm.TipAdapter(0), f"TipAdapter: entries is 0, {WHOLE}"),
        (
            lambda: mm.TipAdapter(residual=-1.0),
            "TipAdapter: residual is -1.0, expected a number in [0,",
        ),
        (lambda: mm.TipAdapter(sharpness=float("nan")), "TipAdapter: sharpness is nan, expected"),
        (
            lambda: mm.TipAdapter(train_keys=1),  # type: ignore[arg-type]
            "TipAdapter: train_keys is 1, expected True or False",
        ),
    ],
)
def test_a_hyper_parameter_without_meaning_says_what_was_expected(make: Any, text: str) -> None:
    with pytest.raises(AdapterError) as caught:
        make()
    assert text in str(caught.value)


@pytest.mark.parametrize("method", sorted(adapters()))
def test_an_adapter_is_frozen_data_that_survives_json(method: str) -> None:
    import json

    cls = adapters()[method]
    adapter = cls()
    assert from_json(json.loads(json.dumps(adapter.to_json()))) == adapter
    assert hash(adapter) == hash(cls())
    assert adapter.method == method
    assert cls.source
    assert cls.__doc__
    field = dataclasses.fields(adapter)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(adapter, field, 1)


def test_unknown_methods_and_fields_in_json_are_refused_with_near_names() -> None:
    with pytest.raises(AdapterError, match=r"unknown adapter method 'lara'\n.*'lora'"):
        from_json({"method": "lara"})
    with pytest.raises(AdapterError, match="unknown adapter method None"):
        from_json({})
    with pytest.raises(AdapterError, match=r"LoRA has no hyper-parameter 'rnk'\n.*'rank'"):
        from_json({"method": "lora", "rnk": 2})


# -- sites whose input is not what the method takes it for ------------------------------------------


@pytest.mark.parametrize("name", ["open_clip", "hf_clip"])
def test_a_parallel_bottleneck_at_pooled_features_is_refused_or_works(name: str) -> None:
    tiny = BACKBONES[name]
    model = tiny.fresh()
    try:
        mm.attach(model, mm.Bottleneck(2, placement="parallel"), at="vision.pooled")
    except mm.errors.MmadaptError:
        return
    tiny.outputs(model)


@pytest.mark.parametrize("name", ["open_clip", "hf_clip", "hf_vit"])
def test_every_site_of_a_backbone_takes_a_bottleneck(name: str) -> None:
    tiny = BACKBONES[name]
    model = tiny.fresh()
    roles = [row[0] for row in mm.sites(model) if "out" in row[1].split()]
    with torch.no_grad():
        bare = tiny.outputs(model)
        for role in roles:
            randomise(mm.attach(model, mm.Bottleneck(2), at=role))
            assert differ(tiny.outputs(model), bare), role
            mm.detach(model)
    assert len(roles) >= 4 + LAYERS
