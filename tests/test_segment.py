"""Promptable segmentation: what is refused, what is computed, what is learned."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import numpy
import pytest
import torch
from backbones import BACKBONES
from snapshot import randomise
from torch import Tensor

import mmadapt as mm
from mmadapt.tasks import segment

Refused = mm.errors.DataError
IMAGE = (numpy.random.RandomState(0).rand(12, 20, 3) * 255).astype(numpy.uint8)


def segmenter(name: str = "hf_sam") -> segment.Segmenter:
    return segment.Segmenter(BACKBONES[name].fresh())


# -- images ----------------------------------------------------------------------------------------


def holes() -> numpy.ndarray:
    image = numpy.ones((4, 5, 3), numpy.float32)
    image[2, 3, 1] = image[3, 0, 0] = numpy.nan
    return image


@pytest.mark.parametrize(
    ("image", "message", "hint"),
    [
        (IMAGE / 255, "float64 values from 0", r"window\(image, low, high\)"),
        (holes(), r"2 of 60 values are not numbers, the first at \(2, 3, 1\)", "nan=low"),
        (IMAGE.astype(numpy.uint16) * 9, "uint16 values from", "'ct soft tissue'"),
        (IMAGE.astype(numpy.int16) - 900, "int16 values from -", "'ct lung'"),
        (IMAGE[..., 0], r"one channel: \(12, 20\)", "grey=True"),
        (IMAGE[..., :1], r"one channel: \(12, 20, 1\)", "grey=True"),
        (numpy.dstack([IMAGE, IMAGE[..., :1]]), "four channels", r"image\[\.\.\., :3\]"),
        (IMAGE.transpose(2, 0, 1), r"look like \(C, H, W\)", r"transpose\(1, 2, 0\)"),
        (numpy.zeros((4, 5, 6, 3), numpy.uint8), r"expected \(H, W, 3\)", "one slice"),
        (numpy.zeros((0, 5, 3), numpy.uint8), "has no pixels", ""),
        ("a.png", "type <U5 has no pixels", ""),
    ],
)
def test_an_image_of_another_kind_is_refused(image: Any, message: str, hint: str) -> None:
    with pytest.raises(Refused, match=message) as caught:
        segmenter().encode(image)
    if hint:
        import re

        assert re.search(hint, caught.value.hint)


def test_a_grey_image_is_repeated_when_asked() -> None:
    sam = segmenter()
    grey, colour = sam.prepare(IMAGE[..., 0], grey=True), sam.prepare(IMAGE[..., [0, 0, 0]])
    assert torch.equal(grey, colour)


def test_a_window_of_intensities() -> None:
    """Half of the kidney's range is half of the greys; byte order does not matter."""
    values = numpy.array([-54.0, 96.5, 247.0, 900.0, -900.0])
    assert segment.window(values, "ct kidney").tolist() == [0, 128, 255, 255, 0]
    big = values.astype(">i2")
    assert segment.window(big, -54, 247).tolist() == [0, 127, 255, 255, 0]
    assert segment.window([math.nan, 1.0, math.inf], 0, 1, nan=1.0).tolist() == [255, 255, 255]
    with pytest.raises(Refused, match="1 of 2 values are not numbers"):
        segment.window([math.nan, 1.0], 0, 1)
    with pytest.raises(Refused, match="no window is named 'ct kidneys'") as caught:
        segment.window(values, "ct kidneys")
    assert "'ct kidney'" in caught.value.hint
    for low, high in ((1, 1), (2, 1), (0, None), (0, math.nan)):
        with pytest.raises(Refused, match="no range"):
            segment.window(values, low, high)


def test_the_longer_side_fills_the_square() -> None:
    sam = segmenter()
    assert sam.side == 16
    sam.side = 1024
    assert sam.resized((60, 80)) == (768, 1024)


