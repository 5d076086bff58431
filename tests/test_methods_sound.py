"""Methods along time are their formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backbones import ALL, BACKBONES
from handmade import small
from snapshot import assert_close, randomise
from torch import Tensor
from torch.nn import functional as F

import mmadapt as mm
from mmadapt.core.bank import bank_of
from mmadapt.core.context import Context
from mmadapt.errors import AdapterError, CheckError, SiteError
from mmadapt.ops.sound import along_time, soft_dispatch

C = 6
DRAW = torch.Generator().manual_seed(0)


def site_of(name: str, role: str, adapter: mm.Adapter) -> tuple[Any, Any, Any]:
    """A model, its one layer away from the start, and the site."""
    model: Any = ALL[name].fresh()
    attachment = randomise(mm.attach(model, adapter, at=role), 0.4)
    (layer,) = attachment.layers.values()
    return model, layer, attachment


def met(name: str, adapter: mm.Adapter, **inputs: Tensor) -> tuple[Any, Tensor, Tensor, Tensor]:
    """The layer at the first MLP, what it read, the backbone's own output there, and the sum."""
    model, layer, _ = site_of(name, "audio.layers[0].mlp:out", adapter)
    seen: dict[str, Tensor] = {}
    own = layer.after

    def spy(acc: Tensor, y: Tensor, x: Tensor, context: Any, site: Any) -> Tensor:
        seen.update(x=x, y=y, out=own(acc, y, x, context, site))
        return seen["out"]

    layer.after = spy
    with torch.no_grad():
        model(**inputs) if inputs else ALL[name].outputs(model)
    return layer, seen["x"], seen["y"], seen["out"]


# -- convolutions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, C])
@pytest.mark.parametrize(("first", "rows", "causal"), [(0, 1, False), (2, 3, False), (1, 2, True)])
def test_a_convolution_along_time_is_its_definition(
    first: int, rows: int, causal: bool, groups: int
) -> None:
    columns, taps = 5, 4 if causal else 3
    tokens = first + rows * columns
    z = torch.randn(2, tokens, C, generator=DRAW)
    kernel, bias = torch.randn(C, C // groups, taps, generator=DRAW), torch.randn(C, generator=DRAW)
    mask = torch.rand(2, tokens, generator=DRAW) > 0.3
    expected = bias.expand(2, tokens, C).clone()
    for clip in range(2):
        for token in range(tokens):
            row, column = divmod(token - first, columns)
            for tap in range(taps):
                other = column + tap - (taps - 1 if causal else taps // 2)
                at = first + row * columns + other
                if token < first:
                    at = token if at == token or other == column else -1
                elif not 0 <= other < columns:
                    continue
                if at < 0 or not mask[clip, at]:
                    continue
                weight = kernel[:, :, tap]
                seen = z[clip, at]
                expected[clip, token] += weight[:, 0] * seen if groups == C else weight @ seen
    found = along_time(z, kernel, bias, mask, first, rows, causal)
    assert_close((found,), (expected,), 1e-5)


def test_padding_may_hold_anything() -> None:
    z = torch.randn(1, 4, C, generator=DRAW)
    mask = torch.tensor([[True, True, True, False]])
    kernel = torch.randn(C, 1, 3, generator=DRAW)
    expected = along_time(z, kernel, None, mask)
    z[:, 3] = torch.nan
    assert torch.equal(along_time(z, kernel, None, mask), expected)


@pytest.mark.parametrize("placement", ["parallel", "sequential"])
def test_a_conv_adapter_is_its_formula(placement: Any) -> None:
    adapter = mm.ConvAdapter(4, kernel=3, placement=placement, scale=0.5)
    layer, x, y, out = met("hf_ast", adapter)
    z = F.layer_norm(x if placement == "parallel" else y, (16,), layer.norm_weight, layer.norm_bias)
    both = z @ layer.down.T + layer.down_bias
    hidden = both[..., :4] * torch.sigmoid(both[..., 4:])
    grid = hidden[:, 2:].reshape(3, 3, 5, 4)  # clips, bands, columns, channels
    seen = torch.zeros_like(grid)
    for column in range(5):
        for tap in range(3):
            if 0 <= column + tap - 1 < 5:
                seen[:, :, column] += grid[:, :, column + tap - 1] * layer.kernel[:, 0, tap]
    alone = hidden[:, :2] * layer.kernel[:, 0, 1]
    hidden = torch.cat([alone, seen.reshape(3, 15, 4)], 1) + layer.kernel_bias
    hidden = F.silu(F.layer_norm(hidden, (4,), layer.inner_weight, layer.inner_bias))
    assert_close((out,), (y + 0.5 * (hidden @ layer.up.T + layer.up_bias),), 1e-5)


def test_a_conv_pass_is_its_formula() -> None:
    layer, x, y, out = met("hf_wav2vec2", mm.ConvPass1d(4, scale=2.0, dropout=0.0))
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2, [True] * 2 + [False] * 4])

    def gate(z: Tensor) -> Tensor:
        return z * torch.sigmoid(1.702 * z)

    hidden = gate(x @ layer.down.T + layer.down_bias) * mask[..., None]
    seen = F.conv1d(hidden.mT, layer.kernel, layer.kernel_bias, padding=1).mT
    assert_close((out,), (y + 2.0 * (gate(seen) @ layer.up.T + layer.up_bias),), 1e-5)


