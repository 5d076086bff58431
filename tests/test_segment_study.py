"""A study of one image, and images of any type of numbers."""

from __future__ import annotations

from typing import Any

import numpy
import PIL.Image
import pytest
import torch
from snapshot import randomise

import mmadapt as mm
from mmadapt.errors import BackboneError, DataError
from mmadapt.tasks import segment
from mmadapt.tasks.segment.scenes import scenes

Y, X = numpy.indices((20, 30))
DISC = (Y - 10) ** 2 + (X - 15) ** 2 < 36


def disc(points: Any, labels: Any, box: Any) -> Any:
    """A predictor that finds a disc; a click at the origin breaks it."""
    if (0, 0) in points:
        raise RuntimeError("out of memory")
    return DISC


@pytest.fixture(scope="module")
def sam() -> Any:
    return mm.load("tiny/sam")


@pytest.fixture(scope="module")
def image() -> tuple[numpy.ndarray, tuple[int, int]]:
    """A scene, and a pixel of one of its things."""
    images, masks = scenes(1, seed=3)
    y, x = numpy.argwhere(masks[0, 1])[masks[0, 1].sum() // 2]
    return images[0], (int(x), int(y))


# -- a study --------------------------------------------------------------------------------------


def test_a_study_answers_as_the_segmenter_does(sam: Any, image: Any) -> None:
    picture, at = image
    study = segment.ImageSegmenter(sam, picture)
    assert not study.mask.any() and study.score is None and study.scores == []
    study.click(at)
    direct = segment.Segmenter(sam)
    answer = direct.predict(direct.encode(picture), [at], [1], several=True)
    assert numpy.array_equal(study.masks, answer.masks.numpy())
    assert study.scores == pytest.approx(answer.overlaps.tolist())
    assert study.candidate == int(answer.overlaps.argmax())
    assert numpy.array_equal(study.mask, answer.best.numpy()) and study.score == max(study.scores)
    study.click((2, 60), label=0)
    study.set_box((5, 5, 60, 62))
    answer = direct.predict(direct.encode(picture), [at, (2, 60)], [1, 0], (5, 5, 60, 62))
    assert numpy.array_equal(study.masks, answer.masks.numpy())


def test_an_image_is_encoded_once_until_the_adapter_is_trained_or_switched(image: Any) -> None:
    sam: Any = mm.load("tiny/sam")
    attachment = mm.attach(sam, mm.Bottleneck(4), seed=0)
    runs: list[int] = []
    sam.model.vision_encoder.register_forward_hook(lambda *call: runs.append(1))
    study = segment.ImageSegmenter(sam, image[0])
    study.click(image[1])
    study.click((2, 60), 0)
    assert len(runs) == 1
    before = study.mask
    with torch.no_grad():
        for tensor in attachment.parameters():
            tensor.add_(0.3)
    study.again()
    assert len(runs) == 2 and not numpy.array_equal(study.mask, before)
    with mm.disabled(sam):
        study.again()
    assert len(runs) == 3 and numpy.array_equal(study.mask, before)
    study.undo()
    assert study.labels == [1]  # asking again is no step of its own


def test_an_image_is_encoded_anew_for_other_weights_and_where_sites_rest(image: Any) -> None:
    sam: Any = mm.load("tiny/sam")
    randomise(mm.attach(sam, mm.Bottleneck(4), seed=0))
    study = segment.ImageSegmenter(sam, image[0])
    study.click(image[1])

    def fresh() -> list[float]:
        other = segment.ImageSegmenter(sam, image[0])
        other.click(image[1])
        return other.scores

    whole = study.scores
    mm.set_active(sam, mm.Sum("default", weights=(0.1,)))
    study.again()
    assert study.scores == fresh() != whole
    mm.set_active(sam, "default")
    with mm.disabled(sam, at="vision.layers[*].mlp"):
        study.again()
        assert study.scores == fresh() != whole
    study.again()
    assert study.scores == whole


def test_candidates_are_chosen_by_number(sam: Any, image: Any) -> None:
    study = segment.ImageSegmenter(sam, image[0])
    study.click(image[1])
    for place in range(3):
        study.candidate = place
        assert numpy.array_equal(study.mask, study.masks[place])
        assert study.score == study.scores[place]
    with pytest.raises(DataError, match="candidate 3 was asked for, and there are 3"):
        study.candidate = 3
    assert study.candidate == 2


def test_steps_are_taken_back_one_by_one() -> None:
    study = segment.ImageSegmenter(disc, numpy.zeros((20, 30), numpy.uint8))
    study.click((3, 4))
    study.set_box((1, 1, 9, 9))
    study.set_box((2, 2, 9, 9))
    assert study.boxes == [(2, 2, 9, 9)]
    study.ask()
    assert study.points == [] and not study.mask.any()
    study.undo()
    assert study.boxes == [(2, 2, 9, 9)] and numpy.array_equal(study.mask, DISC)
    study.undo()
    assert study.boxes == [(1, 1, 9, 9)]
    study.draw(~DISC)
    assert numpy.array_equal(study.mask, ~DISC) and study.score is None
    study.undo()
    study.undo()
    assert study.points == [(3, 4)] and study.boxes == []
    study.undo()
    study.undo()  # nothing is left
    assert study.points == [] and len(study.masks) == 0
    study.click((3, 4))
    study.forget()
    study.undo()
    assert study.points == []


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (lambda s: s.click((30, 4)), r"\(30, 4\), outside of an image 30 wide and 20 high"),
        (lambda s: s.click((float("nan"), 4)), "outside of an image"),
        (lambda s: s.click((3, 4), label=2), "label 2 means nothing"),
        (lambda s: s.click((3, 4, 5)), r"have no common number of coordinates"),
        (lambda s: s.set_box((5, 5, 5, 9)), "which holds nothing"),
        (lambda s: s.set_box((5, 5, 40, 9)), "outside of an image"),
        (lambda s: s.ask([(3, 4)], [1, 0]), r"labels are of shape \(2,\)"),
        (lambda s: s.ask([], [1]), "labels and no points"),
        (lambda s: s.ask(boxes=[(1, 1, 5, 5), (2, 2, 6, 6)]), "2 boxes, and SAM takes one"),
        (lambda s: s.draw(DISC[:5]), r"\(1, 5, 30\) for an image \(20, 30\)"),
        (lambda s: s.draw(numpy.full((20, 30), 0.5)), "values from 0.5 to 0.5"),
        (lambda s: s.click((0, 0)), "out of memory"),
    ],
)
def test_a_step_that_is_refused_changes_nothing(step: Any, message: str) -> None:
    study = segment.ImageSegmenter(disc, numpy.zeros((20, 30), numpy.uint8))
    study.click((7, 8))
    with pytest.raises((DataError, RuntimeError), match=message):
        step(study)
    assert study.points == [(7, 8)] and study.labels == [1] and study.boxes == []
    assert numpy.array_equal(study.mask, DISC)
    study.undo()
    assert study.points == []


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (DISC[:, :5], r"\(1, 20, 5\) for an image \(20, 30\)"),
        (DISC * 0.3, "values from 0 to 0.3, expected 0 and 1"),
        ((DISC[None], [0.1, 0.2]), "1 masks and 2 scores"),
        (numpy.zeros((0, 20, 30), bool), r"\(0, 20, 30\)"),
    ],
)
def test_what_a_function_answers_is_checked(answer: Any, message: str) -> None:
    study = segment.ImageSegmenter(lambda *asked: answer, numpy.zeros((20, 30), numpy.uint8))
    with pytest.raises(DataError, match=message):
        study.click((7, 8))
    assert study.points == []


