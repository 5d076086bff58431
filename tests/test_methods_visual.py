"""Compacter, bottlenecks of few bits and Convpass, written out, with the papers' numbers."""

from __future__ import annotations

from statistics import NormalDist
from typing import Any

import pytest
import torch
from backbones import BACKBONES, WIDTH, pixels
from snapshot import assert_close, differ, randomise
from straight import vision
from torch import Tensor, nn
from torch.nn import functional as F

import mmadapt as mm
from mmadapt.errors import AdapterError
from mmadapt.ops import reference

VISION = BACKBONES["open_clip_vision"]


@pytest.fixture(scope="module")
def vit_b() -> Any:
    from open_clip import get_model_config
    from open_clip.model import CLIP

    with torch.device("meta"):
        return CLIP(**get_model_config("ViT-B-32"))  # type: ignore[arg-type]


def planned(model: Any, adapter: mm.Adapter, at: Any = None) -> list[int]:
    return [record["parameters"] for record in mm.plan(model, adapter, at).records()]


def adapted_equals(model: Any, branch: Any) -> None:
    with torch.no_grad():
        expected = vision(model, pixels(3), branch)
        assert differ((expected,), (vision(model, pixels(3)),))
        assert_close((model(pixels(3)),), (expected,), 2e-6)


# -- Compacter --------------------------------------------------------------------------------------


def test_a_sum_of_kronecker_products_by_hand() -> None:
    a = torch.arange(8).view(2, 2, 2) / 10
    b = torch.arange(12).view(2, 2, 3) / 10
    found = reference.kronecker_sum(a, b)
    assert found[0].tolist() == pytest.approx([0.24, 0.28, 0.32, 0.30, 0.36, 0.42])
    assert torch.allclose(found, sum(torch.kron(one, other) for one, other in zip(a, b)))  # type: ignore[arg-type]  # noqa: B905


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("division", [1, 2, 4])
def test_compacter_is_its_formula(division: int, shared: bool) -> None:
    model: Any = VISION.fresh()
    adapter = mm.Compacter.plus_plus(8, division=division, activation="relu", shared_rule=shared)
    attachment = randomise(mm.attach(model, adapter))

    def projection(layer: Any, word: str) -> Tensor:
        s, t = getattr(layer, f"{word}_s"), getattr(layer, f"{word}_t")
        rule = layer.shared.rule if shared else layer.rule
        terms = (torch.kron(rule[i], torch.outer(s[i], t[i])) for i in range(division))
        return sum(terms)  # type: ignore[return-value]

    def branch(i: int, y: Tensor, x: Tensor, norm1: Tensor) -> Tensor:
        layer: Any = attachment.layers[f"0/vision.layers[{i}].mlp:out"]
        hidden = torch.relu(y @ projection(layer, "down") + layer.down_bias)
        return y + hidden @ projection(layer, "up") + layer.up_bias

    adapted_equals(model, branch)


def test_compacter_in_vit_b_has_the_published_size(vit_b: Any) -> None:
    sites = ["vision.layers[*].attn", "vision.layers[*].mlp"]
    assert planned(vit_b, mm.Compacter(), sites) == [2_376] * 24 + [4**3]
    assert planned(vit_b, mm.Compacter(shared_rule=False), sites) == [2_376 + 4**3] * 24
    assert planned(vit_b, mm.Compacter.plus_plus(), sites[1]) == [2_376] * 12 + [4**3]


def test_compacters_published_start_is_small_and_drawn() -> None:
    adapter = mm.Compacter(8, division=4, start="published", shared_rule=False)
    assert not adapter.starts_as_identity()
    for layer in mm.attach(VISION.fresh(), adapter).layers.values():
        drawn: Any = layer
        bound = (12 / (WIDTH / 4 + 1)) ** 0.5
        assert 0.5 * bound < float(drawn.up_t.detach().abs().max()) <= bound
        assert float(drawn.rule.detach().std()) == pytest.approx(0.01, rel=0.4)
        assert not drawn.up_bias.any()


def test_compacter_needs_widths_its_division_divides() -> None:
    with pytest.raises(AdapterError, match="division 4 does not divide the width 10"):
        mm.Compacter(10)
    with pytest.raises(AdapterError, match="division 3 does not divide the 16 channels at vis"):
        mm.attach(VISION.fresh(), mm.Compacter(6, division=3))
    with pytest.raises(AdapterError, match="start is 'none', expected one of zero, published"):
        mm.Compacter(start="none")  # type: ignore[arg-type]


# -- few bits ---------------------------------------------------------------------------------------


def test_one_bit_by_hand() -> None:
    found = reference.low_bit(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), reference.normal_codes(1))
    expected = torch.tensor([[1.629238, 1.629238], [3.370762, 3.370762]])
    assert torch.allclose(found, expected, atol=1e-6)


