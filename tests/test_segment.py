"""Promptable segmentation: what is refused, what is computed, what is learned."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import numpy
import pytest
import torch
from backbones import BACKBONES
from snapshot import assert_close, randomise
from torch import Tensor

import mmadapt as mm
from mmadapt.tasks import segment
from mmadapt.tasks.segment import compare, organs
from mmadapt.tasks.segment.scenes import scenes

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
        (holes(), r"2 of 60 values are not numbers, the first at \(2, 3, 1\)", "nan=0.0"),
        (IMAGE.astype(numpy.uint16) * 9, "uint16 values from", "'ct soft tissue'"),
        (IMAGE.astype(numpy.int16) - 900, "int16 values from -", "'ct lung'"),
        (IMAGE[..., 0], r"one channel: \(12, 20\)", "grey=True"),
        (IMAGE[..., :1], r"one channel: \(12, 20, 1\)", "grey=True"),
        (numpy.dstack([IMAGE, IMAGE[..., :1]]), "four channels", r"image\[\.\.\., :3\]"),
        (IMAGE.transpose(2, 0, 1), r"look like \(C, H, W\)", r"transpose\(1, 2, 0\)"),
        (numpy.zeros((4, 5, 6, 3), numpy.uint8), r"expected \(H, W, 3\)", "encode_stack"),
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


#: every kind of SAM that can be prompted
KINDS = ["hf_sam", "segment_anything", "hf_sam2"]


@pytest.mark.parametrize("name", KINDS)
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


@pytest.mark.parametrize("several", [False, True])
def test_the_answer_of_sam2_is_that_of_transformers_own_processor(several: bool) -> None:
    """The image is stretched to the square, prompts with it; finer grids are used in the decoder."""
    from transformers import Sam2ImageProcessor

    sam = segmenter("hf_sam2")
    assert (sam.side, sam.mask_side) == (64, 16)
    processor = Sam2ImageProcessor(size={"height": 64, "width": 64})
    pixels = processor(images=IMAGE, return_tensors="pt")["pixel_values"]
    # it resizes bytes, so that pixels differ by half a grey
    assert (sam.prepare(IMAGE) - pixels[0]).abs().max() < 0.02
    points = torch.tensor([[[[3.0, 4.0], [12.0, 2.0]]]])
    scaled = points * torch.tensor([64 / 20, 64 / 12])
    with torch.no_grad():
        output = sam.model(
            sam.prepare(IMAGE)[None],
            input_points=scaled,
            input_labels=torch.tensor([[[1, 0]]]),
            multimask_output=several,
        )
    ours = sam.predict(sam.encode(IMAGE), points=[(3, 4), (12, 2)], labels=[1, 0], several=several)
    assert_close(
        (ours.low, ours.overlaps), (output.pred_masks[0, 0], output.iou_scores[0, 0]), 1e-5
    )
    masks = processor.post_process_masks([output.pred_masks[0]], [IMAGE.shape[:2]], binarize=False)
    assert ours.logits.shape == masks[0][0].shape == (3 if several else 1, 12, 20)
    # it goes from the decoder's mask to the image at once, we by way of the square
    assert (ours.masks == (masks[0][0] > 0)).float().mean() > 0.95


def test_an_embedding_of_sam2_holds_every_grid_bit_by_bit() -> None:
    from mmadapt.tasks.segment.model import _unpacked, embed

    model: Any = BACKBONES["hf_sam2"].fresh()
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        packed = embed(model, pixels)
        expected = model.get_image_embeddings(pixels)
    assert packed.shape == (2, 32 + 4 * 8 + 16 * 4, 4, 4)
    for one, other in zip(_unpacked(model, packed), expected, strict=True):
        assert torch.equal(one, other)


def test_gradients_reach_the_finer_grids_of_sam2() -> None:
    model: Any = BACKBONES["hf_sam2"].fresh()
    attachment = randomise(mm.attach(model, mm.MedSA("released")), 0.1)
    assert "0/decoder.fine[0]:weight" in attachment.layers
    batch = (torch.randn(2, 3, 64, 64), cube((64, 64), 20)[None].repeat(2, 1, 1))
    segment.PromptedLoss(rounds=1)(model, batch).backward()
    unreached = {n for n, p in attachment.named_parameters() if p.grad is None or not p.grad.any()}
    # the single mask, or one of the three where it is unstable; expected overlaps are not trained
    quiet = ("decoder.masks", "decoder.object", "decoder.iou", "tokens.object", "k.bias")
    assert not {name for name in unreached if not any(part in name for part in quiet)}
    with torch.no_grad():
        found = segment.PromptedLoss(rounds=1)(model, batch)
        mm.set_active(model)
        assert found != segment.PromptedLoss(rounds=1)(model, batch)


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


# -- stacks of slices ------------------------------------------------------------------------------

STACK = (numpy.random.RandomState(1).rand(3, 12, 20) * 255).astype(numpy.uint8)


@pytest.mark.parametrize(
    ("slices", "grey", "message", "hint"),
    [
        (STACK[0], True, r"shape \(12, 20\), expected \(D, H, W\)", r"image\[None\]"),
        (STACK, False, r"shape \(3, 12, 20\), expected \(D, H, W, 3\)", "grey=True"),
        (IMAGE, False, r"shape \(12, 20, 3\), expected \(D, H, W, 3\)", r"image\[None\]"),
        (STACK[None, ..., None], True, r"\(1, 3, 12, 20, 1\), expected \(D, H, W\)", "one time"),
        (STACK[:0], True, r"\(0, 12, 20\) has no slices", ""),
        (STACK.astype(numpy.int16), True, "int16 values from", "'ct soft tissue'"),
        (STACK / 255, True, "float64 values from 0", "window"),
    ],
)
def test_a_stack_of_another_kind_is_refused(
    slices: Any, grey: bool, message: str, hint: str
) -> None:
    import re

    with pytest.raises(Refused, match=message) as caught:
        segmenter().encode_stack(slices, grey=grey)
    assert re.search(hint, caught.value.hint or "")


@pytest.mark.parametrize("name", ["hf_sam", "segment_anything"])
def test_without_adapters_a_stack_is_its_slices(name: str) -> None:
    sam = segmenter(name)
    stack = sam.encode_stack(STACK, grey=True)
    assert stack.stacked and stack.embedding.shape[0] == 3 and stack.size == (12, 20)
    one = {"points": [(3, 4)], "labels": [1]}
    each: Any = {"points": [[(3, 4)], [(15, 9)], [(0, 0)]], "labels": [[1], [1], [0]]}
    shared, own = sam.predict(stack, **one), sam.predict(stack, **each)
    boxed = sam.predict(stack, box=[(1, 2, 10, 8), (2, 2, 9, 9), (0, 0, 19, 11)])
    again = sam.predict(stack, **one, mask=shared.low)
    assert shared.logits.shape == own.logits.shape == boxed.logits.shape == (3, 12, 20)
    assert shared.best.shape == (3, 12, 20) and shared.best.dtype == torch.bool
    for place, slice_ in enumerate(STACK):
        alone = sam.encode(slice_, grey=True)
        prompt = {key: value[place] for key, value in each.items()}
        for found, expected in (
            (shared, sam.predict(alone, **one)),
            (own, sam.predict(alone, **prompt)),
            (again, sam.predict(alone, **one, mask=shared.low[place])),
        ):
            assert (found.logits[place] - expected.logits[0]).abs().max() <= 1e-4
            assert (found.overlaps[place] - expected.overlaps[0]).abs().max() <= 1e-4


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ({"points": [[(3, 4)]] * 2, "labels": [1]}, "points for 2 slices, and the stack has 3"),
        ({"points": [(3, 4)], "labels": [[1]] * 4}, "labels for 4 slices, and the stack has 3"),
        ({"box": [(1, 2, 10, 8)] * 2}, "box for 2 slices, and the stack has 3"),
        (
            {"points": [[(3, 4)], [(1, 1), (2, 2)], [(3, 4)]], "labels": [1]},
            "unlike numbers of points",
        ),
        (
            {"points": [[(3, 4)], [(3, 14)], [(3, 4)]], "labels": [1]},
            r"\(3, 14\), outside of an image",
        ),
        ({"points": [(3, 4)], "labels": [1], "several": True}, "several answers are asked for"),
        ({}, "no prompt"),
    ],
)
def test_prompts_that_do_not_fit_the_stack_are_refused(prompt: Any, message: str) -> None:
    sam = segmenter()
    with pytest.raises(Refused, match=message):
        sam.predict(sam.encode_stack(STACK, grey=True), **prompt)


def test_adapters_that_look_along_the_depth_are_told_it() -> None:
    sam = segmenter()
    randomise(mm.attach(sam.model, mm.ConvDepth(4)), 0.3)
    stack = sam.encode_stack(STACK, grey=True)
    for place, slice_ in enumerate(STACK):  # single images are stacks of one
        alone = sam.encode(slice_, grey=True)
        assert not torch.allclose(stack.embedding[place], alone.embedding[0], atol=1e-2)
    other = STACK.copy()
    other[0] = 0
    changed = sam.encode_stack(other, grey=True).embedding
    assert not torch.allclose(changed[1], stack.embedding[1], atol=1e-3)  # its neighbour sees it
    pixels = torch.stack([sam.prepare(own, grey=True) for own in STACK])
    with torch.no_grad(), mm.context(sam.model, depth=3):  # what a user says is not overruled
        assert torch.equal(segment.embed(sam.model, pixels), stack.embedding)
    with mm.disabled(sam.model):
        bare = sam.encode_stack(STACK, grey=True).embedding
    assert torch.equal(bare, segmenter().encode_stack(STACK, grey=True).embedding)


@pytest.mark.parametrize(
    "adapter", [mm.MedSA(depth=True), mm.ConvDepth(4)], ids=["MedSA", "ConvDepth"]
)
def test_slices_of_sam2_see_their_neighbours_too(adapter: Any) -> None:
    """Of its own volume alone, and the frozen model's slices see none."""
    sam = segmenter("hf_sam2")
    other = STACK.copy()
    other[0] = 0
    frozen = sam.encode_stack(STACK, grey=True).embedding
    assert torch.allclose(sam.encode_stack(other, grey=True).embedding[1:], frozen[1:], atol=1e-5)
    randomise(mm.attach(sam.model, adapter), 0.3)
    stack = sam.encode_stack(STACK, grey=True)
    changed = sam.encode_stack(other, grey=True).embedding
    assert not torch.allclose(changed[1], stack.embedding[1], atol=1e-3)
    for place, slice_ in enumerate(STACK):
        alone = sam.encode(slice_, grey=True)
        assert not torch.allclose(stack.embedding[place], alone.embedding[0], atol=1e-2)
    answer = sam.predict(stack, points=[(3, 4)], labels=[1])
    boxed = sam.predict(stack, box=[(1, 2, 10, 8), (2, 2, 9, 9), (0, 0, 19, 11)], mask=answer.low)
    assert answer.masks.shape == boxed.masks.shape == (3, 12, 20)
    # two volumes of a batch do not see each other
    pixels = torch.stack([sam.prepare(own, grey=True) for own in [*STACK, *other]])
    with torch.no_grad():
        both = segment.embed(sam.model, pixels, 3)
    assert torch.allclose(both[:3], stack.embedding, atol=1e-4)
    assert torch.allclose(both[3:], changed, atol=1e-4)
    with mm.disabled(sam.model):
        assert torch.equal(sam.encode_stack(STACK, grey=True).embedding, frozen)


