"""SAM-Med2D and AdapterShadow: their formulas, sizes and starts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backbones import BACKBONES, clicks
from snapshot import randomise
from test_backbones_sam import SIZES, hf_sam_of, original_of
from test_methods_volume import planned
from torch.nn import functional as F

import mmadapt as mm

# -- SAM-Med2D --------------------------------------------------------------------------------------


def test_sam_med2d_has_the_published_size_in_every_block() -> None:
    """15,042,048 numbers a block, 180 million in all: twice the encoder."""
    for build in (hf_sam_of, original_of):
        assert planned(build("vit_b"), mm.SAMMed2D()) == [15_042_048] * 12


@pytest.mark.parametrize("size", ["vit_l", "vit_h"])
def test_sam_med2d_grows_with_the_square_of_the_width(size: str) -> None:
    width, layers = SIZES[size][:2]
    one = 2 * width * (width // 4) + (9 + 16) * width**2 + 2 * width
    assert planned(hf_sam_of(size), mm.SAMMed2D()) == [one] * layers


def test_prompt_encoder_and_mask_decoder_are_trained_in_full_where_asked() -> None:
    for build in (hf_sam_of, original_of):
        sizes = planned(build("vit_b"), mm.SAMMed2D(decoder="trained"))
        assert sum(sizes) == 12 * 15_042_048 + 4_058_340 + 6_220


@pytest.mark.parametrize("rows", [4, 5])
def test_a_grid_of_odd_sides_is_no_obstacle(rows: int) -> None:
    model: Any = BACKBONES["hf_sam"].fresh()
    attachment = randomise(mm.attach(model, mm.SAMMed2D()), 0.3)
    layer = attachment.layers["0/vision.layers[0].mlp:out"]
    n, y = torch.randn(2, rows, 3, 16), torch.randn(2, rows, 3, 16)
    with torch.no_grad():
        found = layer.after(y, y, n, None, None)  # type: ignore[arg-type]
        gate = ((n.mean((1, 2)) @ layer.squeeze.T).relu() @ layer.expand.T).sigmoid()
        maps = (n * gate[:, None, None]).permute(0, 3, 1, 2)
        maps = F.conv2d(maps, layer.narrow, None, 2, 1).relu()
        assert maps.shape[2:] == ((rows + 1) // 2, 2)
        maps = F.conv_transpose2d(maps, layer.widen, None, 2, 1).relu()[:, :, :rows, :3]
        added = n + maps.permute(0, 2, 3, 1)
        expected = y + F.layer_norm(added, (16,), layer.norm_weight, layer.norm_bias)
    torch.testing.assert_close(found, expected)


def test_the_norm_opens_first_and_then_everything_learns() -> None:
    model: Any = BACKBONES["hf_sam"].fresh()
    attachment = mm.attach(model, mm.SAMMed2D())
    layer = attachment.layers["0/vision.layers[0].mlp:out"]
    optimiser = torch.optim.SGD(attachment.parameters(), lr=0.1)
    for learning in ({"norm_weight", "norm_bias"}, {name for name, _ in layer.named_parameters()}):
        optimiser.zero_grad()
        BACKBONES["hf_sam"].outputs(model, clicks(2))[0].square().mean().backward()
        gradients = {name: p.grad for name, p in layer.named_parameters()}
        found = {name for name, g in gradients.items() if g is not None and bool(g.any())}
        assert found == learning
        optimiser.step()


def test_a_plain_vision_transformer_is_refused() -> None:
    with pytest.raises(mm.errors.SiteError, match="whole grid of an image's tokens"):
        mm.attach(BACKBONES["hf_vit"].fresh(), mm.SAMMed2D())


# -- AdapterShadow ----------------------------------------------------------------------------------

#: vit_b's channels and width
C, H = 768, 192


@pytest.mark.parametrize(
    ("adapter", "sites", "size"),
    [
        (mm.AdapterShadow(), 24, 2 * C * H + H + C),
        (mm.AdapterShadow(skip=True), 36, 2 * C * H + H + C),
        (mm.AdapterShadow(fraction=0.25), 6, 295_872),
        (mm.AdapterShadow(fraction=0.3), 8, 295_872),
        (mm.AdapterShadow(fraction=1 / 3, skip=True), 12, 295_872),
        (mm.AdapterShadow(branches=8), 24, 2 * C * H // 8 + H + C),
        (mm.AdapterShadow(rank=16), 24, 2 * 16 * (C + H) + H + C),
        (mm.AdapterShadow(rank=16, branches=8), 24, 2 * 16 * (C + H) + H + C),
    ],
    ids=str,
)
def test_adapter_shadow_in_vit_b(adapter: Any, sites: int, size: int) -> None:
    for build in (hf_sam_of, original_of):
        assert planned(build("vit_b"), adapter) == [size] * sites


@pytest.mark.parametrize("size", SIZES)
def test_adapter_shadow_is_as_large_as_two_bottlenecks_of_med_sa(size: str) -> None:
    model = hf_sam_of(size)
    plain = planned(model, mm.AdapterShadow())
    assert plain == planned(model, mm.MedSA("released", decoder="frozen"))
    matrices = sum(plain) - len(plain) * (SIZES[size][0] * 5 // 4)
    branched = planned(model, mm.AdapterShadow(branches=8))
    assert sum(branched) - len(plain) * (SIZES[size][0] * 5 // 4) == matrices // 8


def test_a_fraction_takes_the_last_blocks() -> None:
    model = hf_sam_of("vit_b")
    table = mm.plan(model, mm.AdapterShadow(fraction=0.2))
    assert {row["site"].split(".")[1] for row in table.records()} == {
        "layers[9]",
        "layers[10]",
        "layers[11]",
    }
    assert "vision.layers[-3:].attn:out" in table.title


def test_the_plain_form_starts_and_acts_as_med_sas_released_encoder() -> None:
    found = []
    for adapter in (mm.AdapterShadow(), mm.MedSA("released", decoder="frozen")):
        model: Any = BACKBONES["hf_sam"].fresh()
        randomise(mm.attach(model, adapter, seed=1), 0.3)
        with torch.no_grad():
            found.append(BACKBONES["hf_sam"].outputs(model)[0])
    assert torch.equal(*found)


@pytest.mark.parametrize(("branches", "rank"), [(4, None), (1, 3), (2, 3)])
def test_branches_and_ranks_are_bottlenecks_with_composed_matrices(
    branches: int, rank: int | None
) -> None:
    """One wide bottleneck whose matrices have a block for each group, and products within."""
    model: Any = BACKBONES["hf_sam"].fresh()
    adapter = mm.AdapterShadow(branches=branches, rank=rank, skip=True)
    attachment = randomise(mm.attach(model, adapter), 0.3)
    for role, scale in ((".attn", 1.0), (".mlp", 0.5), ("", 1.0)):
        layer = attachment.layers[f"0/vision.layers[0]{role}:out"]

        def whole(word: str, layer: Any = layer) -> torch.Tensor:
            if rank is None:
                return torch.block_diag(*getattr(layer, word))
            first, second = getattr(layer, f"{word}_first"), getattr(layer, f"{word}_second")
            return torch.block_diag(*(b @ a for a, b in zip(first, second, strict=True)))

        x, y = torch.randn(2, 4, 4, 16), torch.randn(2, 4, 4, 16)
        z = y if role == ".attn" else x
        hidden = F.gelu(z @ whole("down").T + layer.down_bias)
        expected = y + scale * (hidden @ whole("up").T + layer.up_bias)
        torch.testing.assert_close(layer.after(y, y, x, None, None), expected)


def test_branches_have_to_divide_the_channels() -> None:
    with pytest.raises(mm.errors.AdapterError, match="3 branches do not divide the 16 channels"):
        mm.attach(BACKBONES["hf_sam"].fresh(), mm.AdapterShadow(branches=3))
    for wrong in ({"fraction": 0.0}, {"fraction": 1.5}, {"branches": 0}, {"rank": 0}, {"skip": 1}):
        with pytest.raises(mm.errors.AdapterError, match=f"AdapterShadow: {next(iter(wrong))} is"):
            mm.AdapterShadow(**wrong)  # type: ignore[arg-type]
    with pytest.raises(mm.errors.SiteError, match="grid of image tokens"):
        mm.attach(BACKBONES["hf_vit"].fresh(), mm.AdapterShadow())