def test_codes_are_the_medians_of_their_cells() -> None:
    upper = NormalDist().inv_cdf(0.75)
    assert reference.normal_codes(1) == pytest.approx((-upper, upper))
    assert reference.normal_codes(2) == pytest.approx(
        (-1.26572033, -0.37775416, 0.37775416, 1.26572033), abs=1e-8
    )
    for bits in (3, 4):
        codes = reference.normal_codes(bits)
        assert len(codes) == 2**bits
        assert codes == pytest.approx([-code for code in reversed(codes)], abs=1e-9)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_quantised_weights_take_the_nearest_code(bits: int) -> None:
    weight = torch.randn(40, 30, generator=torch.Generator().manual_seed(1)) * 0.3 + 0.1
    codes = torch.tensor(reference.normal_codes(bits))
    standard = (weight - weight.mean()) / (weight.std() + 1e-5)
    nearest = codes[(standard[..., None] - codes).abs().argmin(-1)]
    expected = nearest * weight.std() + weight.mean()
    found = reference.low_bit(weight, reference.normal_codes(bits))
    assert torch.allclose(found, expected, atol=1e-6)
    assert len(found.mul(1e4).round().unique()) == 2**bits


def test_the_gradient_passes_the_quantiser() -> None:
    weight = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    probe = torch.randn(5, 4, dtype=torch.float64)
    (found,) = torch.autograd.grad((reference.low_bit(weight, (-0.67, 0.67)) * probe).sum(), weight)
    mean, deviation = weight.mean(), weight.std()
    standard = (weight - mean) / (deviation + 1e-5)
    code = torch.where(standard.detach() > 0, 0.67, -0.67)
    straight = standard + (code - standard).detach()
    (expected,) = torch.autograd.grad(((straight * deviation + mean) * probe).sum(), weight)
    assert torch.allclose(found, expected, atol=1e-12)
    assert found.abs().min() > 0


@pytest.mark.parametrize("bits", [1, 2])
def test_the_low_bit_bottleneck_is_its_formula(bits: int) -> None:
    model: Any = VISION.fresh()
    attachment = randomise(mm.attach(model, mm.BiAdaptFormer(4, bits=bits, scale=0.7)))
    codes = torch.tensor(reference.normal_codes(bits))

    def quantised(weight: Tensor) -> Tensor:
        standard = (weight - weight.mean()) / (weight.std() + 1e-5)
        nearest = codes[(standard[..., None] - codes).abs().argmin(-1)]
        return nearest * weight.std() + weight.mean()

    def branch(i: int, y: Tensor, x: Tensor, norm1: Tensor) -> Tensor:
        layer: Any = attachment.layers[f"0/vision.layers[{i}].mlp:out"]
        return y + 0.7 * torch.relu(x @ quantised(layer.down).T) @ quantised(layer.up).T

    adapted_equals(model, branch)


def test_the_bytes_of_a_one_bit_adapter_are_the_papers(vit_b: Any) -> None:
    sizes = planned(vit_b, mm.BiAdaptFormer(), "vision.layers[*].mlp")
    assert sizes == [2 * 768 * 32] * 12
    assert sum(size / 8 + 16 for size in sizes) / 1024 == 72.1875
    for layer in mm.attach(VISION.fresh(), mm.BiAdaptFormer(4, bits=2)).layers.values():
        assert layer.describe() == {"bytes": 2 * (2 * WIDTH * 4) / 8 + 16}


def test_bits_are_one_to_four() -> None:
    for bits in (0, 5, True, 1.5):
        with pytest.raises(AdapterError, match="bits is .*, expected 1, 2, 3 or 4"):
            mm.BiAdaptFormer(bits=bits)  # type: ignore[arg-type]


# -- Convpass ---------------------------------------------------------------------------------------


def convolved(layer: Any, x: Tensor, scale: float, first: int, grid: tuple[int, int]) -> Tensor:
    """The change, token by token through unfolded neighbourhoods."""

    def gelu(z: Tensor) -> Tensor:
        return z / (1 + torch.exp(-1.702 * z))

    hidden = gelu(x @ layer.down.T + layer.down_bias)
    rows, columns = grid
    out = hidden.new_zeros(hidden.shape)
    for token in range(first):
        out[:, token] = hidden[:, token] @ layer.kernel[:, :, 1, 1].T
    for r in range(rows):
        for c in range(columns):
            for dr in (-1, 0, 1):
                for dc in (-1, 0, 1):
                    if 0 <= r + dr < rows and 0 <= c + dc < columns:
                        seen = hidden[:, first + (r + dr) * columns + c + dc]
                        tap = layer.kernel[:, :, dr + 1, dc + 1]
                        out[:, first + r * columns + c] += seen @ tap.T
    return scale * (gelu(out + layer.kernel_bias) @ layer.up.T + layer.up_bias)


