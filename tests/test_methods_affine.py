"""ScaleShift and AdapterBias written out; counts of the papers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backbones import BACKBONES, LAYERS, WIDTH
from snapshot import assert_close, assert_equal, differ, randomise
from torch import Tensor, nn

import mmadapt as mm
from mmadapt.errors import AdapterError

VIT = BACKBONES["hf_vit"]


class Block(nn.Module):
    """norm, linear, convolution: x (B, T, C) to maps (B, O, T, C)."""

    def __init__(self, channels: int = 6) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.linear = nn.Linear(channels, channels)
        self.plain = nn.Linear(channels, channels, bias=False)
        self.conv = nn.Conv2d(1, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.plain(self.linear(self.norm(x)))[:, None])


def block() -> mm.Backbone:
    torch.manual_seed(4)

    def span(name: str, layout: str = "BTC") -> mm.Span:
        channels = f"{name}.weight"
        return mm.Span(name, ("out",), "0|input", channels=channels, weight=channels, layout=layout)

    spans = {name: span(name) for name in ("norm", "linear", "plain")}
    anatomy = mm.Anatomy(family="block", spans={**spans, "conv": span("conv", "BCHW")})
    return mm.Backbone(model=Block(), anatomy=anatomy)


SITES = ["norm", "linear", "conv"]


def test_scale_and_shift_act_on_the_channels_of_every_layout() -> None:
    backbone = block()
    net: Any = backbone.model
    layers: Any = randomise(mm.attach(backbone, mm.ScaleShift(), at=SITES)).layers
    x = torch.randn(2, 3, 6)
    with torch.no_grad():
        norm, linear, conv = (layers[f"0/{site}:out"] for site in SITES)
        z = net.norm.forward(x) * norm.scale + norm.shift
        z = net.plain.forward(net.linear.forward(z) * linear.scale + linear.shift)
        z = net.conv.forward(z[:, None])
        z = z * conv.scale[None, :, None, None] + conv.shift[None, :, None, None]
        assert_close((net(x),), (z,), 1e-6)


def test_scale_and_shift_fold_into_what_they_stand_behind() -> None:
    backbone = block()
    attachment = randomise(mm.attach(backbone, mm.ScaleShift(), at=SITES))
    x = torch.randn(2, 3, 6)
    with torch.no_grad():
        expected = backbone.model(x)
    twin: Any = Block()
    twin.load_state_dict(
        {k: v for k, v in backbone.model.state_dict().items() if "_mmadapt" not in k}
    )
    with torch.no_grad():
        for key, layer in attachment.layers.items():
            module = twin.get_submodule(key[2:].partition(":")[0])
            weight, bias = layer.fold(module.weight, module.bias, None)  # type: ignore[misc,arg-type]
            module.weight.copy_(weight)
            module.bias.copy_(bias)
        assert_close((twin(x),), (expected,), 2e-6)


def test_behind_a_linear_without_a_bias_the_fold_is_a_bias() -> None:
    backbone = block()
    layer: Any
    (layer,) = randomise(mm.attach(backbone, mm.ScaleShift(), at="plain")).layers.values()
    weight = torch.randn(6, 6)
    folded, bias = layer.fold(weight, None, None)
    assert torch.equal(bias, layer.shift)
    assert torch.equal(folded, weight * layer.scale[:, None])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_start_is_exact_beside_half_precision(dtype: torch.dtype) -> None:
    backbone = block()
    backbone.model.to(dtype)
    x = torch.randn(2, 3, 6, dtype=dtype)
    with torch.no_grad():
        bare = backbone.model(x)
        attachment = mm.attach(backbone, mm.ScaleShift(), at=SITES)
        assert_equal((backbone.model(x),), (bare,))
    assert {p.dtype for p in attachment.parameters()} == {torch.float32}


def test_the_published_start_is_drawn() -> None:
    attachment = mm.attach(VIT.fresh(), mm.ScaleShift(start="published"))
    scales = torch.cat([layer.scale.detach() for layer in attachment.layers.values()])  # type: ignore[misc]
    shifts = torch.cat([layer.shift.detach() for layer in attachment.layers.values()])  # type: ignore[misc]
    assert float(scales.mean()) == pytest.approx(1.0, abs=0.01)
    assert float(scales.std()) == pytest.approx(0.02, rel=0.2)
    assert float(shifts.std()) == pytest.approx(0.02, rel=0.2)
    with pytest.raises(AdapterError, match="start is 'random', expected one of identity, publ"):
        mm.ScaleShift(start="random")  # type: ignore[arg-type]


def test_two_of_them_stack_and_do_not_sum() -> None:
    backbone = block()
    layers = [
        randomise(mm.attach(backbone, mm.ScaleShift(), name, at="conv"), seed=seed).layers
        for seed, name in enumerate("ab")
    ]
    with pytest.raises(mm.errors.AttachError, match="does not add a change"):
        mm.set_active(backbone, "a", "b")
    mm.set_active(backbone, mm.Stack("a", "b"))
    x = torch.randn(2, 3, 6)
    with torch.no_grad():
        stacked = backbone.model(x)
        with mm.disabled(backbone):
            y = backbone.model(x)
        for (layer,) in (each.values() for each in layers):
            scale, shift = layer.scale[:, None, None], layer.shift[:, None, None]  # type: ignore[index]
            y = y * scale + shift
        assert_close((stacked,), (y,), 1e-6)


def _sized_block(channels: int) -> mm.Backbone:
    """The operations of one block of a vision transformer, by themselves."""
    with torch.device("meta"):
        model = nn.ModuleDict(
            {
                "norm1": nn.LayerNorm(channels),
                "qkv": nn.Linear(channels, 3 * channels),
                "o": nn.Linear(channels, channels),
                "norm2": nn.LayerNorm(channels),
                "up": nn.Linear(channels, 4 * channels),
                "down": nn.Linear(4 * channels, channels),
            }
        )
    spans = {
        name: mm.Span(name, x="0|input", weight=f"{name}.weight", channels=f"{name}.weight")
        for name in model
    }
    return mm.Backbone(model=model, anatomy=mm.Anatomy(family="sized", spans=spans))


def test_a_block_of_vit_b_has_the_published_size() -> None:
    backbone = _sized_block(768)
    table = mm.plan(backbone, mm.ScaleShift(), list(backbone.model))  # type: ignore[call-overload]
    assert sum(record["parameters"] for record in table.records()) == 16_896


def test_by_default_it_stands_wherever_the_backbone_calls_an_operation() -> None:
    words = {
        name: {site.rpartition("].")[2] for site in mm.attach(tiny.fresh(), mm.ScaleShift()).sites}
        for name, tiny in BACKBONES.items()
        if name in ("hf_vit", "open_clip_vision")
    }
    linears = {"attn.q", "attn.k", "attn.v", "attn.o", "mlp.up", "mlp.down"}
    assert words["hf_vit"] >= {f"{word}:out" for word in linears}
    assert words["open_clip_vision"] >= {"mlp.up:out", "mlp.down:out"}
    assert "attn.q:out" not in words["open_clip_vision"]


# -- AdapterBias ------------------------------------------------------------------------------------


def test_adapter_bias_shifts_each_token_along_one_direction() -> None:
    model: Any = VIT.fresh()
    attachment = randomise(mm.attach(model, mm.AdapterBias()))
    layers: Any = attachment.layers
    seen: dict[int, Tensor] = {}
    for i, own in enumerate(model.layers):
        own.mlp.fc2.register_forward_pre_hook(
            lambda module, args, i=i: seen.__setitem__(i, args[0].detach())
        )
    with torch.no_grad():
        for i, own in enumerate(model.layers):
            layer = layers[f"0/vision.layers[{i}].mlp.down:out"]
            z = torch.randn(2, 5, 4 * WIDTH)
            amount = (z * layer.gate).sum(-1, keepdim=True) + layer.gate_bias
            expected = z @ own.mlp.fc2.weight.T + own.mlp.fc2.bias + amount * layer.direction
            assert_close((own.mlp.fc2(z),), (expected,), 2e-6)
            assert differ((expected,), (own.mlp.fc2.forward(z),))
    assert attachment.num_parameters == LAYERS * (4 * WIDTH + WIDTH + 1)


def test_adapter_bias_in_bert_base_has_the_published_size() -> None:
    backbone = _sized_block(768)
    span = mm.Span("down", x="0|input", weight="down.weight")
    backbone.anatomy = mm.Anatomy(family="sized", spans={"down": span})
    (record,) = mm.plan(backbone, mm.AdapterBias(), "down").records()
    assert record["parameters"] == 3_841
    assert 12 * record["parameters"] == 46_092
    own, shared = mm.plan(backbone, mm.AdapterBias(shared_gate=True), "down").records()
    assert shared["site"] == "shared"
    assert 12 * own["parameters"] + shared["parameters"] == 12_289


def test_adapter_bias_needs_features_along_the_last_axis() -> None:
    with pytest.raises(AdapterError, match="reads features along the last axis"):
        mm.attach(block(), mm.AdapterBias(), at="conv")