def test_a_function_is_told_points_labels_and_the_box() -> None:
    asked: list[Any] = []

    def predict(points: Any, labels: Any, box: Any) -> Any:
        asked.append((points, labels, box))
        return torch.from_numpy(numpy.stack([DISC, ~DISC])), torch.tensor([0.2, 0.9])

    study = segment.ImageSegmenter(predict, numpy.zeros((20, 30), numpy.uint8))
    study.set_box((1, 2, 3, 4))
    study.click((7, 8), 0)
    assert asked == [([], [], (1, 2, 3, 4)), ([(7, 8)], [0], (1, 2, 3, 4))]
    assert study.candidate == 1 and numpy.array_equal(study.mask, ~DISC)


def test_what_answers_no_clicks_is_refused() -> None:
    with pytest.raises(BackboneError, match="a dict answers no clicks"):
        segment.ImageSegmenter({}, numpy.zeros((20, 30), numpy.uint8))
    with pytest.raises(BackboneError, match="a Linear is no SAM"):
        segment.ImageSegmenter(torch.nn.Linear(2, 2), numpy.zeros((20, 30), numpy.uint8))


def test_an_adapter_says_its_window_and_another_is_refused() -> None:
    sam: Any = mm.load("tiny/sam")
    mm.attach(sam, mm.Bottleneck(4))
    segment.set_input(sam, window="ct abdomen")
    scan = numpy.linspace(-1000, 1000, 64 * 64, dtype=numpy.float32).reshape(64, 64)
    assert segment.ImageSegmenter(sam, scan).numbers.limits == segment.WINDOWS["ct abdomen"]
    assert segment.ImageSegmenter(sam, scan, (-175, 250)).numbers.limits == (-175, 250)
    with pytest.raises(DataError, match="trained with 'ct abdomen'"):
        segment.ImageSegmenter(sam, scan, "ct lung")