# -- prompts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ({}, "no prompt"),
        ({"labels": [1]}, "labels and no points"),
        ({"points": [(1, 2)]}, "no labels"),
        (
            {"points": [(5, 12)], "labels": [1]},
            r"\(5, 12\), outside of an image 20 wide and 12 high",
        ),
        ({"points": [(1, 1), (-1, 3)], "labels": [1, 0]}, r"point 1 has \(x, y\) = \(-1, 3\)"),
        ({"points": [(math.nan, 3)], "labels": [1]}, r"\(nan, 3\)"),
        ({"points": (1, 2), "labels": [1]}, r"of shape \(2,\), expected \(N, 2\)"),
        ({"points": [(1, 2)], "labels": [7]}, "label 7 means nothing"),
        ({"points": [(1, 2)], "labels": [1, 0]}, r"labels are of shape \(2,\), expected \(1,\)"),
        ({"box": (5, 5, 2, 8)}, "which holds nothing"),
        ({"box": (5, 5, 5, 8)}, "which holds nothing"),
        ({"box": (5, 5, 25, 8)}, r"box 0 has \(x, y\) = \(25, 8\)"),
        ({"box": (5, 5, 8)}, r"expected \(x1, y1, x2, y2\)"),
        ({"mask": numpy.zeros((64, 64))}, r"\(64, 64\), expected \(16, 16\)"),
        ({"mask": numpy.full((16, 16), math.nan)}, "not finite"),
    ],
)
def test_a_prompt_without_meaning_is_refused(prompt: Any, message: str) -> None:
    sam = segmenter()
    with pytest.raises(Refused, match=message):
        sam.predict(sam.encode(IMAGE), **prompt)


@pytest.mark.parametrize("name", ["hf_sam", "segment_anything"])
def test_an_image_is_encoded_once_and_prompted_many_times(name: str) -> None:
    sam = segmenter(name)
    runs: list[int] = []
    encoder = getattr(sam.model, "vision_encoder", None) or sam.model.image_encoder
    encoder.register_forward_hook(lambda *call: runs.append(1))
    image = sam.encode(IMAGE)
    one = sam.predict(image, points=[(3, 4)], labels=[1])
    other = sam.predict(image, points=[(15, 9), (0, 0)], labels=[1, 0])
    boxed = sam.predict(image, box=(1, 2, 10, 8), several=True)
    again = sam.predict(image, points=[(3, 4)], labels=[1], mask=one.low)
    assert runs == [1]
    assert one.logits.shape == other.logits.shape == (1, 12, 20)
    assert boxed.logits.shape == (3, 12, 20)
    assert boxed.overlaps.shape == (3,)
    assert boxed.best.dtype == torch.bool
    assert torch.equal(boxed.best, boxed.masks[int(boxed.overlaps.argmax())])
    assert not torch.equal(one.logits, other.logits)
    assert not torch.equal(one.logits, again.logits)


def test_both_libraries_answer_alike() -> None:
    from test_backbones_sam import twins

    original, ours = (segment.Segmenter(model) for model in twins())
    for prompt in (
        {"points": [(3, 4), (12, 2)], "labels": [1, 0]},
        {"box": (1, 2, 10, 8)},
        {"points": [(3, 4)], "labels": [1], "box": (1, 2, 10, 8)},
    ):
        found = [sam.predict(sam.encode(IMAGE), **prompt).logits for sam in (original, ours)]
        assert (found[0] - found[1]).abs().max() <= 1e-3 * found[0].abs().max()


def test_the_answer_is_that_of_the_original_predictor() -> None:
    from segment_anything import SamPredictor

    sam = segmenter("segment_anything")
    predictor = SamPredictor(sam.model)
    predictor.set_image(IMAGE)
    masks, overlaps, low = predictor.predict(
        numpy.array([[3.0, 4.0], [12.0, 2.0]]), numpy.array([1, 0]), return_logits=True
    )
    ours = sam.predict(sam.encode(IMAGE), points=[(3, 4), (12, 2)], labels=[1, 0], several=True)
    for expected, found in ((masks, ours.logits), (overlaps, ours.overlaps), (low, ours.low)):
        # it resizes bytes, so that pixels differ by half a grey
        assert numpy.abs(expected - found.numpy()).max() <= 0.05 * numpy.abs(expected).max()


def test_another_model_is_refused() -> None:
    with pytest.raises(mm.errors.BackboneError, match="a ViTModel is no SAM"):
        segmenter("hf_vit")


# -- training --------------------------------------------------------------------------------------


def cube(shape: tuple[int, ...], side: int, shift: int = 0) -> Tensor:
    """bool, true in a cube that begins at 4, on the first axis `shift` further."""
    mask = torch.zeros(shape, dtype=torch.bool)
    first, *rest = (slice(4, 4 + side) for _ in shape)
    mask[(slice(first.start + shift, first.stop + shift), *rest)] = True
    return mask


