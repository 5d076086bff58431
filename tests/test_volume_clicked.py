"""A SAM for volumes: clicked in windows, trained on simulated clicks, refused where that has no meaning."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from backbones import BACKBONES
from snapshot import randomise
from torch import Tensor, nn
from volumes import ball

import mmadapt as mm
from mmadapt.tasks import segment
from mmadapt.tasks import volume as volumes
from mmadapt.tasks.volume import Volume, VolumeLoss, VolumeSegmenter
from mmadapt.tasks.volume.clicked import ClickedVolumes, normalised

Refused = mm.errors.DataError
TINY: dict[str, Any] = {"zoom": 2, "window": 4, "planes": 4, "queries": 3, "heads": 2}
SIZE = (12, 16, 16)


def bodies(count: int, seed: int, size: tuple[int, ...] = SIZE) -> tuple[Tensor, Tensor]:
    """Noisy volumes (N, 1, D, H, W) of 0 to 1 with one bright and one dark ball each; masks of the bright."""
    draw, values, masks = numpy.random.RandomState(seed), [], []
    for _ in range(count):
        radii = 3 + 1.5 * draw.rand(2)
        low, high = 3 + 1.5 * draw.rand(), size[2] - 4.5 - 1.5 * draw.rand()
        at = [(size[0] * (0.35 + 0.3 * draw.rand()), size[1] * (0.35 + 0.3 * draw.rand()), x) for x in draw.permutation([low, high])]  # fmt: skip
        one, other = (ball(size, middle, (r, r, r)) for middle, r in zip(at, radii, strict=True))
        values.append((0.5 + 0.25 * one - 0.25 * other + 0.05 * draw.randn(*size)).clip(0, 1))
        masks.append(one & ~other)
    return torch.from_numpy(numpy.stack(values)).float()[:, None], torch.from_numpy(
        numpy.stack(masks)
    )


def adapted(name: str = "hf_sam", amount: float = 0.1, **changes: Any) -> Any:
    model: Any = BACKBONES[name].fresh()
    attachment = mm.attach(model, mm.ThreeDSAM(**{**TINY, **changes}), seed=3)
    if amount:
        randomise(attachment, amount)
    return model


def as_volume(values: Tensor, **more: Any) -> Volume:
    return Volume(values[0].numpy(), numpy.diag([1, 1, 1.5, 1.0]), **more)


@pytest.fixture(scope="module")
def trained() -> Any:
    """A tiny SAM that has learned, from clicks, to tell the bright ball from the dark one."""
    model = adapted(amount=0.0)
    mm.fit(
        model,
        bodies(12, 1),
        loss=VolumeLoss(clicks=1, rounds=1),
        steps=40,
        batch_size=3,
        lr=5e-3,
        progress=False,
    )
    return model


# -- training ------------------------------------------------------------------------------------------


def held_out(model: Any, clicks: int = 1) -> float:
    found = []
    for values, mask in zip(*bodies(6, 2), strict=True):
        study = VolumeSegmenter(model, as_volume(values), SIZE)
        points, labels = volumes.from_mask(mask.numpy(), clicks, "iterative")
        for click in zip(points, labels, strict=True):
            study.click(*click)
        found.append(segment.dice(study.mask, mask.numpy()))
    return float(numpy.mean(found))


def test_volumes_never_trained_on_are_found_after_training(trained: Any) -> None:
    assert held_out(adapted(amount=0.0)) < 0.4
    assert held_out(trained) > 0.75


def test_the_backbone_is_what_it_was(trained: Any) -> None:
    image = numpy.zeros((12, 12, 3), numpy.uint8)
    with mm.disabled(trained):
        own = segment.Segmenter(trained).encode(image).embedding
    bare = segment.Segmenter(BACKBONES["hf_sam"].fresh()).encode(image).embedding
    assert torch.equal(own, bare)


@pytest.mark.slow
def test_a_pretrained_sam_learns_bodies_in_speckle(tmp_path: Path) -> None:
    """`tiny/sam` on the study's volumes at half their resolution; loaded elsewhere it does the same."""
    from mmadapt.tasks.segment import organs

    def halved(count: int, seed: int) -> tuple[Tensor, Tensor]:
        slices, masks, _ = organs.volumes(count, seed=seed)
        pool = nn.functional.avg_pool2d
        return pool(torch.from_numpy(slices) / 255, 2)[:, None], pool(torch.from_numpy(masks).float(), 2) > 0.5  # fmt: skip

    values, masks = halved(24, 1)
    flips: Any = ((), (-1,), (-2,), (-1, -2))
    sam = mm.load("tiny/sam")
    mm.attach(sam, mm.ThreeDSAM(zoom=2, window=4, planes=3, heads=4), name="bodies", seed=1)
    tests, truths = halved(8, 2)

    def answers(m: Any) -> list[numpy.ndarray]:
        found = []
        for own, truth in zip(tests, truths, strict=True):
            study = VolumeSegmenter(m, as_volume(own), (12, 32, 32))
            found.append(study.click(volumes.from_mask(truth.numpy(), 1, seed=3)[0][0]))
        return found

    def dice(found: list[numpy.ndarray]) -> float:
        pairs = zip(found, truths.numpy(), strict=True)
        return float(numpy.mean([segment.dice(*pair) for pair in pairs]))

    before = dice(answers(sam))
    mm.fit(
        sam,
        (torch.cat([values.flip(f) for f in flips]), torch.cat([masks.flip(f) for f in flips])),
        loss=VolumeLoss(),
        steps=60,
        batch_size=2,
        lr=2e-3,
        seed=1,
        progress=False,
    )
    after = answers(sam)
    assert before < 0.4
    assert dice(after) > 0.6
    mm.save(sam, tmp_path / "bodies")
    other = mm.load("tiny/sam")
    mm.load_adapter(other, tmp_path / "bodies")
    assert all(numpy.array_equal(*pair) for pair in zip(answers(other), after, strict=True))


