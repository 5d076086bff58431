"""Networks of 3-D convolutions through the generic anatomy: MONAI's U-net."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from snapshot import assert_close, differ, randomise, values
from torch import Tensor

import mmadapt as mm

pytest.importorskip("monai")


def unet() -> Any:
    from monai.networks.nets import UNet  # type: ignore[import-not-found]

    torch.manual_seed(3)
    return UNet(3, 1, 2, channels=(4, 8, 16), strides=(2, 2), num_res_units=2, norm="batch").eval()


def volume() -> Tensor:
    return torch.randn(2, 1, 16, 16, 16, generator=torch.Generator().manual_seed(4))


def run(model: Any) -> Tensor:
    with torch.no_grad():
        return model(volume())


#: adapter and the sites it is sent to
CASES = {
    "LoRA": (mm.LoRA(2), "blocks[*].conv.*.conv"),
    "Bottleneck": (mm.Bottleneck(4), "blocks[*]"),
}


@pytest.fixture(params=CASES)
def case(request: Any) -> tuple[mm.Adapter, str]:
    return CASES[request.param]


def test_the_blocks_are_the_units_not_the_levels_around_them() -> None:
    rows = mm.sites(unet(), "blocks[*]").records()
    assert [row["module"] for row in rows] == [
        "model.0",
        "model.1.submodule.0",
        "model.1.submodule.1.submodule",
        "model.1.submodule.2.1",
        "model.2.1",
    ]
    assert [row["width"] for row in rows] == ["1 → 4", "4 → 8", "8 → 16", "4", "2"]


def test_volumes_are_adapted_from_an_identity_on(case: Any, tmp_path: Path) -> None:
    adapter, at = case
    model = unet()
    before, kept = run(model), values(model)
    attachment = mm.attach(model, adapter, at=at)
    assert torch.equal(run(model), before)
    model(volume()).square().mean().backward()
    randomise(attachment)
    adapted = run(model)
    assert differ((adapted,), (before,))
    assert [n for n, p in attachment.named_parameters() if p.grad is None] == []
    mm.save(model, tmp_path)
    other = unet()
    mm.load_adapter(other, tmp_path)
    assert torch.equal(run(other), adapted)
    mm.detach(model)
    assert torch.equal(run(model), before)
    assert all(torch.equal(kept[name], value) for name, value in values(model).items())


def test_low_rank_changes_of_3d_kernels_merge() -> None:
    model = unet()
    adapter, at = CASES["LoRA"]
    randomise(mm.attach(model, adapter, at=at))
    adapted = run(model)
    mm.merge(model)
    assert_close((run(model),), (adapted,), 1e-4)
    mm.unmerge(model)
    assert torch.equal(run(model), adapted)


def test_a_low_rank_change_of_a_3d_kernel_is_its_formula() -> None:
    model = unet()
    site = "blocks[0].conv.unit0.conv"
    attachment = randomise(mm.attach(model, mm.LoRA(2, alpha=4.0), at=site))
    layer = attachment.layers[f"0/{site}:weight"]
    adapted = run(model)
    by_hand = unet()
    with torch.no_grad():
        weight = by_hand.model[0].conv.unit0.conv.weight
        a, b = (t for _, t in sorted(layer.named_parameters()))
        weight += 2.0 * (b @ a.flatten(1)).view_as(weight)
    assert_close((run(by_hand),), (adapted,), 1e-5)