# -- training --------------------------------------------------------------------------------------


def test_sam2_learns_from_stacks() -> None:
    """Gradients reach the branch along the depth, and the loss over whole volumes falls."""
    model: Any = BACKBONES["hf_sam2"].fresh()
    attachment = mm.attach(model, mm.MedSA("released", depth=True), seed=0)
    sam, draw = segment.Segmenter(model), numpy.random.RandomState(0)
    volume = (60 * draw.rand(3, 16, 16)).astype(numpy.uint8)
    volume[:, 4:9, 3:12] += 150
    pixels = torch.stack([sam.prepare(own, grey=True) for own in volume])[None]
    masks = torch.zeros(1, 3, 64, 64)
    masks[..., 16:36, 12:48] = 1
    history = mm.fit(
        model,
        (pixels, masks),
        loss=segment.PromptedLoss(rounds=1),
        steps=20,
        batch_size=1,
        lr=0.02,
        progress=False,
    )
    assert history.losses[-1] < 0.5 * history.losses[0]
    depth = {n: p for n, p in attachment.named_parameters() if n.endswith("depth_up")}
    assert depth and all(p.abs().max() > 0 for p in depth.values())


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


@pytest.mark.parametrize("name", KINDS)
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
    masks = masks.repeat_interleave(sam.side // 16, 1).repeat_interleave(sam.side // 16, 2)
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
    with pytest.raises(Refused, match=r"of stacks \(B, D, 3, 16, 16\)"):
        segment.PromptedLoss()(
            BACKBONES["hf_sam"].fresh(), (torch.zeros(1, 2, 3, 16, 16), torch.zeros(1, 3, 16, 16))
        )
    with pytest.raises(Refused, match="rounds is 0"):
        segment.PromptedLoss(rounds=0)


def test_a_click_is_shared_by_the_slices_of_a_volume() -> None:
    truth = torch.zeros(3, 4, 8, 8, dtype=torch.bool)
    truth[0, 1, 2:4, 2:4] = True
    truth[0, 2, 5:8, 4:8] = True  # its largest slice
    truth[1, 0, 7, 0] = True
    draw = torch.Generator().manual_seed(0)
    for _ in range(20):
        points, labels = segment.shared_clicks(truth, draw)
        assert points.shape == (12, 1, 2) and labels.flatten().tolist() == [1] * 8 + [0] * 4
        assert (points.view(3, 4, 2) == points.view(3, 4, 2)[:, :1]).all()
        x, y = (int(v) for v in points[0, 0])
        assert truth[0, 2, y, x]


def test_boxes_are_tight_and_move_by_a_share_of_their_extent() -> None:
    truth = torch.zeros(1, 16, 24, dtype=torch.bool)
    truth[0, 3:9, 5:21] = True
    assert segment.boxes_around(truth).tolist() == [[5.0, 3.0, 20.0, 8.0]]
    draw = torch.Generator().manual_seed(0)
    moved = torch.cat([segment.boxes_around(truth, draw, 0.1) for _ in range(200)])
    away = (moved - torch.tensor([5.0, 3.0, 20.0, 8.0])).abs()
    assert (
        away[:, [0, 2]].max() <= 3.0 and away[:, [1, 3]].max() <= 1.0
    )  # twice a tenth of 15, of 5
    assert away.mean() > 0.3


@pytest.mark.parametrize(
    "adapters", [[mm.ConvDepth(4), mm.MedSA("released")], [mm.MedSA("released", depth=True)]]
)
def test_an_adapted_sam_learns_from_stacks(adapters: Any) -> None:
    model = BACKBONES["hf_sam"].fresh()
    sam = segment.Segmenter(model)
    mm.attach(model, adapters)
    draw = numpy.random.RandomState(1)
    slices = (draw.rand(2, 3, 16, 16) * 60).astype(numpy.uint8)
    masks = torch.zeros(2, 3, 16, 16)
    for volume, depth in ((0, 1), (1, 2)):
        slices[volume, depth, 4:10, 3:12] += 150
        masks[volume, depth, 4:10, 3:12] = 1
    pixels = torch.stack([torch.stack([sam.prepare(s, grey=True) for s in v]) for v in slices])
    history = mm.fit(
        model,
        (pixels, masks),
        loss=segment.PromptedLoss(rounds=2),
        steps=25,
        batch_size=2,
        lr=0.02,
        progress=False,
    )
    assert history.losses[-1] < 0.75 * history.losses[0]


def test_overlap_is_counted_over_volumes() -> None:
    """With one click, the loss is that of the stacked logits; in empty slices the click stays."""
    model = BACKBONES["hf_sam"].fresh()
    pixels = torch.randn(2, 3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    truth = torch.zeros(2, 3, 16, 16, dtype=torch.bool)
    truth[0, 1, 3, 5] = truth[1, 2, 9, 2] = True
    found = segment.PromptedLoss(rounds=1)(model, (pixels, truth))
    points = torch.tensor([[5.0, 3.0], [2.0, 9.0]]).repeat_interleave(3, 0)[:, None]
    embeddings = segment.embed(model, pixels.flatten(0, 1))
    low, _ = segment.decode(model, embeddings, points, torch.ones(6, 1, dtype=torch.long))
    logits = torch.nn.functional.interpolate(low, (16, 16), mode="bilinear", align_corners=False)
    expected = segment.dice_cross_entropy(logits.view(2, 3, 16, 16), truth)
    assert torch.allclose(found, expected, rtol=1e-5)


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


# -- generated data --------------------------------------------------------------------------------


def test_scenes_are_those_of_their_seed() -> None:
    images, masks = scenes(5, seed=3)
    assert images.shape == (5, 64, 64, 3) and images.dtype == numpy.uint8
    assert masks.shape == (5, 2, 64, 64) and masks.dtype == bool
    assert not masks.all(1).any()  # only what is seen of each thing
    areas = masks.sum((2, 3))
    assert ((areas == 0) | (areas >= 250)).all() and (areas > 0).mean() > 0.8
    again, other = scenes(5, seed=3), scenes(5, seed=4)
    assert (again[0] == images).all() and (again[1] == masks).all()
    assert (other[0] != images).any()
    with pytest.raises(Refused, match="kind is 'unseen', expected one of seen, held_out_shapes"):
        scenes(1, seed=0, kind="unseen")


def test_what_is_seen_of_a_thing_stands_out() -> None:
    """Its mean colour differs from that of what is around it, in every scene with two things."""
    images, masks = scenes(20, seed=5)
    for image, (one, other) in zip(images.astype(float), masks, strict=True):
        if one.any() and other.any():
            around = ~(one | other)
            assert numpy.abs(image[one].mean(0) - image[around].mean(0)).max() > 15


def test_organs_are_those_of_their_seed_and_clicks_are_on_them() -> None:
    slices, masks, clicks = organs.volumes(4, seed=1)
    assert slices.shape == masks.shape == (4, 12, 64, 64) and slices.dtype == numpy.uint8
    assert clicks.shape == (4, 2)
    for volume, (x, y) in zip(masks, clicks.astype(int), strict=True):
        areas = volume.sum((1, 2))
        assert volume[areas.argmax(), y, x] and (areas == 0).any()  # it ends within the stack
    again = organs.volumes(2, seed=1)
    assert all((a == b[:2]).all() for a, b in zip(again, (slices, masks, clicks), strict=True))
    images, flat, points = organs.images(4, seed=1)
    assert images.shape == flat.shape == (4, 64, 64) and (points == clicks).all()
    assert (flat.sum((1, 2)) == masks.sum((2, 3)).max(1)).all()


def test_speckle_hides_in_one_slice_what_neighbours_show() -> None:
    """Inside an organ, what differs from its mean is unlike in adjacent slices."""
    slices, masks, _ = organs.volumes(6, seed=2)
    alike = []
    for volume, mask in zip(slices.astype(float), masks, strict=True):
        middle = int(mask.sum((1, 2)).argmax())
        both = mask[middle] & mask[middle + 1]
        alike.append(numpy.corrcoef(volume[middle][both], volume[middle + 1][both])[0, 1])
    assert numpy.mean(alike) < 0.5


def test_the_fixed_ellipsoid_by_hand() -> None:
    disc = organs.fixed_ellipsoid((5, 2), (8, 10), 1.5)
    assert [tuple(p) for p in numpy.argwhere(disc)] == [
        (row, column) for row in (1, 2, 3) for column in (4, 5, 6)
    ]
    ball = organs.fixed_ellipsoid((5, 2), (3, 8, 10), 1.5, 1.2)
    assert (ball[1] == disc).all() and ball[0].sum() == 1 and ball[2, 2, 5]


# -- far from its scenes ---------------------------------------------------------------------------


def volumes(count: int, seed: int) -> compare.Cases:
    return compare.Cases(*organs.volumes(count, seed=seed))


def test_an_adapter_that_was_not_trained_changes_no_answer() -> None:
    test, bare = volumes(2, 5), mm.load("tiny/sam")
    before = compare.predictions(bare, test)
    for method in ("ConvDepth", "MedSA, with depth", "decoder only"):
        model = mm.load("tiny/sam")
        own = compare.METHODS[method]
        mm.attach(model, list(own.adapters or ()), at=own.at(model) or None)
        after = compare.predictions(model, test)
        assert all((a == b).mean() > 0.999 for a, b in zip(after, before, strict=True))


def test_the_controls_have_as_many_parameters() -> None:
    def count(name: str) -> int:
        return mm.attach(
            mm.load("tiny/sam"), list(compare.METHODS[name].adapters or ())
        ).num_parameters

    wanted = count("ConvDepth")
    for control in ("ConvDepth of one slice (control)", "Convpass (control)"):
        assert count(control) == pytest.approx(wanted, rel=0.02)


def test_the_decoder_alone_is_all_of_the_decoder() -> None:
    model: Any = mm.load("tiny/sam")
    method = compare.METHODS["decoder only"]
    attachment = mm.attach(model, list(method.adapters or ()), at=method.at(model))
    whole = sum(p.numel() for p in model.model.mask_decoder.parameters())
    assert attachment.num_parameters == whole


def test_scores_are_those_of_each_case() -> None:
    cases = volumes(3, 6)
    same, none = [*cases.masks], [numpy.zeros_like(mask) for mask in cases.masks]
    assert compare.score(same, cases) == ([1.0] * 3, [0.0] * 3)
    assert cases.spacing == (2.5, 1.0, 1.0)
    far = math.sqrt(30**2 + 64**2 + 64**2)
    assert compare.score(none, cases) == ([0.0] * 3, pytest.approx([far] * 3))
    result = compare.Result("nothing", 0, 0, *compare.score(none, cases))
    assert result.mean == 0.0 and result.missed == 3 and result.distance == pytest.approx(far)


def test_mirrored_cases_keep_image_and_mask_together() -> None:
    cases = volumes(2, 7)
    model = mm.load("tiny/sam")
    pixels, masks = compare.training_tensors(model, cases)
    assert pixels.shape == (8, 12, 3, 64, 64) and masks.shape == (8, 12, 64, 64)
    plain = segment.Segmenter(model).prepare(cases.slices[1, 5], grey=True)
    for place, axes in enumerate([(), (-1,), (-2,), (-1, -2)]):
        assert torch.equal(pixels[2 * place + 1, 5], plain.flip(axes))
        assert torch.equal(masks[2 * place + 1, 5], torch.from_numpy(cases.masks[1, 5]).flip(axes))
    flat = compare.Cases(*organs.images(2, seed=7))
    assert compare.training_tensors(model, flat, flips=False)[0].shape == (2, 3, 64, 64)


def test_the_fixed_ellipsoid_is_the_best_one_on_the_training_cases() -> None:
    train = volumes(3, 8)
    result = compare.run_ellipsoid(train, train)
    shape = train.slices.shape[1:]
    for size in ((8.0, 3.0), (14.0, 5.0), (20.0, 2.0)):
        other = [organs.fixed_ellipsoid(click, shape, *size) for click in train.clicks]
        assert numpy.mean(compare.score_dice(other, train)) <= result.mean + 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ConvDepth", "MedSA, with depth", "Bottleneck"])
def test_a_few_steps_beat_the_frozen_backbone(method: str) -> None:
    train, test = volumes(12, 1), volumes(12, 2)
    model = mm.load("tiny/sam")
    frozen = numpy.mean(compare.score_dice(compare.predictions(model, test), test))
    data = compare.training_tensors(model, train)
    compare.adapt(model, compare.METHODS[method], data, name="organs", seed=0, steps=50, batch=2)
    adapted = numpy.mean(compare.score_dice(compare.predictions(model, test), test))
    assert adapted > frozen + 0.05
    with mm.disabled(model):
        again = numpy.mean(compare.score_dice(compare.predictions(model, test), test))
    assert again == frozen