@pytest.mark.parametrize("name", ["hf_sam", "segment_anything"])
def test_every_tensor_learns_from_clicks(name: str) -> None:
    model = adapted(name)
    VolumeLoss(clicks=2, beside=2, rounds=2)(model, bodies(2, 0)).backward()
    (attachment,) = mm.attachments(model).values()
    still = [n for n, p in attachment.named_parameters() if p.grad is None or not p.grad.any()]
    # the last layer of clicks has nothing behind it that reads the clicks themselves
    assert all("prompt" in n for n in still), still


def test_clicks_are_drawn_where_they_should_be() -> None:
    seen: list[tuple[Tensor, Tensor]] = []
    model = adapted()
    _, masks = batch = bodies(2, 0)
    model.prompt_encoder.register_forward_pre_hook(lambda m, args: seen.append(args[1:3]))
    loss = VolumeLoss(clicks=3, beside=2, rounds=2, seed=4)
    first = loss(model, batch)
    (points, labels), (more, kinds) = seen
    assert labels.tolist() == [[1, 1, 1, 0, 0]] * 2
    for own, row, kind in zip(masks, points.long(), labels, strict=True):
        assert own[tuple(row.T)].long().tolist() == kind.tolist()
    assert torch.equal(more[:, :5], points) and more.shape == (2, 6, 3)
    for own, row, kind in zip(masks, more[:, 5].long(), kinds[:, 5], strict=True):
        assert int(own[tuple(row)]) == int(kind)  # what it is, where the answer was wrong
    seen.clear()
    again = VolumeLoss(clicks=3, beside=2, rounds=2, seed=4)(model, batch)
    assert torch.equal(first, again)
    seen.clear()
    VolumeLoss(clicks=2)(model, (batch[0], torch.zeros_like(masks)))
    assert seen[0][1].tolist() == [[0, 0]] * 2  # nothing is there


def test_without_prompts_several_classes_are_learned() -> None:
    values, _ = bodies(4, 3)
    masks = (values[:, 0] > 0.65).long() + 2 * (values[:, 0] < 0.35).long()
    model = adapted(amount=0.0, prompts=False, classes=3)
    history = mm.fit(
        model, (values, masks), loss=VolumeLoss(), steps=25, batch_size=2, lr=5e-3, progress=False
    )
    assert history.losses[-1] < 0.6 * history.losses[0]
    study = VolumeSegmenter(model, as_volume(values[0]), SIZE)
    labels = study.whole()
    assert labels.dtype == numpy.uint8 and set(numpy.unique(labels)) == {0, 1, 2}
    with pytest.raises(Refused, match="made without prompts"):
        study.click((4, 4, 4))
    with pytest.raises(Refused, match=r"whole numbers from 0 to 2") as caught:
        VolumeLoss()(model, (values, masks + 1))
    assert "classes=4" in caught.value.hint


