"""Prediction in windows, around clicks, and slice by slice."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from backbones import BACKBONES
from torch import Tensor, nn
from volumes import ball, dicom, nifti, series

import mmadapt as mm
from mmadapt.tasks import segment
from mmadapt.tasks import volume as volumes
from mmadapt.tasks.volume import Volume

Refused = mm.errors.DataError


def network(channels: int = 1) -> nn.Module:
    """A random network of three dimensions whose answer depends on where the window ends."""
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Conv3d(1, 3, 3, padding=1), nn.Tanh(), nn.Conv3d(3, channels, 5, padding=2)
    ).eval()


def noise(size: tuple[int, int, int], spacing: tuple[float, ...] = (1, 1, 1)) -> Volume:
    values = numpy.random.RandomState(0).randn(*size)
    return Volume(values, numpy.diag([*spacing, 1.0]))


# -- windows over a whole volume -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "window", "overlap", "batch_size", "channels"),
    [
        ((20, 22, 24), (8, 10, 12), 0.5, 1, 1),
        ((20, 22, 24), (8, 10, 12), 0.25, 3, 2),
        ((20, 22, 24), (20, 10, 12), 0.0, 2, 1),
        ((20, 20, 5), (16, 16, 8), 0.5, 1, 1),  # thinner than the window
        ((9, 7, 30), (16, 13, 8), 0.6, 4, 3),
        ((8, 8, 8), (8, 8, 8), 0.5, 1, 1),
    ],
)
def test_windows_are_blended_as_monai_does(
    size: Any, window: Any, overlap: float, batch_size: int, channels: int
) -> None:
    from monai.inferers import sliding_window_inference

    volume, model = noise(size), network(channels)
    ours = volumes.predict_whole(volume, model, window, overlap, batch_size)
    with torch.no_grad():
        theirs = sliding_window_inference(
            torch.from_numpy(volume.array)[None],
            window,
            batch_size,
            model,
            overlap=overlap,
            mode="gaussian",
            padding_mode="replicate",
        )
    assert ours.shape == (channels, *size)
    assert numpy.abs(ours - theirs[0].numpy()).max() < 1e-5


def test_labels_go_into_a_file_on_the_original_grid(tmp_path: Path) -> None:
    """Read window by window from one file, written plane by plane into another."""
    path = nifti("anatomical.nii")
    stored = volumes.open_nifti(path).window(0, 20000)
    reads: list[tuple[int, ...]] = []

    class Watched:
        shape = stored.array.source.shape

        def __getitem__(self, key: Any) -> Any:
            found = stored.array.source[key]
            reads.append(found.shape[::-1])
            return found

    whole = volumes.read_nifti(path).window(0, 20000)
    logits = volumes.predict_whole(whole, network(), (8, 16, 16))
    source = volumes.open_nifti(path).array
    source.source = Watched()
    watched = Volume(source.windowed(0, 20000), stored.affine, name=stored.name)
    labels = volumes.create_mask(tmp_path / "mask.nii", watched)
    assert volumes.predict_whole(watched, network(), (8, 16, 16), out=labels) is labels
    labels.flush()
    saved = volumes.read_mask(tmp_path / "mask.nii", like=whole)
    assert numpy.array_equal(saved, logits[0] > 0)
    assert 0 < saved.mean() < 1
    assert set(reads) == {(8, 16, 16)}


def test_several_channels_become_the_largest_ones_label() -> None:
    volume = noise((9, 10, 11))
    labels = numpy.full(volume.size, 9, numpy.uint8)
    volumes.predict_whole(volume, network(4), (8, 8, 8), out=labels)
    logits = volumes.predict_whole(volume, network(4), (8, 8, 8))
    assert numpy.array_equal(labels, logits.argmax(0))


def test_a_network_of_monai_predicts_and_the_answer_goes_back(tmp_path: Path) -> None:
    from monai.networks.nets import BasicUNet

    torch.manual_seed(0)
    model = BasicUNet(3, 1, 2, features=(4, 4, 4, 4, 4, 4)).eval()
    volume = volumes.read_dicom(series(tmp_path / "ct", 12, SpacingBetweenSlices=2.5))
    work = volume.window(-100, 1200).resample(0.8)
    logits = volumes.predict_whole(work, model, (32, 16, 16), overlap=0.25)
    path = volumes.save_mask(tmp_path / "mask.nii.gz", logits.argmax(0), work)
    assert volumes.read_mask(path, like=volume).shape == volume.size


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": (8, 8)}, r"the window is \(8, 8\), expected \(d, h, w\)"),
        ({"window": (8, 8, 0)}, r"expected \(d, h, w\)"),
        ({"overlap": 1.0}, "overlap is 1.0, expected a share"),
        (
            {"out": numpy.zeros((9, 10, 11))},
            r"out is float64 \(9, 10, 11\), expected floats \(1, 9",
        ),
        ({"out": numpy.zeros((9, 10, 10), int)}, r"whole numbers \(9, 10, 11\) for labels"),
        ({"network": nn.Conv3d(1, 2, 3)}, r"answered \(1, 1, 8, 8, 8\) with \(1, 2, 6, 6, 6\)"),
    ],
)
def test_what_cannot_be_predicted_is_refused(options: dict, message: str) -> None:
    given = {"network": network(), "window": (8, 8, 8), **options}
    with pytest.raises(Refused, match=message):
        volumes.predict_whole(noise((9, 10, 11)), **given)


def test_a_thin_volume_is_not_made_thick() -> None:
    """Three slices of a real scan, and one of another, in a window of 16."""
    with pytest.raises(
        Refused, match="functional.nii is 3 voxels thick along z, the window 16"
    ) as error:
        volumes.predict_whole(
            volumes.read_nifti(nifti("functional.nii"), t=0), network(), (16, 16, 16)
        )
    assert "at least 8 voxels" in error.value.hint and "SliceSegmenter" in error.value.hint
    with pytest.raises(Refused, match="CT_small.dcm is 1 voxels thick"):
        volumes.predict_whole(volumes.read_dicom(dicom("CT_small.dcm")), network(), (16, 16, 16))


def test_very_long_voxels_are_resampled_first() -> None:
    scan = volumes.read_dicom(dicom("J2K_pixelrep_mismatch.dcm"))
    with pytest.raises(Refused, match="are 11.6 times as long as wide") as caught:
        volumes.predict_whole(scan, network(), (1, 64, 64))
    assert "volume.resample(0.431)" in caught.value.hint
    fine = noise((6, 12, 12), (1, 1, 7.9))
    assert volumes.predict_whole(fine, network(), (4, 8, 8)).shape == (1, 6, 12, 12)


# -- windows around clicks -------------------------------------------------------------------------


def near_the_clicks(cut: Tensor, points: Tensor, labels: Tensor) -> Tensor:
    """1 minus the distance to the nearest click on the object, and −50 at the others."""
    at = torch.stack(torch.meshgrid(*map(torch.arange, cut.shape[2:]), indexing="ij"), -1).float()
    away = (at[..., None, :] - points[0]).norm(dim=-1)
    found = 1 - away[..., labels[0] == 1].amin(-1)
    for point in points[0][labels[0] == 0].round().long().tolist():
        found[tuple(point)] = -50
    return found[None, None]


def test_windows_stand_around_clicks_and_see_them_in_their_own_voxels() -> None:
    volume = noise((20, 30, 40))
    points = [(10, 15, 20), (1, 2, 38), (10, 15, 17)]
    logits = volumes.predict_at(volume, near_the_clicks, (6, 8, 10), points, [1, 1, 0])
    assert logits.shape == (1, 20, 30, 40)
    for point in points[:2]:
        assert logits[(0, *point)] == pytest.approx(1)
    assert logits[0, 10, 15, 17] == pytest.approx(-50)
    seen = logits[0] > volumes.OUTSIDE
    expected = numpy.zeros(volume.size, bool)
    expected[7:13, 11:19, 15:25] = expected[0:6, 0:8, 30:40] = True
    assert numpy.array_equal(seen, expected)


def test_clicks_are_named_in_the_original_image() -> None:
    """Whatever was done to the volume since."""
    image = volumes.read_nifti(nifti("anatomical.nii")).window("mr")
    for work in (
        image.oriented("ASL").resample(1.0),
        image.crop((3, 5, 2, 22, 38, 30)),
        image.resample((2, 4, 3)).oriented("RAS"),
        image,
    ):
        logits = volumes.predict_at(work, near_the_clicks, (8, 8, 8), [(12, 20, 9)], [1])
        back = work.back(logits[0])
        back[back == 0] = volumes.OUTSIDE  # cropped away
        best = numpy.unravel_index(back.argmax(), back.shape)
        assert numpy.abs(numpy.array(best) - (12, 20, 9)).max() <= 1


def test_a_window_larger_than_the_volume_keeps_clicks_in_place() -> None:
    volume = noise((5, 9, 12))
    logits = volumes.predict_at(volume, near_the_clicks, (8, 12, 12), [(4, 0, 11)], [1])
    assert numpy.unravel_index(logits[0].argmax(), volume.size) == (4, 0, 11)
    assert (logits > volumes.OUTSIDE).all()


@pytest.mark.parametrize(
    ("points", "labels", "message"),
    [
        ([(1, 2)], [1], r"of shape \(1, 2\), expected \(N, 3\), each \(z, y, x\)"),
        (
            [(25, 3, 3)],
            [1],
            r"point 0 has \(z, y, x\) = \(25, 3, 3\), 16.5 mm outside of an image of",
        ),
        ([(5, 3, 3), (5, math.nan, 3)], [1, 1], r"point 1 has .* \(5, nan, 3\)"),
        ([(-2, 3, 3)], [1], "4.5 mm outside"),
        ([(35, 3, 3)], [1], r"here it looks like \(x, y, z\)"),
        ([(5, 3, 3)], [2], "label 2 means nothing"),
        ([(5, 3, 3)], [1, 0], r"labels are of shape \(2,\), expected \(1,\)"),
        ([(5, 3, 3)], None, "1 points have no labels"),
        ([(5, 3, 3)], [0], "no click is on the object"),
    ],
)
def test_clicks_without_a_meaning_are_refused(points: Any, labels: Any, message: str) -> None:
    volume = noise((20, 30, 40), (1, 1, 3))
    with pytest.raises(Refused, match=message):
        volumes.predict_at(volume, near_the_clicks, (6, 8, 10), points, labels)


def test_a_click_on_what_was_cropped_away_is_refused() -> None:
    part = noise((20, 30, 40)).crop((0, 0, 0, 10, 30, 40))
    with pytest.raises(Refused, match="outside of the part that was kept"):
        volumes.predict_at(part, near_the_clicks, (6, 8, 10), [(15, 3, 3)], [1])


def test_more_clicks_refine_the_answer() -> None:
    """Each click deep in the largest error: the answer grows into the object."""
    volume = noise((16, 24, 24))
    truth = ball(volume.size, (8, 12, 7), (4, 4, 4)) | ball(volume.size, (8, 12, 17), (4, 4, 4))

    def balls(cut: Tensor, points: Tensor, labels: Tensor) -> Tensor:
        return near_the_clicks(cut, points, labels) + 3

    points, labels = volumes.from_mask(truth, 1, "iterative")
    first = volumes.predict_at(volume, balls, (10, 10, 10), points, labels)[0] > 0
    assert segment.dice(first, truth) < 0.7
    click = volumes.next_click(first, truth)
    assert click is not None
    points, labels = [*points, click[0]], [*labels, click[1]]
    second = volumes.predict_at(volume, balls, (10, 10, 10), points, labels)[0] > 0
    assert numpy.array_equal(second, truth)
    assert volumes.next_click(second, truth) is None


# -- slice by slice --------------------------------------------------------------------------------

TRUTH = ball((14, 16, 16), (7, 8, 7), (4.5, 5, 4))


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    """A small SAM of transformers that has learned to outline a bright ellipse, or nothing."""
    from mmadapt.tasks.segment.model import decode, embed

    model = BACKBONES["hf_sam"].fresh()
    sam, draw = segment.Segmenter(model), numpy.random.RandomState(0)
    by_clicks = segment.PromptedLoss(rounds=2)
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    for step in range(90):
        pixels, masks, boxes = [], [], []
        for place in range(8):
            (y, x), (b, a) = 4 + 8 * draw.rand(2), 1.5 + 4 * draw.rand(2)
            shape = ball((1, 16, 16), (0, y, x), (1, b, a))[0] & (place % 4 > 0)
            grey = (0.2 + 0.6 * shape + 0.05 * draw.randn(16, 16)).clip(0, 1)
            pixels.append(sam.prepare((255 * grey).astype(numpy.uint8), grey=True))
            masks.append(torch.from_numpy(shape))
            boxes.append(torch.tensor([x - a - 1, y - b - 1, x + a + 1, y + b + 1]).clamp(0, 15))
        batch = torch.stack(pixels), torch.stack(masks)
        if step % 2:
            loss = by_clicks(model, batch)
        else:
            low, _ = decode(model, embed(model, batch[0]), boxes=torch.stack(boxes).float())
            logits = nn.functional.interpolate(low, (16, 16), mode="bilinear")[:, 0]
            loss = segment.dice_cross_entropy(logits, batch[1])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model


def scan(truth: numpy.ndarray = TRUTH) -> Volume:
    values = 0.2 + 0.6 * truth + 0.05 * numpy.random.RandomState(1).randn(*truth.shape)
    return Volume(values.clip(0, 1), numpy.diag([-1, -1, 2, 1.0]), name="scan")


def test_one_click_on_one_slice_outlines_the_whole_object(trained: nn.Module) -> None:
    study = volumes.SliceSegmenter(trained, scan())
    first = study.click((7, 8, 7))
    assert segment.dice(first, TRUTH[7]) > 0.8
    assert study.mask.any((1, 2)).sum() == 1
    study.propagate()
    assert segment.dice(study.mask, TRUTH) > 0.8
    assert numpy.array_equal(study.mask[7], first)
    # it ends where the object ends, and goes no further
    assert not study.mask[[0, 1, 13]].any()


def test_a_box_over_several_slices_and_a_reach(trained: nn.Module) -> None:
    study = volumes.SliceSegmenter(trained, scan())
    study.box((6, 3, 3, 8, 13, 12))
    assert study.prompted == [6, 7]
    assert segment.dice(study.mask[6:8], TRUTH[6:8]) > 0.8
    study.propagate(reach=1)
    assert numpy.flatnonzero(study.mask.any((1, 2))).tolist() == [5, 6, 7, 8]


def test_more_clicks_correct_it_and_neighbours_follow(trained: nn.Module) -> None:
    """Two objects in one volume, of which the second begins where the first has ended."""
    truth = numpy.concatenate([TRUTH, TRUTH])
    study = volumes.SliceSegmenter(trained, scan(truth))
    study.click((7, 8, 7))
    study.propagate()
    before = segment.dice(study.mask, truth)
    click = volumes.next_click(study.mask, truth)
    assert click is not None and click[1] == 1 and click[0].z > 14
    study.click(*click)
    study.propagate()
    assert segment.dice(study.mask, truth) > before + 0.2
    assert len(study.prompted) == 2


def test_a_drawn_slice_is_kept_propagated_and_corrected(trained: nn.Module) -> None:
    drawn = numpy.zeros_like(TRUTH)
    drawn[7] = TRUTH[7]
    study = volumes.SliceSegmenter(trained, scan().oriented("RAS"))
    study.draw(drawn)
    study.propagate()
    assert numpy.array_equal(study.on_original()[7], TRUTH[7])
    assert segment.dice(study.on_original(), TRUTH) > 0.8
    # the model is told what was drawn: another drawing, another answer to the same click
    answers = []
    for mask in (drawn, numpy.roll(drawn, 4, 2)):
        study.forget()
        study.draw(mask)
        study.click((7, 8, 7))
        answers.append(study._low[7].tolist())
    assert answers[0] != answers[1]
    with pytest.raises(Refused, match="holds no voxel of this volume"):
        study.draw(numpy.zeros_like(TRUTH))
    with pytest.raises(Refused, match="holds the values 0, 2"):
        study.draw(2 * drawn.astype(int))


def test_a_drawing_becomes_a_prompt_in_the_models_square(trained: nn.Module) -> None:
    """A slice 8 × 16 fills the upper half of the square."""
    study = volumes.SliceSegmenter(trained, Volume(numpy.zeros((3, 8, 16)), numpy.eye(4)))
    mask = numpy.zeros((8, 16), bool)
    mask[2:6, 4:12] = True
    low = study._as_low(mask)
    assert low.shape == (16, 16)
    assert numpy.array_equal((low > 0).numpy()[:8], mask)
    assert not (low[8:] > 0).any()


def test_a_slice_is_encoded_once_and_remembers_its_clicks(trained: nn.Module) -> None:
    runs: list[int] = []
    handle = trained.vision_encoder.register_forward_hook(lambda *call: runs.append(1))  # type: ignore[union-attr]
    try:
        study = volumes.SliceSegmenter(trained, scan())
        study.click((7, 8, 7))
        study.click((7, 8, 8), 0)
        third = study.click((7, 3, 7))
        assert len(runs) == 1
    finally:
        handle.remove()
    # the same as asking for all of them, with what was answered before
    sam = segment.Segmenter(trained)
    image = sam.encode(numpy.rint(scan().array[0, 7] * 255).astype(numpy.uint8), grey=True)
    low, points, labels = None, [(7, 8), (8, 8), (7, 3)], [1, 0, 1]
    for count in (1, 2, 3):
        answer = sam.predict(image, points[:count], labels[:count], mask=low)
        low = answer.low
    assert numpy.array_equal(answer.masks[0].numpy(), third)
    study.forget()
    assert study.prompted == [] and not study.mask.any()
    with pytest.raises(Refused, match="no slice has a prompt yet"):
        study.propagate()


def test_steps_on_slices_are_taken_back_one_by_one(trained: nn.Module) -> None:
    study = volumes.SliceSegmenter(trained, scan())
    seen = [study.mask.copy()]
    steps: list[Any] = [
        lambda: study.click((7, 8, 7)),
        lambda: study.click((7, 3, 7), 0),
        lambda: study.box((6, 4, 4, 9, 12, 12)),
        lambda: study.propagate(),
        lambda: study.draw(TRUTH),
        lambda: study.ask([(5, 8, 7)]),
        lambda: study.ask(),
    ]
    for step in steps:
        step()
        seen.append(study.mask.copy())
    assert study.points == [] and not study.mask.any()
    for place in range(len(steps) - 1, -1, -1):
        study.undo()
        assert numpy.array_equal(study.mask, seen[place]), place
        if place == 3:
            assert study.points == [(7, 8, 7), (7, 3, 7)] and study.labels == [1, 0]
            assert study.boxes == [(6, 4, 4, 9, 12, 12)] and study.prompted == [6, 7, 8]
    assert study.prompted == [] == study.points == study.boxes
    study.undo()  # nothing is left
    # what comes after is not what was taken back
    other = volumes.SliceSegmenter(trained, scan())
    assert numpy.array_equal(study.click((7, 8, 8)), other.click((7, 8, 8)))


def test_asking_for_all_prompts_is_asking_one_by_one(trained: nn.Module) -> None:
    study, other = (volumes.SliceSegmenter(trained, scan()) for _ in range(2))
    study.click((2, 2, 2))
    other.box((6, 4, 4, 8, 12, 12))
    other.click((7, 8, 7))
    other.click((9, 8, 7), 0)
    study.ask([(7, 8, 7), (9, 8, 7)], [1, 0], other.boxes)
    assert numpy.array_equal(study.mask, other.mask)
    assert (study.points, study.labels, study.boxes) == (other.points, other.labels, other.boxes)
    for wrong, message in (
        ({"points": [(7, 8, 7), (99, 8, 7)]}, "outside of an image"),
        ({"points": [(7, 8, 7)], "labels": [1, 0]}, "labels are of shape"),
        ({"boxes": [(6, 4, 4, 6, 12, 12)]}, "reversed or empty"),
    ):
        with pytest.raises(Refused, match=message):
            study.ask(**wrong)
        assert numpy.array_equal(study.mask, other.mask) and study.points == other.points


def test_a_click_on_a_slice_that_cannot_be_encoded_changes_nothing(trained: nn.Module) -> None:
    values = scan().array.copy()
    values[0, 4] += 3
    study = volumes.SliceSegmenter(trained, Volume(values, scan().affine))
    study.click((7, 8, 7))
    before = study.mask.copy()
    with pytest.raises(Refused, match="in slice 4, expected 0 to 1"):
        study.click((4, 8, 7))
    with pytest.raises(Refused, match="in slice 4, expected 0 to 1"):
        study.box((2, 4, 4, 9, 12, 12))
    assert numpy.array_equal(study.mask, before)
    assert study.points == [(7, 8, 7)] and study.boxes == [] and study.prompted == [7]
    study.undo()
    assert study.prompted == []


def test_slices_are_encoded_anew_after_training(trained: nn.Module) -> None:
    model: Any = copy.deepcopy(trained)
    attachment = mm.attach(model, mm.Bottleneck(2), at="vision.layers[*].mlp", seed=0)
    study = volumes.SliceSegmenter(model, scan())
    before = study._encoded.of(7).embedding
    assert study._encoded.of(7).embedding is before
    with torch.no_grad():
        for tensor in attachment.parameters():
            tensor.add_(0.1)
    assert not torch.equal(study._encoded.of(7).embedding, before)


def test_between_two_prompted_slices_each_goes_half_of_the_way(trained: nn.Module) -> None:
    for low, high in ((3, 8), (3, 9), (6, 7)):
        study = volumes.SliceSegmenter(trained, scan())
        for z in (low, high):
            study.click((z, 8, 7))
        between = high - low - 1
        assert study._reach(low, -1, None) == low
        assert study._reach(low, 1, None) == between - between // 2
        assert study._reach(high, -1, None) == between // 2
        assert study._reach(high, 1, None) == 13 - high
        assert study._reach(low, -1, 2) == 2


def test_prompts_are_in_the_original_and_so_is_the_answer(
    trained: nn.Module, tmp_path: Path
) -> None:
    straight = volumes.SliceSegmenter(trained, scan())
    straight.click((7, 8, 7))
    straight.propagate()
    turned = volumes.SliceSegmenter(trained, scan().oriented("PLI").oriented("LPI"))
    turned.click((7, 8, 7))
    turned.propagate()
    assert numpy.array_equal(turned.on_original(), straight.on_original())
    assert not numpy.array_equal(turned.mask, straight.mask)
    path = volumes.save_mask(tmp_path / "mask.nii.gz", turned.mask, turned.volume)
    assert numpy.array_equal(volumes.read_mask(path, like=scan()), straight.mask)


def test_a_volume_in_its_file_is_segmented_slice_by_slice(
    trained: nn.Module, tmp_path: Path
) -> None:
    import nibabel

    whole = scan()
    path = tmp_path / "scan.nii"
    nibabel.Nifti1Image(whole.array[0].T * 100, whole.affine).to_filename(str(path))
    masks = []
    for volume in (volumes.open_nifti(path), volumes.read_nifti(path)):
        study = volumes.SliceSegmenter(trained, volume.window(0, 100))
        study.click((7, 8, 7))
        masks.append(study.propagate().tolist())
    assert masks[0] == masks[1]


def test_slices_without_a_meaning_are_refused(trained: nn.Module) -> None:
    raw = volumes.read_nifti(nifti("anatomical.nii"))
    with pytest.raises(Refused, match="holds values from .* expected 0 to 1") as caught:
        volumes.SliceSegmenter(trained, raw).click((7, 8, 7))
    assert 'volume.window("ct abdomen")' in caught.value.hint
    two = Volume(numpy.zeros((2, 4, 16, 16)), numpy.eye(4))
    with pytest.raises(Refused, match="has 2 channels, expected one"):
        volumes.SliceSegmenter(trained, two)
    study = volumes.SliceSegmenter(trained, scan())
    with pytest.raises(Refused, match="outside of an image"):
        study.click((14, 8, 7))
    for box in ((6, 3, 3, 6, 13, 12), (6, 3, 3, 8, 13, 17), (6, 3, 3)):
        with pytest.raises(Refused, match="the box"):
            study.box(box)
    with pytest.raises(Refused, match="outside of the part"):
        volumes.SliceSegmenter(trained, scan().crop((0, 0, 0, 14, 8, 16))).click((7, 12, 7))


# -- slices that see their neighbours --------------------------------------------------------------


def looking(depth: int | None = 4, seed: int = 1) -> Any:
    from snapshot import randomise

    model: Any = BACKBONES["hf_sam"].fresh()
    randomise(mm.attach(model, mm.MedSA(depth=True), name="deep", seed=seed), 0.3)
    if depth:
        segment.set_input(model, depth=depth)
    return model


@pytest.mark.parametrize(("depth", "length"), [(4, 4), (5, 5), (14, 14), (40, 14), (None, 12)])
def test_slices_are_encoded_in_stacks_for_layers_that_look_along_the_depth(
    depth: int | None, length: int
) -> None:
    """As many together as in training, each in the stack in which it has most neighbours."""
    model = looking(depth)
    study, sam = volumes.SliceSegmenter(model, scan()), segment.Segmenter(model)
    grey = numpy.rint(scan().array[0] * 255).astype(numpy.uint8)
    starts = {*range(0, 14 - length, length // 2), 14 - length}
    stacks = {s: sam.encode_stack(grey[s : s + length], grey=True).embedding for s in starts}
    for z in (0, 13, 6, 7, 2, 11, 6):
        found = study._encoded.of(z).embedding[0]
        own = [s for s in starts if torch.equal(found, stacks[s][min(max(z - s, 0), length - 1)])]
        assert len(own) == 1
        least = min(length // 4, z, 13 - z)  # neighbours on either side, but at the ends
        assert z - own[0] >= least and own[0] + length - 1 - z >= least
    alone = sam.encode(grey[6], grey=True).embedding[0]
    assert not torch.allclose(study._encoded.of(6).embedding[0], alone, atol=1e-2)


def test_a_stack_is_encoded_once_and_anew_for_another_adapter() -> None:
    model = looking(6)
    runs: list[int] = []
    model.vision_encoder.register_forward_hook(lambda *call: runs.append(1))
    study = volumes.SliceSegmenter(model, scan())
    study.click((1, 8, 7))
    study.click((0, 8, 7))
    assert len(runs) == 1
    with mm.disabled(model):
        bare = study._encoded.of(1).embedding
    assert len(runs) == 2
    frozen = volumes.SliceSegmenter(BACKBONES["hf_sam"].fresh(), scan())
    assert torch.equal(bare, frozen._encoded.of(1).embedding)
    assert not torch.equal(study._encoded.of(1).embedding, bare)


def stretched(truth: numpy.ndarray) -> Volume:
    values = 0.3 + 0.5 * truth + 0.03 * numpy.random.RandomState(1).randn(*truth.shape)
    return Volume(values.clip(0, 1), numpy.diag([1, 1, 2.5, 1.0]), name="scan")


def test_a_pretrained_sam_carries_one_click_through_a_volume() -> None:
    truth = ball((9, 64, 64), (4, 30, 34), (3.4, 20, 17))
    study = volumes.SliceSegmenter(mm.load("tiny/sam"), stretched(truth))
    assert segment.dice(study.click((4, 30, 34)), truth[4]) > 0.85
    study.propagate()
    assert segment.dice(study.mask, truth) > 0.85
    assert not study.mask[[0, 8]].any()


def test_a_speck_in_the_corner_does_not_make_the_box_the_whole_slice(trained: nn.Module) -> None:
    asked: list[Any] = []
    study = volumes.SliceSegmenter(trained, scan())
    take = study._take
    study._take = lambda place, **prompt: (asked.append(prompt), take(place, **prompt))[1]  # type: ignore[method-assign]
    drawn = numpy.zeros_like(TRUTH)
    drawn[7] = TRUTH[7]
    drawn[7, 15, 15] = drawn[7, 0, 0] = True
    study.draw(drawn)
    study.propagate(reach=1)
    rows, columns = (numpy.flatnonzero(TRUTH[7].any(axis)) for axis in (1, 0))
    box = columns[0] - 1, rows[0] - 1, columns[-1] + 1, rows[-1] + 1
    assert [prompt["box"] for prompt in asked] == [tuple(map(float, box))] * 2


@pytest.mark.slow
def test_an_adapter_that_looks_along_the_depth_is_carried_through_speckle() -> None:
    """`tiny/sam` after few steps on few of the generated volumes."""
    from mmadapt.tasks.segment import compare, organs

    train = compare.Cases(*organs.volumes(12, seed=1))
    slices, truths, clicks = organs.volumes(6, seed=2)
    sam = mm.load("tiny/sam")

    def found() -> float:
        dices = []
        for own, truth, (x, y) in zip(slices, truths, clicks, strict=True):
            volume = Volume(own / 255, numpy.diag([1, 1, 2.5, 1.0]))
            study = volumes.SliceSegmenter(sam, volume)
            study.click((int(truth.sum((1, 2)).argmax()), y, x))
            dices.append(segment.dice(study.propagate(), truth))
        return float(numpy.mean(dices))

    before = found()
    data = compare.training_tensors(sam, train)
    method = compare.METHODS["MedSA, with depth"]
    compare.adapt(sam, method, data, name="organs", seed=1, steps=50, batch=2)
    segment.set_input(sam, depth=organs.DEPTH)
    assert found() > before + 0.25


# -- the page about volumes ------------------------------------------------------------------------


def test_what_the_page_says_runs(
    trained: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import nibabel

    page = (Path(__file__).parent.parent / "docs" / "volumes.md").read_text()
    monkeypatch.chdir(tmp_path)
    image = nibabel.load(str(nifti("anatomical.nii")))
    image.to_filename("ct.nii.gz")
    image.to_filename("big.nii")
    model: Any = copy.deepcopy(trained)
    mm.attach(model, mm.Bottleneck(2), at="vision.layers[*].mlp", name="liver")
    names: dict[str, Any] = {
        "model": model,
        "other": BACKBONES["hf_sam"].fresh(),
        "sam": BACKBONES["hf_sam"].fresh(),
        "values": torch.rand(2, 1, 8, 8, 8),
        "masks": torch.rand(2, 8, 8, 8) > 0.5,
        "network": network(),
        "clicked": near_the_clicks,
        "truth": ball((25, 41, 33), (12, 20, 16), (6, 6, 6)).astype(numpy.uint8),
    }
    blocks = page.split("```python\n")[1:]
    assert len(blocks) == 6
    for block in blocks:
        exec(block.split("```")[0], names)
    assert repr(names["ct"]).startswith("Volume(ct.nii.gz: 1×25×41×33 voxels (z, y, x) of 2×2×2 mm")
    assert volumes.read_mask("big_mask.nii", like=names["ct"]).shape == (25, 41, 33)
    assert [score.structure for score in names["scores"]] == ["lesion"]
    assert names["study"].mask.shape == names["work"].size and Path("lesion.nii.gz").exists()
    assert segment.input_of(names["other"]) == segment.Input("ct abdomen", 12)
