"""`mm.ui.few_shot` and the cached shots behind it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import mmadapt as mm
from mmadapt.tasks import few_shot
from mmadapt.tasks.few_shot.classifier import CosineHead, ZeroShotClassifier

NAMES = ("cat", "dog", "<owl>")
WIDTH = 6


def classifier() -> ZeroShotClassifier:
    draw = torch.Generator().manual_seed(0)
    head = CosineHead(torch.randn(3, WIDTH, generator=draw), 5.0)
    return ZeroShotClassifier(mm.load("tiny/clip"), head, NAMES).eval()


def embeddings(each: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noisy embeddings around one vector a class, which is not the classifier's."""
    draw = torch.Generator().manual_seed(9)
    middles = torch.randn(3, WIDTH, generator=draw)
    labels = torch.arange(3).repeat(each)
    noise = torch.randn(len(labels), WIDTH, generator=torch.Generator().manual_seed(seed))
    return middles[labels] + 0.4 * noise, labels


SHOTS, TEST = embeddings(8, 1), embeddings(30, 2)


def cached(**options: Any) -> few_shot.CachedShots:
    return few_shot.CachedShots(classifier(), *SHOTS, *TEST, **options)


def view(**options: Any) -> Any:
    return mm.ui.few_shot(*SHOTS, *TEST, classifier(), **options)


# -- what is computed -------------------------------------------------------------------------------


@pytest.mark.parametrize("shots", [1, 5, 8])
def test_logits_are_those_of_tip_adapter(shots: int) -> None:
    ours = cached(seed=4)
    chosen = ours._turn < shots
    kept = ours._labels[chosen]
    assert kept.bincount().tolist() == [shots] * 3
    model = classifier()
    attachment = mm.attach(model, mm.TipAdapter(entries=len(kept), residual=2.0, sharpness=3.0))
    rows = [row for row in range(len(SHOTS[1])) if (ours._cosines[0] - _cosine(row)).abs().min() < 1e-6]  # fmt: skip
    assert len(rows) == 24
    keys = _keys(ours)[chosen]
    few_shot.remember(attachment, keys, kept)
    with torch.no_grad():
        expected = model(TEST[0])
    assert torch.allclose(ours.logits(shots, 2.0, 3.0), expected, atol=1e-4)


def _cosine(row: int) -> Tensor:
    return torch.nn.functional.cosine_similarity(TEST[0][:1], SHOTS[0][row : row + 1])


def _keys(ours: few_shot.CachedShots) -> Tensor:
    """The shots in the order in which their cosines stand."""
    units = torch.nn.functional.normalize(SHOTS[0], dim=-1)
    cosines = torch.nn.functional.normalize(TEST[0], dim=-1) @ units.T
    order = torch.cdist(ours._cosines.T, cosines.T).argmin(1)
    return SHOTS[0][order]


def test_more_shots_hold_the_fewer_and_a_seed_draws_others() -> None:
    one, other = cached(seed=1), cached(seed=2)
    assert one.most == 8
    assert not torch.equal(one._turn, other._turn)
    assert set((one._turn < 2).nonzero().flatten().tolist()) < set((one._turn < 4).nonzero().flatten().tolist())  # fmt: skip


def test_no_shots_and_no_residual_are_the_class_names_alone() -> None:
    ours = cached()
    with torch.no_grad():
        expected = classifier()(TEST[0])
    for found in (ours.logits(0, 1.0, 5.0), ours.logits(4, 0.0, 5.0), ours.zero_shot):
        assert torch.allclose(found, expected, atol=1e-5)


def test_a_ratio_is_clip_adapters() -> None:
    clip = mm.load("tiny/clip")
    attachment = mm.attach(clip, mm.ClipAdapter(ratio=0.3, start="published"), name="c")
    torch.manual_seed(0)
    width = 128
    shots, test = torch.randn(6, width), torch.randn(9, width)
    labels, truth = torch.arange(6) % 2, torch.arange(9) % 2
    model = few_shot.zero_shot(clip, ("cat", "dog"))
    ours = few_shot.CachedShots(model, shots, labels, test, truth, attachment)
    with torch.no_grad():
        expected = model(few_shot.adapted(clip, test))
    assert torch.allclose(ours.logits(0, 0.0, 1.0, ratio=0.3), expected, atol=1e-4)
    assert not torch.allclose(ours.logits(0, 0.0, 1.0, ratio=0.6), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"features": torch.zeros(3, 5)},
            r"shots features are \(3, 5\), expected a tensor \(N, 6\)",
        ),
        ({"features": [1, 2]}, "shots features are list"),
        ({"labels": [0, 1]}, r"shots labels are \(2,\) for 24 embeddings"),
        ({"labels": SHOTS[1] + 1}, "run from 1 to 3, the classifier has 3 classes"),
        ({"labels": SHOTS[1].clamp(max=1)}, "there is no shot of <owl>"),
        (
            {"test_features": TEST[0] * float("nan")},
            "test features hold values that are not finite",
        ),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], text: str) -> None:
    given = dict(zip(("features", "labels", "test_features", "test_labels"), (*SHOTS, *TEST), strict=True))  # fmt: skip
    with pytest.raises(mm.errors.DataError, match=text):
        few_shot.CachedShots(classifier(), **{**given, **change})