def test_the_loss_of_classes_by_hand() -> None:
    from mmadapt.tasks.volume.loss import class_loss

    truth = torch.zeros(1, 2, 2, 2, dtype=torch.long)
    truth[0, 0] = 1
    # at zero logits p is 1/3: class 1 has 2·4/3 of 8/9 + 4, class 2 nothing of 8/9
    expected = math.log(3) + (1 - (8 / 3) / (8 / 9 + 4) + 1) / 2
    assert class_loss(torch.zeros(1, 3, 2, 2, 2), truth).item() == pytest.approx(expected, abs=1e-4)
    certain = 50.0 * torch.nn.functional.one_hot(truth, 3).movedim(-1, 1)
    certain_loss = class_loss(certain, truth)  # the class that is nowhere counts as found
    assert certain_loss.item() < 1e-4


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((torch.zeros(2, 12, 16, 16), torch.zeros(2, 12, 16, 16)), r"expected \(B, 1, D, H, W\)"),
        ((torch.zeros(2, 1, 12, 16, 16), torch.zeros(2, 12, 16, 8)), r"expected \(B, 1, D, H, W\)"),
        (
            (torch.full((1, 1, 12, 16, 16), 7.0), torch.zeros(1, 12, 16, 16)),
            "from 7 to 7, expected 0",
        ),
        ((torch.full((1, 1, 12, 16, 16), math.nan), torch.zeros(1, 12, 16, 16)), "from nan to nan"),
        ((torch.zeros(1, 1, 12, 16, 16), torch.full((1, 12, 16, 16), 2.0)), "expected 0 and 1"),
    ],
)
def test_a_batch_without_a_meaning_is_refused(batch: Any, message: str) -> None:
    with pytest.raises(Refused, match=message):
        VolumeLoss()(adapted(), batch)


@pytest.mark.parametrize("wrong", [{"clicks": 0}, {"beside": -1}, {"rounds": 1.5}])
def test_settings_without_a_meaning_are_refused(wrong: dict) -> None:
    with pytest.raises(Refused, match=f"{next(iter(wrong))} is"):
        VolumeLoss(**wrong)


# -- clicking -------------------------------------------------------------------------------------------


def wide() -> Volume:
    return Volume(
        bodies(1, 5, (24, 20, 28))[0][0].numpy(), numpy.diag([-1, 1, 2, 1.0]), name="wide"
    )


def test_a_window_is_encoded_once() -> None:
    model = adapted()
    runs: list[int] = []
    model.vision_encoder.register_forward_hook(lambda *call: runs.append(1))
    study = VolumeSegmenter(model, wide(), (8, 8, 8))
    first = study.click((10, 10, 9))
    study.click((12, 9, 10))  # well inside of the same window
    second = study.click((8, 12, 9), 0)
    assert len(runs) == 1 and study.labels == [1, 1, 0]
    assert not numpy.array_equal(first, second)
    study.click((20, 5, 20))
    assert len(runs) == 2
    # the same as all at once, without memory
    logits = volumes.predict_at(
        wide(), ClickedVolumes(model), (8, 8, 8), study.points, study.labels
    )
    assert numpy.array_equal(logits[0] > 0, study.mask)
    study.forget()
    assert not study.mask.any() and study.points == []


def test_clicks_in_a_volume_are_taken_back_and_asked_anew() -> None:
    study = VolumeSegmenter(adapted(), wide(), (8, 8, 8))
    first = study.click((10, 10, 9)).copy()
    study.click((8, 12, 9), 0)
    study.ask()
    assert study.points == [] and not study.mask.any()
    study.undo()
    assert study.points == [(10, 10, 9), (8, 12, 9)] and study.labels == [1, 0]
    study.undo()
    assert study.points == [(10, 10, 9)] and numpy.array_equal(study.mask, first)
    with pytest.raises(Refused, match="outside of an image"):
        study.ask([(10, 10, 9), (99, 9, 9)])
    assert study.points == [(10, 10, 9)] and numpy.array_equal(study.mask, first)
    study.undo()
    study.undo()  # nothing is left
    assert study.points == [] and not study.mask.any()


def test_it_answers_as_the_model_does() -> None:
    model = adapted()
    values, _ = bodies(1, 6)
    study = VolumeSegmenter(model, as_volume(values[0]), SIZE)
    study.click((5, 6, 7))
    with torch.no_grad():
        logits = model(
            pixel_values=normalised(model, values),
            input_points=torch.tensor([[[5.0, 6, 7]]]),
            input_labels=torch.ones(1, 1, dtype=torch.long),
        )
    assert numpy.array_equal(study.mask, (logits[0, 1] > logits[0, 0]).numpy())
    pixels = normalised(model, values)
    grey = (255 * values - 116.28) / 57.12  # of green, the middle one of SAM's three
    assert (pixels - grey).abs().max() < 0.1