# -- images of any type ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    ["bool", "uint8", "int8", "uint16", ">i2", "int32", "uint64", "float16", "float32", "f8"],
)
def test_greys_of_any_type_become_bytes_from_black_to_white(kind: str) -> None:
    values = (numpy.arange(600).reshape(20, 30) % 2).astype(kind)
    numbers = segment.numbers_of(values)
    shown = numbers.bytes()
    assert shown.dtype == numpy.uint8 and shown.shape == (20, 30) and numbers.grey
    assert (shown.min(), shown.max()) == ((0, 1) if kind == "uint8" else (0, 255))


def test_values_from_0_to_1_are_taken_as_such_and_others_by_percentiles() -> None:
    assert segment.numbers_of(numpy.full((4, 4), 0.3)).limits == (0, 1)
    scan = numpy.arange(10_000.0).reshape(100, 100) - 5000
    low, high = segment.numbers_of(scan).limits
    assert -5000 < low < -4900 and 4900 < high < 5000
    assert segment.numbers_of(scan, "ct lung").limits == segment.WINDOWS["ct lung"]
    assert segment.numbers_of(scan, (0, 10)).bytes()[-1, -1] == 255
    assert segment.numbers_of(numpy.full((4, 4), 7)).limits == (7, 8)  # constant


def test_colours_tensors_and_pictures_are_taken() -> None:
    colour = numpy.random.default_rng(0).integers(0, 255, (6, 5, 3)).astype(numpy.uint8)
    assert numpy.array_equal(segment.numbers_of(colour).bytes(), colour)
    assert numpy.array_equal(segment.numbers_of(torch.from_numpy(colour)).bytes(), colour)
    assert numpy.array_equal(segment.numbers_of(colour / numpy.float32(255)).bytes(), colour)
    assert numpy.array_equal(segment.numbers_of(PIL.Image.fromarray(colour)).bytes(), colour)
    half = torch.rand(6, 5, 1, requires_grad=True, dtype=torch.bfloat16)
    assert segment.numbers_of(half).values.shape == (6, 5)
    alpha = PIL.Image.fromarray(colour).convert("RGBA")
    assert segment.numbers_of(alpha).values.shape == (6, 5, 3)
    deep = PIL.Image.fromarray(numpy.full((6, 5), 40_000, numpy.uint16))
    assert segment.numbers_of(deep).values.max() == 40_000


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (numpy.zeros((3, 8, 9), numpy.uint8), r"look like \(C, H, W\)"),
        (numpy.zeros((8, 9, 4), numpy.uint8), "four channels"),
        (numpy.zeros((8, 9, 2), numpy.uint8), r"\(8, 9, 2\), expected \(H, W, 3\)"),
        (numpy.zeros((0, 9)), "has no pixels"),
        (numpy.zeros((8, 9), complex), "has no pixels"),
        (numpy.array([["a"]]), "has no pixels"),
        (numpy.zeros(9), r"\(9,\)"),
        (numpy.full((8, 9), numpy.nan), "72 of 72 values are not numbers"),
        (numpy.array([[0.0, numpy.inf]]), "1 of 2 values"),
        ("scan.png", "has no pixels"),
        (None, "has no pixels"),
    ],
)
def test_what_is_no_image_is_refused(picture: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        segment.numbers_of(picture)


def test_a_window_that_is_none_is_refused() -> None:
    with pytest.raises(DataError, match="no window is named 'ct lungs'"):
        segment.numbers_of(numpy.zeros((8, 9)), "ct lungs")
    with pytest.raises(DataError, match="which is no range"):
        segment.numbers_of(numpy.zeros((8, 9)), (5, 5))
