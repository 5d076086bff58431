"""One batch, an adapter for each row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backbones import BACKBONES
from snapshot import flags, randomise

import mmadapt as mm
from mmadapt.errors import AttachError, CheckError

TINY = BACKBONES["hf_vit"]
CHOICES = [
    (mm.Bottleneck(3), None),
    (mm.Bottleneck(3, placement="parallel", activation="relu", scale=0.5), None),
    (mm.LoRA(2, alpha=3.0), None),
    (mm.LoRA(2), "*.layers[*].mlp.up"),
]
ROWS = ("a", None, "b", "a", "c")


def adapted(adapter: Any, at: Any) -> Any:
    model = TINY.fresh()
    for seed, name in enumerate("abc"):
        randomise(mm.attach(model, adapter, name=name, at=at), seed=seed)
    return model


def pixels() -> torch.Tensor:
    return torch.randn(len(ROWS), 3, 16, 16, generator=torch.Generator().manual_seed(0))


def alone(model: Any, images: torch.Tensor) -> torch.Tensor:
    """Each row by itself with its own adapter."""
    outputs = []
    for row, name in enumerate(ROWS):
        mm.set_active(model, *([name] if name else []))
        outputs.append(model(images[row : row + 1]).last_hidden_state)
    return torch.cat(outputs)


@pytest.mark.parametrize(("adapter", "at"), CHOICES, ids=lambda value: repr(value)[:40])
def test_each_row_answers_as_it_does_alone_with_its_adapter(adapter: Any, at: Any) -> None:
    model = adapted(adapter, at)
    images = pixels()
    with torch.no_grad():
        expected = alone(model, images)
        with mm.context(model, rows=ROWS):
            mixed = model(images).last_hidden_state
            again = model(images).last_hidden_state
    assert torch.allclose(mixed, expected, atol=2e-5)
    assert torch.equal(mixed, again)


@pytest.mark.parametrize(("adapter", "at"), CHOICES, ids=lambda value: repr(value)[:40])
def test_gradients_are_those_of_each_row_alone(adapter: Any, at: Any) -> None:
    model = adapted(adapter, at)
    images = pixels()

    def gradients(run: Any) -> dict[str, torch.Tensor]:
        for parameter in model.parameters():
            parameter.grad = None
        run().square().sum().backward()
        named = [
            (n, p) for name in "abc" for n, p in mm.attachments(model)[name].named_parameters()
        ]
        return {f"{i} {n}": p.grad for i, (n, p) in enumerate(named) if p.grad is not None}

    def one_by_one() -> torch.Tensor:
        return sum_of_rows(model, images)

    expected = gradients(one_by_one)
    with mm.context(model, rows=ROWS):
        found = gradients(lambda: model(images).last_hidden_state)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.allclose(found[key], value, atol=1e-4, rtol=1e-3), key


def sum_of_rows(model: Any, images: torch.Tensor) -> torch.Tensor:
    outputs = []
    for row, name in enumerate(ROWS):
        mm.set_active(model, *([name] if name else []))
        outputs.append(model(images[row : row + 1]).last_hidden_state)
    mm.set_active(model, "a", "b", "c")
    return torch.cat(outputs)


def test_the_choice_ends_with_the_block() -> None:
    model = adapted(mm.Bottleneck(3), None)
    mm.set_active(model, "b")
    images = pixels()
    before = flags(model)
    with torch.no_grad():
        expected = model(images).last_hidden_state
        with mm.context(model, rows=ROWS):
            assert not torch.equal(model(images).last_hidden_state, expected)
        assert torch.equal(model(images).last_hidden_state, expected)
    assert flags(model) == before


def test_weights_kept_without_gradients_follow_updates() -> None:
    model = adapted(mm.Bottleneck(3), None)
    images = pixels()
    with torch.no_grad(), mm.context(model, rows=ROWS):
        before = model(images).last_hidden_state
        for parameter in mm.attachments(model)["a"].parameters():
            parameter.mul_(2.0)
        after = model(images).last_hidden_state
    assert not torch.allclose(before[0], after[0])
    assert torch.equal(before[1:3], after[1:3])


def test_another_number_of_rows_is_an_error() -> None:
    model = adapted(mm.Bottleneck(3), None)
    with (
        mm.context(model, rows=("a", "b")),
        pytest.raises(CheckError, match="sees 5 rows, but adapters were chosen for 2"),
    ):
        model(pixels())
    with pytest.raises(AttachError, match="rows is empty"), mm.context(model, rows=()):
        pass


def test_what_cannot_differ_by_row_is_refused() -> None:
    clip = BACKBONES["open_clip"].fresh()
    mm.attach(clip, mm.LoRA(2), name="a")
    with (
        pytest.raises(AttachError, match="a call has one weight for all of them"),
        mm.context(clip, rows=("a",)),
    ):
        pass
    model = adapted(mm.Bottleneck(3), None)
    mm.attach(model, mm.Bottleneck(4), name="wide")
    mm.set_active(model, "a")
    with (
        pytest.raises(AttachError, match="cannot choose between 'a', 'wide' at"),
        mm.context(model, rows=("a", "wide")),
    ):
        pass
    with (
        pytest.raises(AttachError, match="no attachment is named 'd'"),
        mm.context(model, rows=("d",)),
    ):
        pass
    assert mm.active(model) == mm.Sum("a")