@pytest.mark.parametrize("adapter", [mm.ConvAdapter(4, causal=True), mm.ConvPass1d(4, causal=True)])
def test_a_causal_layer_does_not_see_what_comes(adapter: mm.Adapter) -> None:
    model, layer, _ = site_of("hf_wav2vec2", "audio.layers[0].mlp:out", adapter)
    bank = bank_of(model)
    assert bank is not None
    site = bank.hooks["audio.layers[0].mlp:out"].site
    x = torch.randn(2, 6, 16, generator=DRAW)
    changed = x.clone()
    changed[:, 3:] += torch.randn(2, 3, 16, generator=DRAW)
    zero = torch.zeros_like(x)
    with torch.no_grad():
        one, two = (layer.after(zero, zero, z, Context(), site) for z in (x, changed))
    assert torch.equal(one[:, :3], two[:, :3])
    assert not torch.allclose(one[:, 3:], two[:, 3:], atol=1e-2)


def test_dropout_and_scale_are_checked_and_even_kernels_need_causal() -> None:
    with pytest.raises(AdapterError, match="odd number of frames"):
        mm.ConvAdapter(4, kernel=4)
    assert mm.ConvPass1d(4, kernel=4, causal=True).kernel == 4
    for wrong in ({"width": 0}, {"dropout": 1.0}, {"causal": 1}, {"placement": "beside"}):
        with pytest.raises(AdapterError):
            mm.ConvAdapter(**wrong)  # type: ignore[arg-type]


def test_sites_that_hold_no_frames_are_refused() -> None:
    with pytest.raises(AdapterError, match=r"(?s)does not hold frames.*Convpass"):
        mm.attach(BACKBONES["hf_vit"].fresh(), mm.ConvAdapter(4), at="vision.layers[*].mlp")
    with pytest.raises(AdapterError, match="already cached"):
        mm.attach(BACKBONES["hf_llama"].fresh(), mm.ConvPass1d(4), at="text.layers[*].mlp")
    with pytest.raises(AdapterError, match="does not hold frames"):
        mm.attach(BACKBONES["hf_wav2vec2"].fresh(), mm.ConvAdapter(4), at="audio.frontend[1]:out")
    with pytest.raises(SiteError, match="audio encoder"):
        mm.attach(BACKBONES["hf_vit"].fresh(), mm.ConvAdapter(4))


def test_a_model_of_ones_own_may_hold_frames() -> None:
    backbone = small()
    mm.attach(backbone, mm.ConvAdapter(2, kernel=3), at="layers[*].mlp")
    assert len(mm.attachments(backbone)["default"].sites) == 3


# -- mixtures ---------------------------------------------------------------------------------------


def expert(layer: Any, place: int, z: Tensor) -> Tensor:
    hidden = F.gelu(z @ layer.down[place].T + layer.down_bias[place])
    return hidden @ layer.up[place].T + layer.up_bias[place]


