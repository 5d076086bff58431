"""Any2Point: its published size, its geometry by brute force, and what holds for clouds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backbones import BACKBONES, CLOUDS, cloud
from snapshot import assert_close, differ, randomise, state
from torch import Tensor
from torch.nn import functional as F

import mmadapt as mm
from mmadapt.ops.points import (
    along_line,
    farthest_points,
    first_of,
    neighbours,
    pick,
    positions_at,
    projected,
    region_max,
    region_mean,
    rows_at,
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
        return model(pixel_values=cloud(3) if points is None else points)


#: of every host of clouds: its tower, and the place of the class token
TOWERS = {
    "hf_vit_points": ("vision", 0),
    "hf_dinov2_points": ("vision", 0),
    "hf_ast_points": ("audio", 0),
    "hf_clip_text_points": ("text", -1),
    "hf_bert_points": ("text", 0),
}
every_tower = pytest.mark.parametrize("name", TOWERS)


def on_tower(name: str, amount: float = 0.1, **changes: Any) -> tuple[Any, Any]:
    model: Any = CLOUDS[name].fresh()
    wanted = {"classes": 5, "tower": TOWERS[name][0], "voxel": 0.5, **TINY, **changes}
    attachment = mm.attach(model, mm.Any2Point(**wanted))
    return model, randomise(attachment, amount) if amount else attachment


def given(model: Any, points: Tensor) -> Any:
    with torch.no_grad():
        return model(**{model.main_input_name: points})


# -- size -----------------------------------------------------------------------------------------


def test_the_published_size() -> None:
    from transformers import Dinov2Config, Dinov2Model

    with torch.device("meta"):
        model = Dinov2Model(Dinov2Config(image_size=518, patch_size=14))
    found = {row["site"]: row["parameters"] for row in mm.plan(model, mm.Any2Point()).records()}
    assert found["vision.embeddings:around"] == 276_672 + 2 * 768
    assert sum(found.values()) == 800_760


@pytest.mark.parametrize(("tower", "width", "told"), [("audio", 12, "0.8"), ("text", 16, "0.9")])
def test_the_sizes_told_of_audio_and_text(tower: str, width: int, told: str) -> None:
    """As the vision's exact count with another bottleneck; published to one place, cut off."""
    from transformers import ASTConfig, ASTModel, CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        audio = ASTModel(ASTConfig(max_length=204))  # 12 bands of 19 patches
        text = CLIPTextModel(CLIPTextConfig(hidden_size=768, num_attention_heads=12))
    model = {"audio": audio, "text": text}[tower]
    rows = mm.plan(model, mm.Any2Point(tower=tower)).records()
    count = sum(row["parameters"] for row in rows)
    assert count == 800_760 + 12 * (width - 8) * (2 * 768 + 1)
    assert f"{count / 1e6:.4f}"[:3] == told
    if tower == "audio":
        assert audio.embeddings.position_embeddings.shape[1] == 2 + 228


# -- geometry ---------------------------------------------------------------------------------------


def test_farthest_points_by_brute_force() -> None:
    points = torch.randn(2, 30, 3)
    for points_of, found in zip(points, farthest_points(points, 7).tolist(), strict=True):
        chosen = [0]
        while len(chosen) < 7:
            apart = torch.cdist(points_of, points_of[chosen]).amin(1)
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


def test_a_line_reaches_from_the_first_point_along_it_to_the_last() -> None:
    points = torch.randn(2, 9, 3, dtype=torch.float64)
    found = along_line(points, (-1.0, 0.0, 2.0), 12)
    assert found.shape == (2, 6, 9)
    for view, rotation in enumerate(views(torch.float64)):
        for one in range(2):
            turned = points[one] @ rotation
            far = turned @ torch.tensor([-1.0, 0.0, 2.0]).double()
            expected = 11 * (far - far.min()) / (far.max() - far.min())
            assert torch.allclose(found[one, view], expected)
    assert torch.equal(along_line(torch.zeros(1, 3, 3), (0, 0, 1), 5), torch.zeros(1, 6, 3))


def test_a_view_turns_a_line_as_it_turns_an_image() -> None:
    """The third axis of a view is what its image looks along."""
    points = torch.randn(1, 9, 3)
    deep = torch.einsum("btc,vcd->bvtd", points, views())[..., 2]
    found = along_line(points, (0.0, 0.0, 1.0), 9)
    for view in range(6):
        assert torch.equal(found[0, view].argsort(), deep[0, view].argsort())