def test_switching_or_training_is_seen() -> None:
    model = adapted()
    network = ClickedVolumes(model)
    given = torch.rand(1, 1, 8, 8, 8), torch.ones(1, 1, 3), torch.ones(1, 1, dtype=torch.long)
    before = network(*given)
    mm.attach(model, mm.ThreeDSAM(**TINY), name="other", seed=9)
    assert not torch.equal(network(*given), before)
    mm.set_active(model, "default")
    assert torch.equal(network(*given), before)
    randomise(mm.attachments(model)["default"], 0.3)
    network.forget()
    assert not torch.equal(network(*given), before)
    with mm.disabled(model), pytest.raises(mm.errors.BackboneError, match="no ThreeDSAM acts"):
        network(*given)


def test_clicks_are_in_the_original_and_so_is_the_answer(trained: Any, tmp_path: Path) -> None:
    import nibabel

    values, masks = bodies(1, 7)
    scan = as_volume(values[0], name="scan")
    straight = VolumeSegmenter(trained, scan, SIZE)
    point = volumes.from_mask(masks[0].numpy(), 1, "iterative")[0][0]
    straight.click(point)
    padded = scan.pad((16, 16, 20), 0.5).crop((0, 0, 0, 16, 16, 20))
    wider = VolumeSegmenter(trained, padded, (16, 16, 20))
    wider.click(point)
    assert segment.dice(wider.on_original(), masks[0].numpy()) > 0.5
    path = volumes.save_mask(tmp_path / "mask.nii.gz", straight.mask, straight.volume)
    assert numpy.array_equal(volumes.read_mask(path, like=scan), straight.mask)
    assert numpy.array_equal(nibabel.load(str(path)).affine, scan.affine)


def test_the_adapter_says_what_window_it_wants() -> None:
    model = adapted()
    raw = Volume(1000 * wide().array - 500, wide().affine, name="ct")
    segment.set_input(model, window="ct kidney")
    study = VolumeSegmenter(model, raw, (8, 8, 8))
    expected = VolumeSegmenter(model, raw.window("ct kidney"), (8, 8, 8))
    assert numpy.array_equal(study.click((10, 10, 9)), expected.click((10, 10, 9)))
    with pytest.raises(Refused, match="trained with 'ct kidney'"):
        VolumeSegmenter(model, raw.window("ct lung"), (8, 8, 8))
    segment.set_input(model, normalise="0-1")
    values = torch.rand(1, 1, 4, 4, 4)
    assert torch.equal(normalised(model, values), values)


@pytest.mark.parametrize("prompts", [True, False])
def test_a_whole_volume_needs_no_clicks_where_the_adapter_has_none(prompts: bool) -> None:
    from monai.inferers import sliding_window_inference

    model = adapted(prompts=prompts)
    study = VolumeSegmenter(model, wide(), (8, 8, 12))
    if prompts:
        with pytest.raises(Refused, match="a window without a click has no meaning") as caught:
            study.whole()
        assert "prompts=False" in caught.value.hint
        return
    found = study.whole(overlap=0.25, batch_size=2)
    with torch.no_grad():
        values = normalised(model, torch.from_numpy(wide().array)[None])
        theirs = sliding_window_inference(values, (8, 8, 12), 2, model, 0.25, mode="gaussian")
    assert (found == (theirs[0].argmax(0) > 0).numpy()).mean() > 0.999
    assert 0 < found.mean() < 1