@pytest.mark.parametrize("kernel", ["identity", "xavier"])
def test_convpass_is_its_formula(kernel: Any) -> None:
    model: Any = VISION.fresh()
    adapter = mm.Convpass(4, scale=0.7, kernel=kernel)
    layers: Any = randomise(mm.attach(model, adapter)).layers
    with torch.no_grad():
        x = model._embeds(pixels(3))
        assert x.shape[1] == 5
        for i, own in enumerate(model.transformer.resblocks):
            norm1 = own.ln_1.forward(x)
            x = x + own.attn.forward(norm1, norm1, norm1, need_weights=False)[0]
            x = x + convolved(layers[f"0/vision.layers[{i}].attn:out"], norm1, 0.7, 1, (2, 2))
            norm2 = own.ln_2.forward(x)
            delta = convolved(layers[f"0/vision.layers[{i}].mlp:out"], norm2, 0.7, 1, (2, 2))
            x = x + own.mlp.forward(norm2) + delta
        expected = model._pool(x)[0] @ model.proj
        assert_close((model(pixels(3)),), (expected,), 5e-6)


class Tokens(nn.Module):
    """A linear layer over tokens, called."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


def tokens(layout: str = "BTC") -> mm.Backbone:
    span = mm.Span("mlp", x="0|input", channels="mlp.weight", layout=layout)
    return mm.Backbone(
        model=Tokens().eval(), anatomy=mm.Anatomy(family="tokens", spans={"mlp": span})
    )


@pytest.mark.parametrize(
    ("count", "grid", "first", "found"),
    [
        (9, None, 0, (3, 3)),
        (10, None, 1, (3, 3)),
        (6, (2, 3), 0, (2, 3)),
        (9, (4, 2), 1, (4, 2)),
        (17, (3, 4), 5, (3, 4)),
    ],
)
def test_the_grid_of_patches(count: int, grid: Any, first: int, found: tuple[int, int]) -> None:
    backbone = tokens()
    layer: Any
    (layer,) = randomise(mm.attach(backbone, mm.Convpass(3, grid=grid), at="mlp")).layers.values()
    x = torch.randn(2, count, 6)
    with torch.no_grad():
        y = backbone.model.mlp.forward(x)  # type: ignore[operator,union-attr]
        expected = y + convolved(layer, x, 1.0, first, found)
        assert_close((backbone.model(x),), (expected,), 5e-6)


def test_an_image_keeps_its_own_grid() -> None:
    backbone = tokens("BHWC")
    layer: Any
    (layer,) = randomise(mm.attach(backbone, mm.Convpass(3), at="mlp")).layers.values()
    x = torch.randn(2, 3, 4, 6)
    with torch.no_grad():
        change = convolved(layer, x.flatten(1, 2), 1.0, 0, (3, 4)).view(x.shape)
        expected = F.linear(x, backbone.model.mlp.weight, backbone.model.mlp.bias) + change  # type: ignore[union-attr,arg-type]
        assert_close((backbone.model(x),), (expected,), 5e-6)


def test_tokens_that_are_no_square_are_refused() -> None:
    backbone = tokens()
    mm.attach(backbone, mm.Convpass(3), at="mlp")
    with pytest.raises(
        AdapterError, match="7 tokens at mlp:out are no square of patches"
    ) as caught:
        backbone.model(torch.randn(2, 7, 6))
    assert "grid=(rows, columns)" in caught.value.hint
    mm.attach(backbone, mm.Convpass(3, grid=(3, 3)), name="fixed", at="mlp")
    with pytest.raises(AdapterError, match="a grid of 3 × 3 does not fit the 7 tokens"):
        backbone.model(torch.randn(2, 7, 6))


def test_convpass_in_vit_b_has_the_published_size(vit_b: Any) -> None:
    sizes = planned(vit_b, mm.Convpass())
    assert sizes == [13_648] * 24
    assert sum(sizes) == 327_552
    assert sum(planned(vit_b, mm.Convpass(), "vision.layers[*].attn")) == 163_776


def test_the_grid_survives_json_and_nonsense_is_refused() -> None:
    import json

    from mmadapt.adapter import from_json

    adapter = mm.Convpass(grid=(3, 4))
    assert from_json(json.loads(json.dumps(adapter.to_json()))) == adapter
    for grid in ((3,), (0, 2), "34", (1.0, 2)):
        with pytest.raises(AdapterError, match=r"Convpass: grid is .*, expected \(rows, columns\)"):
            mm.Convpass(grid=grid)  # type: ignore[arg-type]
    with pytest.raises(AdapterError, match="kernel is 'zero', expected one of identity, xavier"):
        mm.Convpass(kernel="zero")  # type: ignore[arg-type]


def test_dropout_of_convpass_acts_only_in_training() -> None:
    model: Any = VISION.fresh()
    randomise(mm.attach(model, mm.Convpass(4, dropout=0.5)))
    with torch.no_grad():
        plain = model(pixels(3))
        with mm.train_mode(model):
            assert differ((model(pixels(3)),), (plain,))
        assert torch.equal(model(pixels(3)), plain)