def test_words_positions_are_read_between_rows_and_on_them() -> None:
    table = torch.randn(4, 5)
    found = rows_at(table, torch.tensor([[0.0, 1.0, 3.0], [2.25, 0.5, 2.0]]))
    assert torch.equal(found[0], table[[0, 1, 3]])  # whole places are no zeros
    assert torch.allclose(found[1, 0], 0.75 * table[2] + 0.25 * table[3])
    assert torch.allclose(found[1, 1], (table[0] + table[1]) / 2)
    assert torch.equal(found[1, 2], table[2])
    assert torch.equal(rows_at(table[:1], torch.zeros(2)), table[[0, 0]])


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
        found = layer._regions(x.expand(2, -1, -1, -1), first.expand(2, -1, -1), slice(3, 5))
        assert differ((found[0],), (found[1],))
        found = found[0]
    expected = F.gelu(
        F.batch_norm(held, mean, variance, layer.scale[3], layer.shift[3], training=True)
    )
    assert_close((found[0, 1], found[0, 3], found[1, 2], found[1, 3]), tuple(expected), 1e-5)
    assert_close((layer.mean[3], layer.variance[3]), (mean, variance), 1e-5)
    assert not layer.mean[2].any()


@every_tower
def test_the_class_token_has_no_regions_and_tokens_do(name: str) -> None:
    tower, place = TOWERS[name]
    model, attachment = on_tower(name)
    layer = attachment.layers[f"0/{tower}.layers[0]:out"]
    seen: list[Any] = []
    blocks: Any = next(part for part in model.modules() if isinstance(part, torch.nn.ModuleList))
    blocks[0].register_forward_hook(
        lambda module, args, output: seen.append(
            output if isinstance(output, Tensor) else output[0]
        )
    )
    given(model, cloud(3))
    layer.share_of_views = 0.0
    given(model, cloud(3))
    one, other = seen
    assert torch.equal(one[:, place], other[:, place])
    changed = (one - other).abs().amax((0, 2)) > 0
    assert changed.sum() == changed.numel() - 1


def test_the_backbones_own_positions_are_used() -> None:
    model, _ = adapted(classes=None)
    before = run_tokens(model)
    with torch.no_grad():
        model.embeddings.position_embeddings[:, 1:] += 1.0
    assert differ((run_tokens(model),), (before,))


def run_tokens(model: Any) -> Tensor:
    with torch.no_grad():
        return model(cloud(2)).last_hidden_state


@every_tower
def test_clouds_give_classes_or_tokens(name: str) -> None:
    model, _ = on_tower(name)
    assert given(model, cloud(3)).shape == (3, 5)
    model, _ = on_tower(name, classes=None)
    found = given(model, cloud(2))
    assert found.last_hidden_state.shape == (2, 9, 16)
    if name == "hf_clip_text_points":  # it pools where a text ends: at the class token
        assert torch.equal(found.pooler_output, found.last_hidden_state[:, -1])


def test_clips_text_tower_alone_has_the_roles_of_the_whole() -> None:
    whole: Any = BACKBONES["hf_clip"].fresh()
    model: Any = CLOUDS["hf_clip_text_points"].fresh()
    q = "text.layers[*].attn.q"
    named = {str(row["site"]) for row in mm.plan(whole, mm.LoRA(2), at=q).records()}
    assert named == {str(r["site"]) for r in mm.plan(model, mm.LoRA(2), at=q).records()}
    attachment = randomise(mm.attach(model, mm.LoRA(2), at=q))
    ids = torch.tensor([[3, 4, 31], [5, 31, 0]])
    adapted = model(input_ids=ids).last_hidden_state
    attachment.detach()
    assert differ((adapted,), (model(input_ids=ids).last_hidden_state,))


@every_tower
def test_more_tokens_than_positions_are_no_more_than_places_between_them(name: str) -> None:
    model, _ = on_tower(name, classes=None, tokens=10)
    assert given(model, cloud(2)).last_hidden_state.shape == (2, 11, 16)


@every_tower
def test_a_cloud_means_the_same_alone_and_every_time(name: str) -> None:
    """Neither ranges nor centres come from batch mates or from chance."""
    model, _ = on_tower(name)
    points = cloud(3)
    points[1] *= 0.3
    together = given(model, points)
    assert torch.equal(given(model, points), together)
    for row in range(3):
        assert_close((given(model, points[row : row + 1]),), (together[row : row + 1],), 1e-5)


@every_tower
def test_a_half_precision_backbone_takes_clouds_of_full_precision(name: str) -> None:
    model = CLOUDS[name].fresh().bfloat16()
    attachment = mm.attach(model, mm.Any2Point(5, TOWERS[name][0], **{**TINY, "voxel": 0.5}))
    assert {p.dtype for p in attachment.parameters()} == {torch.float32}
    found = given(model, cloud(3))
    assert found.isfinite().all()
    assert differ((found[0],), (found[1],))