def test_an_adapter_that_is_none_is_refused() -> None:
    attachment = mm.attach(mm.load("tiny/clip"), mm.Bottleneck(4), name="b")
    with pytest.raises(mm.errors.DataError, match="'b' holds 0 CLIP-Adapters, expected one"):
        cached(adapter=attachment)
    with pytest.raises(mm.errors.DataError, match="no CLIP-Adapter to mix in"):
        cached().logits(1, 1.0, 1.0, ratio=0.5)


# -- the view ---------------------------------------------------------------------------------------


def test_state_is_assigned_and_read() -> None:
    w = view()
    assert (w.shots, w.residual, w.sharpness, w.ratio) == (4, 1.0, 5.5, 0.0)
    w.shots, w.residual = 8, 10
    assert torch.equal(w.logits, w.cached.logits(8, 10.0, 5.5))
    assert w.accuracy.total == 90
    assert w.accuracy.accuracy > w.zero_shot.accuracy
    assert w.confusion.sum(1).tolist() == [30, 30, 30]
    assert w.confusion.trace() == w.accuracy.correct
    assert len(w.predictions) == 90
    w.change(shots=0, sharpness=2.0)
    assert w.accuracy == w.zero_shot
    assert len(w.differences) == 0


def test_differences_are_those_from_zero_shot_the_largest_first() -> None:
    names = [f"image {row}" for row in range(90)]
    w = view(names=names)
    w.change(shots=8, residual=30.0)
    before = w.cached.zero_shot.argmax(1)
    changed = {names[i] for i in (before != w.logits.argmax(1)).nonzero().flatten().tolist()}
    assert {row[0] for row in w.differences} == changed
    size = (w.logits.softmax(1) - w.cached.zero_shot.softmax(1)).abs().sum(1)
    order = [float(size[names.index(row[0])]) for row in w.differences]
    assert order == sorted(order, reverse=True)
    first = w.differences.rows[0]
    assert first[3].removesuffix(" ✓") == w.predictions[names.index(first[0])]


def test_a_slider_moves_the_number_that_python_computes() -> None:
    w = view()
    box = w.widget.children[0]
    shots, residual = box.children[:2]
    shots.set_state({"value": 8})
    residual.set_state({"index": len(residual.options) - 1})
    assert (w.shots, w.residual) == (8, 100.0)
    assert f"<b>{100 * w.accuracy.accuracy:.1f} %</b>" in box.children[-1].value
    assert "&lt;owl&gt;" in box.children[-1].value
    assert w.error is None


def test_an_assigned_value_between_the_steps_of_a_slider_is_shown() -> None:
    w = view()
    residual = w.widget.children[0].children[1]
    w.residual = 1.2345
    assert residual.value == 1.2345
    assert w.residual == 1.2345


def test_a_ratio_has_a_slider_only_with_an_adapter() -> None:
    assert len(view().widget.children[0].children) == 4


@pytest.mark.parametrize(
    ("name", "value"),
    [("shots", 9), ("shots", -1), ("shots", 1.5), ("shots", True), ("residual", -1), ("sharpness", "a"), ("ratio", 0.5), ("residual", float("nan"))],
)  # fmt: skip
def test_values_without_a_meaning_are_refused_and_nothing_changes(name: str, value: Any) -> None:
    w = view()
    before, logits = dict(w.values), w.logits
    with pytest.raises(mm.errors.DataError, match=name if name != "ratio" else "CLIP-Adapter"):
        setattr(w, name, value)
    assert w.values == before
    assert w.logits is logits


def test_a_view_is_a_picture_and_a_line() -> None:
    w = view()
    bundle = w._repr_mimebundle_()
    assert bundle["image/png"][:4] == b"\x89PNG"
    assert bundle["text/plain"].startswith("4 shots, residual 1, sharpness 5.5: ")
    curve, matrix = w.figure().axes[:2]
    assert [label.get_text() for label in curve.get_xticklabels()] == ["0", "1", "2", "4", "8"]
    assert curve.get_ylabel() == "test accuracy %"
    assert matrix.images[0].get_array().shape == (3, 3)


def test_names_have_to_be_as_many_as_images() -> None:
    with pytest.raises(mm.errors.DataError, match="2 names for 90 test images"):
        view(names=["a", "b"])