def test_the_loss_by_hand() -> None:
    truth = cube((32, 32, 32), 8)[None]
    loss = segment.dice_cross_entropy(torch.zeros(1, 32, 32, 32), truth)
    assert loss.item() == pytest.approx(1.634324, abs=1e-6)
    assert segment.dice_cross_entropy(50.0 * (2.0 * truth - 1), truth).item() < 1e-6


def test_the_loss_is_monais() -> None:
    from monai.losses import DiceCELoss

    draw = torch.Generator().manual_seed(0)
    logits, truth = torch.randn(2, 1, 9, 9, generator=draw), torch.rand(2, 1, 9, 9, generator=draw)
    theirs = DiceCELoss(sigmoid=True, squared_pred=True)(logits, (truth > 0.7).float())
    assert segment.dice_cross_entropy(logits, truth > 0.7).item() == pytest.approx(
        theirs.item(), abs=1e-6
    )


def test_masks_of_several_classes_or_shares_are_refused() -> None:
    for values in ([0.0, 1.0, 2.0], [0.0, 0.5, 1.0]):
        with pytest.raises(Refused, match=r"expected 0 and 1") as caught:
            segment.dice_cross_entropy(torch.zeros(1, 3), torch.tensor([values]))
        assert "mask == label" in caught.value.hint
    with pytest.raises(Refused, match=r"logits are \(1, 3\), the masks \(1, 4\)"):
        segment.dice_cross_entropy(torch.zeros(1, 3), torch.zeros(1, 4))


def test_clicks_fall_on_the_object_and_on_errors() -> None:
    draw = torch.Generator().manual_seed(0)
    truth = torch.zeros(3, 8, 12, dtype=torch.bool)
    truth[0, 2:5, 6:11] = True
    truth[1, 7, 0] = True
    for _ in range(20):
        points, labels = segment.first_clicks(truth, draw)
        assert points.shape == (3, 1, 2)
        assert labels.flatten().tolist() == [1, 1, 0]  # nothing is in the third image
        for image in (0, 1):
            x, y = (int(v) for v in points[image, 0])
            assert truth[image, y, x]
        prediction = truth.clone()
        prediction[0, 2, 6] = False  # missed
        prediction[2, 1, 5] = True  # beside
        points, labels = segment.click_on_error(prediction, truth, draw)
        assert labels.flatten().tolist() == [1, -1, 0]
        assert points[0, 0].tolist() == [6.0, 2.0]
        assert points[2, 0].tolist() == [5.0, 1.0]


@pytest.mark.parametrize("name", ["hf_sam", "segment_anything"])
def test_an_adapted_sam_learns_from_clicks(name: str) -> None:
    model = BACKBONES[name].fresh()
    sam = segment.Segmenter(model)
    mm.attach(model, mm.MedSA("released"))
    draw = numpy.random.RandomState(1)
    images = [(draw.rand(16, 16, 3) * 60).astype(numpy.uint8) for _ in range(4)]
    masks = torch.zeros(4, 16, 16)
    for place, image in enumerate(images):
        image[4 : 9 + place, 3:12] += 150
        masks[place, 4 : 9 + place, 3:12] = 1
    pixels = torch.stack([sam.prepare(image) for image in images])
    history = mm.fit(
        model,
        (pixels, masks),
        loss=segment.PromptedLoss(rounds=2),
        steps=25,
        batch_size=4,
        lr=0.02,
        progress=False,
    )
    assert history.losses[-1] < 0.5 * history.losses[0]


@pytest.mark.parametrize("name", ["hf_sam", "segment_anything"])
@pytest.mark.parametrize("trained", ["adapters", "decoder"])
def test_the_encoder_runs_once_an_image_where_only_the_decoder_learns(
    name: str, trained: str
) -> None:
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randn(6, 3, 16, 16, generator=draw)
    masks = (torch.rand(6, 16, 16, generator=draw) > 0.5).float()

    def train(cached: bool) -> tuple[list[float], list[int]]:
        model: Any = BACKBONES[name].fresh()
        if trained == "adapters":
            at: Any = ("decoder.layers[*].token_to_image", "decoder.layers[*].mlp")
            attachment = mm.attach(model, mm.MedSA(), at=at, seed=1)
        else:
            attachment = mm.attach(model, mm.Unlock(), at=segment.decoder_sites(model), seed=1)
            own = sum(p.numel() for p in model.mask_decoder.parameters())
            assert attachment.num_parameters == own
        encoder = getattr(model, "vision_encoder", None) or model.image_encoder
        images: list[int] = []
        for part in (encoder.patch_embed, encoder.neck):
            part.register_forward_hook(lambda _, args, __: images.append(len(args[0])))
        with contextlib.ExitStack() as stack:
            if cached:
                stack.enter_context(mm.cached_prefix(model))
            history = mm.fit(
                model,
                (pixels, masks),
                loss=segment.PromptedLoss(),
                steps=9,
                batch_size=2,
                progress=False,
            )
        return history.losses, images

    plain, images = train(False)
    assert sum(images) == 2 * 9 * 2
    cached, images = train(True)
    assert sum(images) == 2 * 6  # patches and neck, once for every image
    assert cached == plain
    assert plain[-1] != plain[0]