@pytest.mark.parametrize("name", ["hf_clip_text_points", "hf_bert_points"])
def test_the_positions_of_words_are_used(name: str) -> None:
    model, _ = on_tower(name)
    before = given(model, cloud(3))
    table = next(p for n, p in model.named_parameters() if "position_embedding" in n)
    with torch.no_grad():
        table[1:] += torch.randn(table[1:].shape)
    assert differ((given(model, cloud(3)),), (before,))


def test_a_frozen_norm_behind_words_and_positions_is_passed() -> None:
    model, _ = on_tower("hf_bert_points")
    before = given(model, cloud(3))
    with torch.no_grad():
        model.embeddings.LayerNorm.weight[:8] *= 3.0
    assert differ((given(model, cloud(3)),), (before,))


def test_the_class_token_of_a_causal_tower_sees_the_whole_cloud() -> None:
    model, _ = on_tower("hf_clip_text_points", classes=None)
    points = cloud(2)
    before = given(model, points).pooler_output
    points[0, 30:] = points[0, 30:].flip(-1)
    after = given(model, points).pooler_output
    assert differ((after[0],), (before[0],))
    assert_close((after[1],), (before[1],), 1e-6)


def test_the_order_of_points_behind_the_first_means_nothing() -> None:
    model, _ = adapted()
    points = cloud(3)
    shuffled = torch.cat([points[:, :1], points[:, 1:].flip(1)], 1)
    assert_close((run(model, shuffled),), (run(model, points),), 1e-4)
    assert differ((run(model, points.roll(1, -1)),), (run(model, points),))


def test_batch_norms_learn_while_training_and_are_saved(tmp_path: Any) -> None:
    model, attachment = adapted()
    before = run(model)
    mm.fit(
        model,
        (cloud(8), torch.arange(8) % 5),
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
        (torch.full((3, 40, 3), torch.nan), "360 coordinates are NaN or infinite"),
    ],
)
def test_inputs_that_make_no_sense_are_refused(points: Tensor, message: str) -> None:
    model, _ = adapted()
    with pytest.raises(mm.errors.DataError, match=message):
        run(model, points)


@every_tower
def test_every_tower_refuses_what_is_no_cloud(name: str) -> None:
    vision = TOWERS[name][0] == "vision"
    model, _ = on_tower(name)
    word = model.main_input_name
    for points, message in (
        (torch.zeros(2, 3, 16, 16), r"\(2, 3, 16, 16\), expected clouds of points \(B, N, 3\)"),
        (cloud(2)[0], r"\(40, 3\), expected clouds of points"),
        (cloud(2)[:, :20], "expected at least 32"),
        # a vision transformer makes floats of whole numbers itself
        (100 * cloud(2).round().long(), "unit ball|torch.int64" if vision else "torch.int64"),
    ):
        with pytest.raises(mm.errors.DataError, match=message):
            model(**{word: points})
    for value in (torch.nan, torch.inf):
        strange = cloud(2)
        strange[1, 7, 2] = value
        with pytest.raises(mm.errors.DataError, match=r"1 coordinates .* first at \(1, 7, 2\)"):
            model(**{word: strange})


def test_what_tells_of_words_is_refused_beside_a_cloud() -> None:
    model, _ = on_tower("hf_bert_points")
    with pytest.raises(mm.errors.DataError, match="attention_mask is given beside a cloud"):
        model(input_ids=cloud(2), attention_mask=torch.ones(2, 40))


def test_views_that_a_tower_does_not_have_are_refused() -> None:
    for changes, message in (
        ({"tower": "text", "distance": 1.8}, "distance is given.*are lines"),
        ({"direction": (1, 0, 0)}, "direction is given.*are images"),
        ({"tower": "text", "direction": (0, 0, 0)}, "three numbers, not all zero"),
        ({"tower": "text", "direction": (1, 0, float("nan"))}, "three numbers, not all zero"),
        ({"tower": "txt"}, "expected one of vision, audio, text"),
        ({"distance": 0.9}, "distance is 0.9"),
    ):
        with pytest.raises(mm.errors.AdapterError, match=message):
            mm.Any2Point(**changes)
    text = mm.Any2Point(tower="text", direction=(1, -1, 0))
    assert mm.adapter.from_json(text.to_json()) == text
    assert (text.width, text.voxel, text.share, text.distance) == (16, 0.08, 0.3, None)


def test_a_backbone_of_another_tower_is_refused_with_the_ones_that_fit() -> None:
    for name, tower in (("hf_bert_points", "vision"), ("hf_vit_points", "text")):
        with pytest.raises(mm.errors.SiteError, match='with tower="text" to a CLIPTextModel'):
            mm.attach(CLOUDS[name].fresh(), mm.Any2Point(5, tower))
    with pytest.raises(mm.errors.SiteError):  # a front end makes its positions
        mm.attach(BACKBONES["hf_wav2vec2"].fresh(), mm.Any2Point(5, "audio"))


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