def test_a_dense_mixture_is_its_formula() -> None:
    layer, x, y, out = met("hf_ast", mm.DenseMoA(3, width=2))
    gates = (x @ layer.router.T + layer.router_bias).softmax(-1)
    expected = y + sum(gates[..., n : n + 1] * expert(layer, n, x) for n in range(3))
    assert_close((out,), (expected,), 1e-5)


def test_a_soft_mixture_is_its_formula_and_sees_no_padding() -> None:
    layer, x, y, out = met("hf_wav2vec2", mm.SoftMoA(3, slots=2, width=2))
    valid = (6, 4, 2)
    for clip, frames in enumerate(valid):
        logits = x[clip] @ layer.slots  # frames, experts · slots
        weights = logits[:frames].softmax(0)
        made = []
        for slot in range(6):
            made.append(expert(layer, slot // 2, weights[:, slot] @ x[clip, :frames]))
        expected = y[clip] + logits.softmax(-1) @ torch.stack(made)
        assert_close((out[clip],), (expected,), 1e-5)


def test_a_clip_of_nothing_but_padding_stays_finite() -> None:
    logits = torch.randn(1, 4, 2, generator=DRAW)
    weights = soft_dispatch(logits, torch.zeros(1, 4, dtype=torch.bool))
    assert torch.isfinite(weights).all()


# -- prompts and bottlenecks ----------------------------------------------------------------------------


def test_deep_prompts_are_tokens_of_their_own_in_every_block() -> None:
    tiny = ALL["hf_ast_bare"]
    model: Any = tiny.fresh()
    attachment = randomise(mm.attach(model, mm.DeepPrompts(3)), 0.5)
    plain: Any = tiny.fresh()
    with torch.no_grad():
        x = plain.embeddings(tiny.batch(2)["input_values"])
        for block, layer in zip(plain.layers, attachment.layers.values(), strict=True):
            prompt = layer.prompt.expand(2, -1, -1)
            wide = block(torch.cat([x[:, :1], prompt, x[:, 1:]], 1))  # where the authors have them
            x = torch.cat([wide[:, :1], wide[:, 4:]], 1)
        assert_close((tiny.outputs(model, tiny.batch(2))[0],), (plain.layernorm(x),), 1e-5)


def test_prompts_beside_a_convolution_along_time_are_refused_not_mixed_up() -> None:
    model: Any = ALL["hf_ast"].fresh()
    mm.attach(model, [mm.DeepPrompts(3), mm.ConvAdapter(2, kernel=3)])  # three, a column of bands
    with pytest.raises(CheckError, match=r"(?s)20 tokens came.*17 in rows of 3.*no prompts"):
        ALL["hf_ast"].outputs(model)


def test_a_bottleneck_before_a_branch_changes_what_the_branch_reads() -> None:
    tiny = ALL["hf_ast_bare"]
    model, layer, _ = site_of("hf_ast_bare", "audio.layers[1].mlp:in", mm.Bottleneck(4))
    plain: Any = tiny.fresh()
    mlp = plain.layers[1].mlp
    own = mlp.forward

    def changed(x: Tensor) -> Tensor:
        hidden = F.gelu(x @ layer.down.T + layer.down_bias)
        return own(x + hidden @ layer.up.T + layer.up_bias)

    mlp.forward = changed
    assert_close(tiny.outputs(model), tiny.outputs(plain), 1e-5)
    for placement in ("parallel", "residual"):
        with pytest.raises(AdapterError, match=r"(?s)reads and changes its input.*sequential"):
            mm.attach(
                tiny.fresh(),
                mm.Bottleneck(4, placement=placement),  # type: ignore[arg-type]
                at="audio.layers[1].mlp:in",
            )


def test_the_audio_preset_reads_what_the_mlp_reads() -> None:
    layer, x, y, out = met("hf_wav2vec2", mm.Bottleneck.audio(4))
    hidden = F.gelu(x @ layer.down.T + layer.down_bias)
    assert_close((out,), (y + hidden @ layer.up.T + layer.up_bias,), 1e-5)
    assert mm.Bottleneck.audio().width_of(768) == 12