def test_pixels_of_another_size_are_refused() -> None:
    with pytest.raises(Refused, match=r"expected \(B, 3, 16, 16\) and \(B, 16, 16\)"):
        segment.PromptedLoss()(
            BACKBONES["hf_sam"].fresh(), (torch.zeros(1, 3, 8, 8), torch.zeros(1, 8, 8))
        )
    with pytest.raises(Refused, match="rounds is 0"):
        segment.PromptedLoss(rounds=0)


def test_the_loss_draws_its_clicks_from_its_own_seed() -> None:
    model = BACKBONES["hf_sam"].fresh()
    randomise(mm.attach(model, mm.MedSA()), 0.1)
    batch = (torch.randn(1, 3, 16, 16), cube((16, 16), 8)[None])
    before = torch.get_rng_state()
    first, second = (segment.PromptedLoss(3, seed=4)(model, batch) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)


# -- metrics ---------------------------------------------------------------------------------------


def test_shifted_cubes() -> None:
    one, other = cube((20, 20, 20), 8), cube((20, 20, 20), 8, shift=2)
    assert segment.dice(one, other) == 0.75
    assert segment.hausdorff(one, other) == 2.0
    assert segment.hausdorff(one, other, percentile=100) == 2.0
    assert segment.hausdorff(one, other, spacing=(2.5, 1, 1)) == 5.0
    for tolerance, share in ((0.5, 0.567568), (1.0, 0.729730), (2.0, 1.0)):
        assert segment.surface_dice(one, other, tolerance) == pytest.approx(share, abs=1e-6)


def test_empty_masks_have_a_meaning() -> None:
    full, empty = cube((9, 9), 3), torch.zeros(9, 9, dtype=torch.bool)
    assert segment.dice(empty, empty) == 1.0
    assert segment.hausdorff(empty, empty) == 0.0
    assert segment.surface_dice(empty, empty, 1.0) == 1.0
    for pair in ((full, empty), (empty, full)):
        assert segment.dice(*pair) == 0.0
        assert segment.hausdorff(*pair) == math.inf
        assert segment.hausdorff(*pair, far=12.7) == 12.7
        assert segment.surface_dice(*pair, 1.0) == 0.0


def test_a_total_miss_is_not_perfect() -> None:
    """MONAI's own mean of HD95 over an empty prediction is 0."""
    full, empty = cube((9, 9), 3), torch.zeros(9, 9, dtype=torch.bool)
    distances = [segment.hausdorff(full, full), segment.hausdorff(empty, full)]
    assert segment.summary(distances, miss=math.inf) == segment.Summary(math.inf, math.inf, 2, 1)
    overlaps = [1.0, 0.0, 0.5, 0.0]
    assert segment.summary(overlaps) == segment.Summary(0.375, 0.25, 4, 2)
    for wrong in ([], [math.nan], [[1.0]]):
        with pytest.raises(Refused, match="cannot be summarised"):
            segment.summary(wrong)


def test_what_is_no_mask_is_refused() -> None:
    mask = cube((9, 9), 3)
    with pytest.raises(Refused, match="prediction holds values from -1 to 1, expected a binary"):
        segment.dice(2.0 * mask - 1, mask)
    with pytest.raises(Refused, match=r"\(9, 9\), the truth \(8, 9\)"):
        segment.dice(mask, mask[1:])
    with pytest.raises(Refused, match="no surface"):
        segment.hausdorff(torch.ones(4), torch.ones(4))
    for spacing in ((1.0,), (1.0, 0.0), (1.0, -2.0), (1.0, math.nan)):
        with pytest.raises(Refused, match="2 lengths above 0"):
            segment.hausdorff(mask, mask, spacing=spacing)