def test_what_cannot_be_clicked_is_refused() -> None:
    model = adapted()
    study = VolumeSegmenter(model, wide(), (8, 8, 8))
    with pytest.raises(Refused, match="no click is on the object"):
        study.click((10, 10, 9), 0)
    with pytest.raises(Refused, match="outside of an image"):
        study.click((10, 10, 90))
    assert study.points == []  # what was refused is not kept
    with pytest.raises(Refused, match="takes clicks alone") as caught:
        study.box((0, 0, 0, 4, 4, 4))
    assert "SliceSegmenter" in caught.value.hint
    with pytest.raises(Refused, match="does not divide into tokens of 2"):
        VolumeSegmenter(model, wide(), (8, 8, 9)).click((10, 10, 9))
    raw = Volume(300 * wide().array, wide().affine)
    with pytest.raises(Refused, match="expected 0 to 1"):
        VolumeSegmenter(model, raw, (8, 8, 8)).click((10, 10, 9))
    with pytest.raises(Refused, match="2 channels"):
        VolumeSegmenter(model, Volume(numpy.zeros((2, 8, 8, 8)), numpy.eye(4)), (8, 8, 8))
    with pytest.raises(Refused, match="5 voxels thick along z, the window 16"):
        VolumeSegmenter(model, wide().crop((0, 0, 0, 5, 20, 28)), (16, 16, 16))
    three = adapted(classes=3)
    with pytest.raises(Refused, match="tells 3 classes apart, and a click means one object"):
        VolumeSegmenter(three, wide(), (8, 8, 8)).click((10, 10, 9))
    for other in (BACKBONES["hf_sam"].fresh(), BACKBONES["hf_vit"].fresh()):
        with pytest.raises(mm.errors.BackboneError, match="no ThreeDSAM acts in this"):
            VolumeSegmenter(other, wide(), (8, 8, 8))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_voxels_that_are_no_numbers_never_reach_the_network(value: float) -> None:
    values = torch.rand(2, 1, 8, 8, 8)
    values[1, 0, 2, 3, 4] = values[1, 0, 7, 7, 7] = value
    model = adapted()
    with pytest.raises(Refused, match=re.escape("the first at (1, 0, 2, 3, 4)")) as caught:
        model(
            pixel_values=values,
            input_points=torch.ones(2, 1, 3),
            input_labels=torch.ones(2, 1, dtype=torch.long),
        )
    assert (
        caught.value.message.startswith("2 of 1024 voxels are not finite")
        and "nan=0.0" in caught.value.hint
    )
    large = torch.full((1, 1, 8, 8, 8), 3e38)  # whose sum is infinite, and which is finite itself
    model(
        pixel_values=large,
        input_points=torch.ones(1, 1, 3),
        input_labels=torch.ones(1, 1, dtype=torch.long),
    )


# -- boxes and earlier answers, for networks that take them --------------------------------------------


class Boxed(nn.Module):
    """1 inside of the box and 0 beside it, plus an earlier answer."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, ...]] = []

    def forward(self, cut: Tensor, points: Tensor, labels: Tensor, box: Tensor, mask: Any = None) -> Tensor:  # fmt: skip
        self.seen.append(tuple(points.shape))
        found = torch.zeros_like(cut)
        z1, y1, x1, z2, y2, x2 = box[0].round().long().tolist()
        found[:, :, z1:z2, y1:y2, x1:x2] = 1
        return found if mask is None else found + mask


def test_windows_cover_a_box_and_are_told_it() -> None:
    volume, box = wide(), (2, 3, 4, 18, 9, 20)
    expected = numpy.zeros(volume.size, numpy.float32)
    expected[2:18, 3:9, 4:20] = 1
    network = Boxed()
    logits = volumes.predict_at(volume, network, (8, 8, 8), box=box)[0]
    inside = logits > volumes.OUTSIDE
    assert (inside | (expected == 0)).all()
    assert numpy.array_equal(logits[inside], expected[inside])
    assert set(network.seen) == {(1, 0, 3)} and len(network.seen) == 4
    turned = volume.oriented("RAS").resample((2, 1, 1))
    back = turned.back(volumes.predict_at(turned, network, (24, 20, 28), box=box)[0])
    assert numpy.array_equal(back > 0.5, expected > 0)
    earlier = numpy.random.RandomState(0).randn(*volume.size).astype(numpy.float32)
    whole = volumes.predict_at(volume, network, volume.size, box=box, mask=earlier[None])[0]
    assert numpy.allclose(whole, expected + earlier, atol=1e-6)


def test_prompts_that_a_network_does_not_take_are_refused() -> None:
    volume, box = wide(), (2, 3, 4, 18, 9, 20)
    network = ClickedVolumes(adapted())
    with pytest.raises(Refused, match="a box was given, and this network takes clicks alone"):
        volumes.predict_at(volume, network, (8, 8, 8), box=box)
    with pytest.raises(Refused, match="a mask was given"):
        volumes.predict_at(volume, network, (8, 8, 8), [(4, 4, 4)], [1], mask=volume.array)
    with pytest.raises(Refused, match="there is no prompt"):
        volumes.predict_at(volume, network, (8, 8, 8))
    for wrong in (numpy.zeros((4, 4, 4), numpy.float32), numpy.zeros(volume.size, bool)):
        with pytest.raises(Refused, match="expected logits, floats of"):
            volumes.predict_at(volume, Boxed(), (8, 8, 8), box=box, mask=wrong)
    part = volume.crop((0, 0, 0, 24, 20, 3))
    with pytest.raises(Refused, match="outside of the part that was kept"):
        volumes.predict_at(part, Boxed(), (8, 8, 3), box=box)
