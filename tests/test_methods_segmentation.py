"""SAM-Med2D and AdapterShadow: their formulas, sizes and starts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backbones import BACKBONES, clicks
from snapshot import randomise
from test_backbones_sam import hf_sam_of, original_of
from test_methods_volume import planned
from torch.nn import functional as F

import mmadapt as mm

# -- SAM-Med2D --------------------------------------------------------------------------------------


def test_sam_med2d_has_the_published_size_in_every_block() -> None:
    """15,042,048 numbers a block, 180 million in all: twice the encoder."""
    assert planned(hf_sam_of("vit_b"), mm.SAMMed2D()) == [15_042_048] * 12


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
