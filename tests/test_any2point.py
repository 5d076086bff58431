"""Any2Point: its published size, its geometry by brute force, and what holds for clouds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backbones import BACKBONES, clouds
from snapshot import assert_close, differ, randomise, state
from torch import Tensor
from torch.nn import functional as F

import mmadapt as mm
from mmadapt.ops.points import (
    farthest_points,
    first_of,
    neighbours,
    pick,
    positions_at,
    projected,
    region_max,
    region_mean,
    together,
    views,
    waves,
)

TINY: dict[str, Any] = {"tokens": 8, "neighbours": 6, "neck": 4, "dropout": 0.0, "head_width": 12}


def adapted(name: str = "hf_vit", amount: float = 0.1, **changes: Any) -> tuple[Any, Any]:
    model: Any = BACKBONES[name].fresh()
    attachment = mm.attach(model, mm.Any2Point(**{"classes": 5, **TINY, **changes}))
    return model, randomise(attachment, amount) if amount else attachment


def run(model: Any, points: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return model(pixel_values=clouds(3)["pixel_values"] if points is None else points)


# -- size -----------------------------------------------------------------------------------------


def test_the_published_size() -> None:
    from transformers import Dinov2Config, Dinov2Model

    with torch.device("meta"):
        model = Dinov2Model(Dinov2Config(image_size=518, patch_size=14))
    found = {row["site"]: row["parameters"] for row in mm.plan(model, mm.Any2Point()).records()}
    assert found["vision.embeddings:around"] == 276_672 + 2 * 768
    assert sum(found.values()) == 800_760


# -- geometry ---------------------------------------------------------------------------------------


def test_farthest_points_by_brute_force() -> None:
    points = torch.randn(2, 30, 3)
    for cloud, found in zip(points, farthest_points(points, 7).tolist(), strict=True):
        chosen = [0]
        while len(chosen) < 7:
            apart = torch.cdist(cloud, cloud[chosen]).amin(1)
            chosen.append(int(apart.argmax()))
        assert found == chosen


def test_neighbours_by_brute_force() -> None:
    points, centres = torch.randn(2, 20, 3), torch.randn(2, 4, 3)
    found = neighbours(centres, points, 5)
    for b in range(2):
        for m in range(4):
            near = (points[b] - centres[b, m]).norm(dim=-1).argsort()[:5]
            assert set(found[b, m].tolist()) == set(near.tolist())
    assert torch.equal(pick(points, found)[1, 2, 3], points[1, found[1, 2, 3]])


def test_waves_by_hand() -> None:
    found = waves(torch.tensor([0.01, 0.02, -0.03], dtype=torch.float64), 12)
    slow = 1000.0**0.5
    expected = [
        wave(torch.tensor(100 * x / step, dtype=torch.float64)).item()
        for x in (0.01, 0.02, -0.03)
        for step in (1.0, slow)
        for wave in (torch.sin, torch.cos)
    ]
    assert found.tolist() == pytest.approx(expected)
    assert waves(torch.zeros(3), 16).shape == (16,)


def test_views_are_rotations_that_look_along_every_axis() -> None:
    found = views(torch.float64)
    assert torch.allclose(found @ found.transpose(1, 2), torch.eye(3).double().expand(6, 3, 3))
    assert torch.allclose(torch.linalg.det(found), torch.ones(6).double())
    along = found[:, :, 2]  # the point that comes to lie on the z axis
    assert {tuple(row) for row in along.round().int().tolist()} == {
        *((0, 0, 1), (0, 1, 0), (0, 0, -1), (0, -1, 0), (1, 0, 0), (-1, 0, 0))
    }


def test_the_origin_falls_on_the_middle_of_every_view() -> None:
    found = projected(torch.zeros(1, 1, 3), -1.8, 28, 56)
    assert found.tolist() == [[[[28.0, 14.0]]] * 6]


def test_a_point_is_projected_by_a_pinhole_and_wraps() -> None:
    point = torch.tensor([[[0.3, -0.2, 0.4]]])
    column, row = projected(point, -1.8, 100, 100)[0, 0, 0].tolist()  # the view as it is
    assert column == pytest.approx((0.3 / 2.2 + 1) * 50, abs=1e-4)
    assert row == pytest.approx((-0.2 / 2.2 + 1) * 50, abs=1e-4)
    near = projected(torch.tensor([[[0.8, 0.0, -0.9]]]), -1.2, 100, 100)
    assert near[0, 0, 0, 0].item() == pytest.approx((0.8 / 0.3 + 1) * 50 % 100, abs=1e-3)


def test_positions_are_read_between_patches() -> None:
    table = torch.arange(4.0)[None, :, None].expand(3, 4, 1)  # grows with the column
    places = torch.tensor([[[[0.0, 0.0], [79.0, 20.0], [39.5, 59.0]]]])
    found = positions_at(table, places, 60, 80)
    assert found.flatten().tolist() == pytest.approx([0.0, 3.0, 1.5], abs=1e-5)


def test_regions_by_brute_force() -> None:
    cells = torch.tensor([[[0, 1], [2, 2], [0, 1], [2, 3], [2, 2]]])
    x = torch.randn(1, 5, 3)
    first = first_of(together(cells))
    assert first.tolist() == [[0, 1, 0, 3, 1]]
    groups = {0: [0, 2], 1: [1, 4], 3: [3]}
    mean, most = region_mean(x, first), region_max(x, first)
    for place in range(5):
        rows = x[0, groups[place]] if place in groups else torch.zeros(1, 3)
        assert torch.allclose(mean[0, place], rows.mean(0))
        assert torch.allclose(most[0, place], rows.amax(0))


# -- the layers --------------------------------------------------------------------------------------


def test_regions_are_normalised_as_batch_norm_does() -> None:
    _, attachment = adapted(amount=0.0)
    layer = attachment.layers["0/vision.layers[0]:out"]
    randomise(attachment)
    first = torch.tensor([[0, 0, 2, 2], [0, 1, 0, 1]])
    x = torch.randn(2, 4, 16)
    held = torch.stack([x[0, 0], x[0, 2], x[1, 0], x[1, 1]])
    mean, variance = layer.mean[3].clone(), layer.variance[3].clone()
    layer.train()
    with torch.no_grad():
        found = layer._regions(x, first, 3)
    expected = F.gelu(
        F.batch_norm(held, mean, variance, layer.scale[3], layer.shift[3], training=True)
    )
    assert_close((found[0, 1], found[0, 3], found[1, 2], found[1, 3]), tuple(expected), 1e-5)
    assert_close((layer.mean[3], layer.variance[3]), (mean, variance), 1e-5)
    assert not layer.mean[2].any()


def test_the_class_token_has_no_regions_and_tokens_do() -> None:
    model, attachment = adapted(classes=None)
    layer = attachment.layers["0/vision.layers[0]:out"]
    seen: list[Any] = []
    block = model.layers[0]
    block.register_forward_hook(lambda module, args, output: seen.append(output))
    run(model)
    with torch.no_grad():
        layer.share_of_views = 0.0
    run(model)
    assert torch.equal(seen[0][:, 0], seen[1][:, 0])
    assert differ((seen[0][:, 1:],), (seen[1][:, 1:],))


def test_the_backbones_own_positions_are_used() -> None:
    model, _ = adapted(classes=None)
    before = run_tokens(model)
    with torch.no_grad():
        model.embeddings.position_embeddings[:, 1:] += 1.0
    assert differ((run_tokens(model),), (before,))


def run_tokens(model: Any) -> Tensor:
    with torch.no_grad():
        return model(**clouds(2)).last_hidden_state


@pytest.mark.parametrize("name", ["hf_vit", "hf_dinov2"])
def test_clouds_give_classes_or_tokens(name: str) -> None:
    assert run(adapted(name)[0]).shape == (3, 5)
    model, attachment = adapted(name, classes=None)
    assert run_tokens(model).shape == (2, 9, 16)
    assert not any("model" in key for key in attachment.layers)


def test_the_order_of_points_behind_the_first_means_nothing() -> None:
    model, _ = adapted()
    points = clouds(3)["pixel_values"]
    shuffled = torch.cat([points[:, :1], points[:, 1:].flip(1)], 1)
    assert_close((run(model, shuffled),), (run(model, points),), 1e-4)
    assert differ((run(model, points.roll(1, -1)),), (run(model, points),))


def test_batch_norms_learn_while_training_and_are_saved(tmp_path: Any) -> None:
    model, attachment = adapted()
    before = run(model)
    mm.fit(
        model,
        (clouds(8)["pixel_values"], torch.arange(8) % 5),
        loss=lambda model, batch: F.cross_entropy(model(pixel_values=batch[0]), batch[1]),
        steps=3,
        batch_size=4,
        progress=False,
    )
    layer = attachment.layers["0/vision.embeddings:around"]
    assert layer.stem_mean.abs().max() > 0
    after = run(model)
    assert differ((after,), (before,))
    mm.save(model, tmp_path)
    other: Any = BACKBONES["hf_vit"].fresh()
    mm.load_adapter(other, tmp_path)
    assert torch.equal(run(other), after)


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (torch.zeros(3, 3, 16, 16), r"expected clouds of points \(B, N, 3\)"),
        (torch.zeros(3, 20, 3), "clouds of 20 points"),
        (torch.full((3, 40, 3), 9.0), "within the unit ball"),
        (torch.full((3, 40, 3), torch.nan), "within the unit ball"),
    ],
)
def test_inputs_that_make_no_sense_are_refused(points: Tensor, message: str) -> None:
    model, _ = adapted()
    with pytest.raises(mm.errors.DataError, match=message):
        run(model, points)


def test_what_does_not_fit_is_refused() -> None:
    for name in ("hf_sam", "hf_dinov2_registers", "timm_vit", "hf_vit_classifier"):
        model = BACKBONES[name].fresh()
        before = state(model)
        with pytest.raises(mm.errors.SiteError):
            mm.attach(model, mm.Any2Point())
        assert state(model) == before
    with pytest.raises(mm.errors.AdapterError, match="expected a divisor of view_width"):
        mm.Any2Point(view_heads=5)
    with pytest.raises(mm.errors.AdapterError, match="compute only together"):
        mm.Any2Point(at="vision.layers[*]")
    model, _ = adapted()
    with pytest.raises(mm.errors.CheckError, match="did not begin with points"):
        model.layers[0](torch.zeros(1, 9, 16))
