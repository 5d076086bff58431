"""The whole bottleneck: norms, scales, starts, dropout, the presets and their sites."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from backbones import BACKBONES, LAYERS, WIDTH, pixels
from snapshot import assert_close, assert_equal, differ, randomise
from straight import vision
from torch import Tensor, nn

import mmadapt as mm
from mmadapt.adapter import from_json

VISION = BACKBONES["open_clip_vision"]


def normalised(z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = z - z.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias


@pytest.mark.parametrize("placement", ["sequential", "parallel"])
@pytest.mark.parametrize("norm", ["none", "before", "after", "both"])
@pytest.mark.parametrize("kind", ["fixed", "learned", "channel"])
def test_norms_and_scales_stand_where_the_formula_has_them(
    placement: Any, norm: Any, kind: Any
) -> None:
    model: Any = VISION.fresh()
    adapter = mm.Bottleneck(
        4, placement=placement, activation="relu", scale=0.7, scale_kind=kind, norm=norm
    )
    attachment = randomise(mm.attach(model, adapter))

    def branch(i: int, y: Tensor, x: Tensor, norm1: Tensor) -> Tensor:
        layer = attachment.layers[f"0/vision.layers[{i}].mlp:out"]
        z = {"sequential": y, "parallel": x}[placement]
        if norm in ("before", "both"):
            z = normalised(z, layer.norm_weight, layer.norm_bias)
        hidden = z @ layer.down.T + layer.down_bias
        scale = 0.7 if kind == "fixed" else layer.scale
        delta = scale * (hidden * (hidden > 0) @ layer.up.T + layer.up_bias)
        if norm == "after":
            delta = normalised(delta, layer.norm_weight, layer.norm_bias)
        if norm == "both":
            delta = normalised(delta, layer.after_weight, layer.after_bias)
        return y + delta

    with torch.no_grad():
        expected = vision(model, pixels(3), branch)
        assert differ((expected,), (vision(model, pixels(3)),))
        assert_close((model(pixels(3)),), (expected,), 2e-6)
    size = 2 * WIDTH * 4 + 4 + WIDTH
    size += {"fixed": 0, "learned": 1, "channel": WIDTH}[kind]
    size += {"none": 0, "both": 4 * WIDTH}.get(norm, 2 * WIDTH)
    assert attachment.num_parameters == LAYERS * size


def test_a_trained_scale_begins_at_the_number_given() -> None:
    for kind, shape in (("learned", ()), ("channel", (WIDTH,))):
        adapter = mm.Bottleneck(4, scale=0.25, scale_kind=kind)  # type: ignore[arg-type]
        for layer in mm.attach(VISION.fresh(), adapter).layers.values():
            assert torch.equal(layer.scale.detach(), torch.full(shape, 0.25))
            assert layer.describe() == {"scale": 0.25}


def test_houlsbys_start_draws_both_projections_within_two_deviations() -> None:
    adapter = mm.Bottleneck(64, start="houlsby")
    assert not adapter.starts_as_identity()
    for layer in mm.attach(VISION.fresh(), adapter).layers.values():
        for drawn in (layer.down.detach(), layer.up.detach()):
            assert float(drawn.abs().max()) <= 0.02 + 1e-7
            assert float(drawn.std()) == pytest.approx(0.0088, rel=0.1)  # of the cut normal
        assert not layer.down_bias.any()
        assert not layer.up_bias.any()


def test_dropout_acts_on_the_bottleneck_and_only_in_training() -> None:
    model: Any = VISION.fresh()
    randomise(mm.attach(model, mm.Bottleneck(4, dropout=0.5)))
    with torch.no_grad():
        plain = model(pixels(3))
        assert_equal((model(pixels(3)),), (plain,))
        with mm.train_mode(model):
            assert differ((model(pixels(3)),), (plain,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_beside_a_half_backbone_parameters_stay_wide_and_outputs_half(dtype: torch.dtype) -> None:
    linear = nn.Linear(WIDTH, WIDTH).to(dtype)
    anatomy = mm.Anatomy(
        family="one",
        spans={"mlp": mm.Span("0", x="0|input", channels="0.weight")},
        taps={"residual": "0:in"},
    )
    for preset in ("houlsby", "parallel", "adaptformer", "adapterplus"):
        model = _Root(linear)
        adapter = getattr(mm.Bottleneck, preset)(4)
        attachment = mm.attach(mm.Backbone(model=model, anatomy=anatomy), adapter, at="mlp")
        randomise(attachment)
        assert {p.dtype for p in attachment.parameters()} == {torch.float32}
        y = model(torch.randn(2, 3, WIDTH, dtype=dtype))
        assert y.dtype == dtype
        mm.detach(model)


class _Root(nn.Module):
    """A container that calls its one child."""

    def __init__(self, child: nn.Module) -> None:
        super().__init__()
        self.add_module("0", child)

    def forward(self, x: Tensor) -> Tensor:
        return self.get_submodule("0")(x)


@pytest.mark.parametrize("placement", ["sequential", "parallel"])
def test_channels_may_lead(placement: Any) -> None:
    torch.manual_seed(0)
    model = _Root(nn.Conv2d(5, 5, 3, padding=1))
    span = mm.Span("0", x="0|input", channels="0.weight", layout="BCHW")
    backbone = mm.Backbone(model=model, anatomy=mm.Anatomy(family="map", spans={"map": span}))
    adapter = mm.Bottleneck(3, placement=placement, norm="before", activation="relu")
    attachment = randomise(mm.attach(backbone, adapter, at="map"))
    (layer,) = attachment.layers.values()
    maps = torch.randn(2, 5, 4, 3)
    with torch.no_grad():
        y = model.get_submodule("0").forward(maps)
        z = (y if placement == "sequential" else maps).permute(0, 2, 3, 1)
        z = normalised(z, layer.norm_weight, layer.norm_bias)
        delta = torch.relu(z @ layer.down.T + layer.down_bias) @ layer.up.T + layer.up_bias
        assert_close((model(maps),), (y + delta.permute(0, 3, 1, 2),), 2e-6)


# -- presets ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vit_b() -> Any:
    from open_clip import get_model_config
    from open_clip.model import CLIP

    with torch.device("meta"):
        return CLIP(**get_model_config("ViT-B-32"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("adapter", "at", "count"),
    [
        (mm.Bottleneck.houlsby(), ("attn", "mlp"), 24 * 99_136),
        (mm.Bottleneck.pfeiffer(), ("",), 12 * 74_544),
        (mm.Bottleneck.parallel(), ("mlp",), 12 * 787_712),
        (mm.Bottleneck.adaptformer(norm="none"), ("mlp",), 1_189_632),
        (mm.Bottleneck.adaptformer(), ("mlp",), 1_189_632 + 12 * 2 * 768),
        (mm.Bottleneck.adapterplus(), ("",), 165_984),  # the 0.16 M of the paper's rank 8
    ],
)
def test_presets_in_vit_b_have_the_size_of_their_formula(
    vit_b: Any, adapter: mm.Bottleneck, at: tuple[str, ...], count: int
) -> None:
    sites = [f"vision.layers[*].{word}".rstrip(".") for word in at]
    assert tuple(site.replace("vision", "*") for site in sites) == adapter.at
    assert sum(record["parameters"] for record in mm.plan(vit_b, adapter, sites).records()) == count


def test_a_preset_is_its_configuration_and_takes_changes() -> None:
    assert mm.Bottleneck.houlsby(8) == mm.Bottleneck(
        8, activation="silu", at=("*.layers[*].attn", "*.layers[*].mlp")
    )
    assert mm.Bottleneck.parallel(8).scale == 4.0
    changed = mm.Bottleneck.adaptformer(8, scale=0.2, at="vision.layers[0].mlp")
    assert (changed.scale, changed.at) == (0.2, ("vision.layers[0].mlp",))


def test_the_sites_of_a_preset_travel_with_it(tmp_path: Any) -> None:
    adapter = mm.Bottleneck.houlsby(4)
    assert from_json(json.loads(json.dumps(adapter.to_json()))) == adapter
    assert "at" not in mm.Bottleneck(4).to_json()
    model = VISION.fresh()
    attachment = mm.attach(model, adapter)
    words = [site.rpartition(".")[2] for site in attachment.sites]
    assert sorted(words) == ["attn:out"] * LAYERS + ["mlp:out"] * LAYERS
    attachment.save(tmp_path)
    assert mm.load_adapter(VISION.fresh(), tmp_path).adapter == adapter
    (chosen,) = mm.attach(VISION.fresh(), adapter, at="vision.layers[0].mlp").sites
    assert chosen == "vision.layers[0].mlp:out"


def test_sites_written_into_an_adapter_must_all_be_there() -> None:
    adapter = mm.Bottleneck(4, at=("vision.layers[*].mlp", "vision.layers[*].mpl"))
    with pytest.raises(mm.errors.SiteError, match=r"'vision.layers\[\*\].mpl' matches nothing"):
        mm.attach(VISION.fresh(), adapter)
    with pytest.raises(mm.errors.SiteError, match="matches nothing"):
        mm.plan(BACKBONES["zero_shot_classifier"].fresh(), mm.Bottleneck.houlsby(4))


def test_pfeiffer_reads_the_residual_stream_behind_the_mlp() -> None:
    model: Any = VISION.fresh()
    attachment = randomise(mm.attach(model, mm.Bottleneck.pfeiffer(4)))
    with torch.no_grad():
        x = model._embeds(pixels(2))
        for i, block in enumerate(model.transformer.resblocks):
            layer: Any = attachment.layers[f"0/vision.layers[{i}]:out"]
            norm1 = block.ln_1.forward(x)
            x = x + block.attn.forward(norm1, norm1, norm1, need_weights=False)[0]
            x = x + block.mlp.forward(block.ln_2.forward(x))
            x = x + torch.relu(x @ layer.down.T + layer.down_bias) @ layer.up.T + layer.up_bias
        expected = model._pool(x)[0] @ model.proj
        assert_close((model(pixels(2)),), (expected,), 2e-6)


# -- a width by reduction ---------------------------------------------------------------------------


def test_a_reduction_divides_the_channels_each_site_reads(vit_b: Any) -> None:
    adapter = mm.Bottleneck(reduction=16)
    assert repr(adapter) == "Bottleneck(reduction=16)"
    assert from_json(json.loads(json.dumps(adapter.to_json()))) == adapter
    table = mm.plan(vit_b, adapter, ["vision.layers[0].mlp", "text.layers[0].mlp"])
    shapes = [record["tensors"].split(" up")[0] for record in table.records()]
    assert shapes == [f"down f32[{c // 16},{c}] down_bias f32[{c // 16}]" for c in (768, 512)]
    parallel = mm.Bottleneck(reduction=5, placement="parallel")
    for layer in mm.attach(VISION.fresh(), parallel, at="*.layers[*].mlp.down").layers.values():
        assert layer.down.shape == (4 * WIDTH // 5, 4 * WIDTH)  # it reads the inner channels
        assert layer.up.shape == (WIDTH, 4 * WIDTH // 5)
    for layer in mm.attach(VISION.fresh(), mm.Bottleneck(reduction=1000)).layers.values():
        assert layer.down.shape == (1, WIDTH)


def test_a_width_or_a_reduction_but_not_both() -> None:
    assert mm.Bottleneck() == mm.Bottleneck(32) == mm.Bottleneck(width=32)
    with pytest.raises(mm.errors.AdapterError, match="width is 8 and reduction is 4") as caught:
        mm.Bottleneck(8, reduction=4)
    assert caught.value.hint == "give one of them"
    for nonsense in (0, 1.5, True):
        with pytest.raises(
            mm.errors.AdapterError, match="reduction is .*, expected a whole number"
        ):
            mm.Bottleneck(reduction=nonsense)  # type: ignore[arg-type]


def test_presets_take_a_reduction_instead_of_their_width() -> None:
    for name, width in (
        ("houlsby", 64),
        ("pfeiffer", 48),
        ("parallel", 512),
        ("adaptformer", 64),
        ("adapterplus", 8),
    ):
        preset = getattr(mm.Bottleneck, name)
        assert preset() == preset(width)
        assert preset(reduction=16).width is None
        assert preset(reduction=16).width_of(768) == 48
        with pytest.raises(mm.errors.AdapterError, match="give one of them"):
            preset(8, reduction=16)


# -- stochastic depth -------------------------------------------------------------------------------


def test_stochastic_depth_drops_whole_rows_while_training() -> None:
    model: Any = _Root(nn.Linear(WIDTH, WIDTH)).eval()
    anatomy = mm.Anatomy(
        family="one", spans={"mlp": mm.Span("0", x="0|input", channels="0.weight")}
    )
    backbone = mm.Backbone(model=model, anatomy=anatomy)
    randomise(mm.attach(backbone, mm.Bottleneck(4, drop_path=0.25), at="mlp"))
    x = torch.randn(400, 3, WIDTH)
    torch.manual_seed(3)
    with torch.no_grad():
        y = model.get_submodule("0").forward(x)
        change = model(x) - y
        with mm.train_mode(backbone):
            dropped = model(x) - y
    gone = (dropped == 0).flatten(1).all(1)
    assert_close((dropped[~gone],), (change[~gone] / 0.75,), 1e-5)
    assert float(gone.float().mean()) == pytest.approx(0.25, abs=0.08)
    assert mm.Bottleneck.adapterplus().drop_path == 0.1
    assert mm.Bottleneck().drop_path == 0.0


def test_stochastic_depth_leaves_the_mean_and_the_eval_mode_alone() -> None:
    from mmadapt.ops.reference import drop_rows

    torch.manual_seed(0)
    delta = torch.randn(3, 2, 5).expand(20_000, 3, 2, 5).reshape(-1, 2, 5)
    mean = drop_rows(delta, 0.4).view(20_000, 3, 2, 5).mean(0)
    assert torch.allclose(mean, delta[:3], atol=0.08)
    model = VISION.fresh()
    randomise(mm.attach(model, mm.Bottleneck(4, drop_path=0.9)))
    with torch.no_grad():
        assert torch.equal(model(pixels(3)), model(pixels(3)))
    with pytest.raises(mm.errors.AdapterError, match=r"drop_path is 1.0, expected a number in"):
        mm.Bottleneck(drop_path=1.0)


def test_rows_with_adapters_of_their_own_are_dropped_alike() -> None:
    model = BACKBONES["hf_vit"].fresh()
    for seed, name in enumerate("ab"):
        randomise(mm.attach(model, mm.Bottleneck(4, drop_path=0.5), name), seed=seed)
    names = ["a", None, "b"] * 30
    images = pixels(1).expand(90, -1, -1, -1)
    seen: dict[int, Tensor] = {}
    model.layers[0].mlp.register_forward_hook(lambda m, a, y: seen.__setitem__(0, y))  # type: ignore[union-attr,operator,index]
    with torch.no_grad():
        with mm.disabled(model):
            model(images)
        bare = seen[0]
        with mm.context(model, rows=names), mm.train_mode(model):
            torch.manual_seed(1)
            model(images)
    changed = (seen[0] - bare).abs().flatten(1).amax(1) > 1e-4
    assert not changed[1::3].any()
    for kind in (changed[0::3], changed[2::3]):
        assert 0.2 < float(kind.float().mean()) < 0.8


def test_joined_at_a_branch_reads_what_the_block_makes_of_it() -> None:
    model: Any = VISION.fresh()
    joined = randomise(
        mm.attach(model, mm.Bottleneck(4, placement="joined", at="*.layers[*].mlp"), name="joined")
    )
    behind: Any = VISION.fresh()
    sequential = mm.attach(behind, mm.Bottleneck(4, at="*.layers[*]"))
    with torch.no_grad():
        for i in range(LAYERS):
            source = joined.layers[f"0/vision.layers[{i}].mlp:out"]
            sequential.layers[f"0/vision.layers[{i}]:out"].load_state_dict(source.state_dict())
        assert differ((model(pixels(3)),), (VISION.fresh()(pixels(3)),))
        assert_close((model(pixels(3)),), (behind(pixels(3)),), 2e-6)
        mm.attach(model, mm.Bottleneck(4, placement="joined"), name="second")
        mm.set_active(model, "joined", "second")  # reads the backbone's branch, not the first's sum
        assert_close((model(pixels(3)),), (behind(pixels(3)),), 2e-6)
