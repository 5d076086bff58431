"""The training loop: it learns, gives flags back, and stops without harm."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from backbones import BACKBONES, pixels
from fitting import INPUTS, TARGETS, adapted, copies, distance, fit
from handmade import hidden, small
from snapshot import assert_equal, assert_same_values, flags, values
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import mmadapt as mm
from mmadapt.errors import AttachError, CheckError, DataError
from mmadapt.train.batches import batches
from mmadapt.train.processes import Processes

# -- learning ---------------------------------------------------------------------------------------


def test_the_loss_falls_and_only_the_adapter_changes() -> None:
    backbone, attachment = adapted()
    before, start = values(backbone.model), copies(attachment)
    history = fit(backbone, steps=60, lr=1e-2, batch_size=8)
    assert len(history.losses) == history.steps == 60
    assert history.losses[-1] < 0.8 * history.losses[0]
    assert history.parameters == attachment.num_parameters
    assert not history.interrupted
    assert_same_values(before, values(backbone.model))
    assert not any(map(torch.equal, start, attachment.parameters()))
    assert "History(finished 60 steps" in repr(history)
    assert "<svg" in history._repr_html_()


def test_an_adapter_in_clip_learns_from_pixels() -> None:
    tiny = BACKBONES["open_clip"]
    model: Any = tiny.fresh()
    mm.attach(model, mm.LoRA(2), at="vision.layers[*].attn.*")
    goal = F.normalize(torch.randn(6, 8), dim=-1)

    def loss(model: Any, batch: Any) -> Tensor:
        images, goal = batch
        return -(F.normalize(model.encode_image(images), dim=-1) * goal).sum(-1).mean()

    history = fit(model, (pixels(6), goal), loss=loss, steps=40, lr=3e-2)
    assert history.losses[-1] < history.losses[0] - 0.1


def test_a_model_without_attachments_trains_whole() -> None:
    backbone = small()
    before = values(backbone.model)
    history = fit(backbone, lr=1e-2)
    after = values(backbone.model)
    assert history.parameters == sum(p.numel() for p in backbone.model.parameters())
    assert not any(torch.equal(before[name], after[name]) for name in before)


def test_only_the_active_attachment_trains() -> None:
    backbone, first = adapted()
    second = mm.attach(backbone, mm.Bottleneck(4), name="second", at="layers[*].mlp")
    kept = copies(first)
    fit(backbone)
    assert_equal(tuple(kept), tuple(first.parameters()))
    assert second.layers["0/layers[0].mlp:out"].up.any()


def test_the_same_seed_gives_the_same_run_and_leaves_the_global_random_state() -> None:
    runs = []
    for seed in (0, 0, 1):
        backbone, attachment = adapted()
        before = torch.get_rng_state()
        history = fit(backbone, batch_size=3, seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        runs.append((history.losses, copies(attachment)))
    assert runs[0][0] == runs[1][0]
    assert all(map(torch.equal, runs[0][1], runs[1][1]))
    assert runs[0][0] != runs[2][0]


# -- data -------------------------------------------------------------------------------------------


def test_tensors_are_drawn_epoch_by_epoch() -> None:
    seen: list[int] = []

    def loss(model: Any, batch: Any) -> Tensor:
        inputs, rows = batch
        seen.extend(rows.tolist())
        return model(inputs).square().mean()

    fit(adapted()[0], (hidden(8), torch.arange(8)), loss=loss, steps=4, batch_size=4)
    assert sorted(seen[:8]) == sorted(seen[8:]) == list(range(8))
    assert seen[:8] != list(range(8))


def test_an_iterable_is_run_through_again_and_again() -> None:
    loader = DataLoader(TensorDataset(hidden(8), TARGETS), batch_size=4)
    assert len(fit(adapted()[0], loader, steps=7).losses) == 7
    pairs = [(hidden(8), TARGETS)]
    assert len(fit(adapted()[0], pairs, steps=3).losses) == 3


def test_a_batch_that_is_a_dictionary_is_one_argument() -> None:
    batch = {"inputs": hidden(8), "targets": TARGETS}
    history = fit(
        adapted()[0], [batch], loss=lambda model, b: distance(model, (b["inputs"], b["targets"]))
    )
    assert len(history.losses) == 5


def test_a_single_tensor_is_data_too() -> None:
    history = fit(adapted()[0], hidden(8), loss=lambda model, x: model(x).square().mean())
    assert len(history.losses) == 5


def test_a_generator_that_runs_out_says_so_and_keeps_what_was_learned() -> None:
    backbone, attachment = adapted()
    before, start = flags(backbone.model), copies(attachment)
    generator = ((hidden(8), TARGETS) for _ in range(3))
    with pytest.raises(DataError, match="data ran out of batches") as caught:
        fit(backbone, generator, steps=10)
    assert "a list or a DataLoader" in caught.value.hint
    assert flags(backbone.model) == before
    assert not any(map(torch.equal, start, attachment.parameters()))
    assert all(p.grad is None for p in attachment.parameters())


def test_a_generator_that_is_long_enough_is_enough() -> None:
    generator = ((hidden(8), TARGETS) for _ in range(5))
    assert len(fit(adapted()[0], generator, steps=5).losses) == 5


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ((hidden(8), TARGETS[:5]), r"data tensors have \[5, 8\] rows, expected one number"),
        ((hidden(8)[:0], TARGETS[:0]), r"data tensors have \[0\] rows"),
        (3, "data is a int, expected tensors or an iterable of batches"),
        ([], "data ran out of batches"),
    ],
)
def test_data_that_cannot_be_batched_is_refused(data: Any, text: str) -> None:
    backbone, attachment = adapted()
    before, start = flags(backbone.model), copies(attachment)
    with pytest.raises(DataError, match=text):
        fit(backbone, data)
    assert flags(backbone.model) == before
    assert_equal(tuple(start), tuple(attachment.parameters()))


@pytest.mark.parametrize("steps", [0, -1, 2.5, "3"])
def test_steps_are_a_whole_number(steps: Any) -> None:
    with pytest.raises(
        DataError, match=f"steps is {steps!r}, expected a whole number of at least 1"
    ):
        fit(adapted()[0], steps=steps)


@pytest.mark.parametrize("batch_size", [0, -1, 1.5])
def test_the_batch_size_is_a_whole_number(batch_size: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    draws: list[int] = []
    original = torch.randperm

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        draws.append(1)
        if len(draws) > 20:
            raise TimeoutError("an epoch without a batch, again and again")
        return original(*args, **kwargs)

    monkeypatch.setattr(torch, "randperm", counted)
    try:
        fit(adapted()[0], batch_size=batch_size)
    except ValueError as error:
        if not isinstance(error, DataError):
            raise
        assert "batch_size" in str(error)  # noqa: PT017


# -- stopping -----------------------------------------------------------------------------------------


def _interrupted_at(step: int) -> Any:
    calls: list[int] = []

    def loss(model: Any, batch: Any) -> Tensor:
        calls.append(1)
        if len(calls) > step:
            raise KeyboardInterrupt
        return distance(model, batch)

    return loss


def test_interrupting_keeps_what_was_learned() -> None:
    backbone, attachment = adapted()
    before, start = flags(backbone.model), copies(attachment)
    history = fit(backbone, loss=_interrupted_at(3), steps=10)
    assert history.interrupted
    assert len(history.losses) == 3
    assert "interrupted after 3 of 10 steps" in repr(history)
    assert flags(backbone.model) == before
    assert not any(map(torch.equal, start, attachment.parameters()))
    assert all(p.grad is None for p in attachment.parameters())
    again, other = adapted()
    fit(again, loss=_interrupted_at(3), steps=10)
    assert_equal(tuple(copies(attachment)), tuple(copies(other)))


def test_interrupting_before_the_first_step_changes_nothing() -> None:
    backbone, attachment = adapted()
    start = copies(attachment)
    history = fit(backbone, loss=_interrupted_at(0))
    assert history.interrupted
    assert repr(history) == "History(no step was made)"
    assert_equal(tuple(start), tuple(attachment.parameters()))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_raises_and_changes_nothing(bad: float) -> None:
    backbone, attachment = adapted()
    before, start = flags(backbone.model), copies(attachment)
    with pytest.raises(CheckError) as caught:
        fit(backbone, loss=lambda model, batch: distance(model, batch) * bad)
    assert f"the loss is {bad} at step 0; nothing was changed by this step" in str(caught.value)
    assert "lower lr" in caught.value.hint
    assert flags(backbone.model) == before
    assert_equal(tuple(start), tuple(attachment.parameters()))


def test_a_gradient_that_is_not_finite_raises_and_changes_nothing() -> None:
    backbone, attachment = adapted()
    start = copies(attachment)

    def loss(model: Any, batch: Any) -> Tensor:
        return torch.sqrt((model(batch[0]) * 0).sum())  # 0, with an infinite slope

    with pytest.raises(CheckError, match="gradient"):
        fit(backbone, loss=loss)
    assert_equal(tuple(start), tuple(attachment.parameters()))


def test_an_error_in_the_loss_passes_through_with_flags_back() -> None:
    backbone, _ = adapted()
    before = flags(backbone.model)

    def loss(*args: Any) -> Tensor:
        raise LookupError("the user's")

    with pytest.raises(LookupError, match="the user's"):
        fit(backbone, loss=loss)
    assert flags(backbone.model) == before


@pytest.mark.parametrize(
    ("loss", "kind", "text"),
    [
        (lambda m, batch: 1.0, DataError, "loss returned float, expected a tensor with one number"),
        (
            lambda m, batch: m(batch[0]),
            DataError,
            "loss returned Tensor, expected a tensor with one number",
        ),
        (lambda m, batch: batch[1].sum(), CheckError, "does not depend on anything that trains"),
    ],
)
def test_a_loss_that_cannot_train_is_refused(loss: Any, kind: type[Exception], text: str) -> None:
    backbone, attachment = adapted()
    start = copies(attachment)
    with pytest.raises(kind, match=text):
        fit(backbone, loss=loss)
    assert_equal(tuple(start), tuple(attachment.parameters()))


def test_nothing_to_train_is_said_with_the_way_on() -> None:
    backbone, _ = adapted()
    mm.set_active(backbone)
    with pytest.raises(
        AttachError, match="nothing to train: no parameter requires a grad"
    ) as caught:
        fit(backbone)
    assert "set_active" in caught.value.hint
    classifier = BACKBONES["zero_shot_classifier"].fresh()
    mm.attach(classifier, mm.TipAdapter(4))
    with pytest.raises(AttachError, match="nothing to train"):
        fit(classifier)


# -- flags --------------------------------------------------------------------------------------------


def _watching(seen: list[dict[str, bool]]) -> Any:
    def loss(model: Any, batch: Any) -> Tensor:
        seen.append({name: module.training for name, module in model.named_modules()})
        return distance(model, batch)

    return loss


@pytest.mark.parametrize("training", [True, False])
def test_the_backbone_evaluates_and_the_active_adapter_trains(training: bool) -> None:
    backbone, _ = adapted()
    mm.attach(backbone, mm.Bottleneck(4), name="second", at="layers[*].mlp")
    backbone.model.train(training)
    backbone.model.get_submodule("head").train(not training)
    before = {name: module.training for name, module in backbone.model.named_modules()}
    seen: list[dict[str, bool]] = []
    fit(backbone, loss=_watching(seen), steps=2)
    for during in seen:
        assert {name for name, on in during.items() if on} == {
            name for name in during if name.startswith("_mmadapt.layers.second")
        }
    assert {name: module.training for name, module in backbone.model.named_modules()} == before


def test_the_loss_is_given_the_bare_model() -> None:
    backbone, _ = adapted()
    given: list[Any] = []

    def loss(model: Any, batch: Any) -> Tensor:
        given.append(model)
        return distance(model, batch)

    fit(backbone, loss=loss, steps=1)
    fit(backbone.model, loss=loss, steps=1)
    assert given == [backbone.model, backbone.model]


def test_train_mode_acts_when_called_and_gives_back_as_a_context() -> None:
    backbone, attachment = adapted()
    model = backbone.model
    model.train()
    before = flags(model)
    with mm.train_mode(backbone):
        assert not any(m.training for n, m in model.named_modules() if "_mmadapt" not in n)
        assert all(layer.training for layer in attachment.layers.values())
    assert flags(model) == before
    mm.train_mode(backbone)
    assert not model.training
    assert all(layer.training for layer in attachment.layers.values())


def test_train_mode_without_attachments_trains_the_whole_model() -> None:
    backbone = small()
    with mm.train_mode(backbone):
        assert all(module.training for module in backbone.model.modules())
    assert not any(module.training for module in backbone.model.modules())


def test_fit_works_inside_no_grad() -> None:
    backbone, attachment = adapted()
    start = copies(attachment)
    with torch.no_grad():
        fit(backbone)
    assert not any(map(torch.equal, start, attachment.parameters()))


def _endless() -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield hidden(8), TARGETS


def test_an_endless_generator_stops_with_the_steps() -> None:
    assert len(fit(adapted()[0], _endless(), steps=3).losses) == 3


def test_progress_is_shown_in_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    fit(adapted()[0], progress=True, label="sketch", steps=2)
    assert "sketch" in capsys.readouterr().err


def test_the_default_device_does_not_matter_to_the_order_of_rows() -> None:
    expected = batches((INPUTS,), 4, 0, Processes()).next().value
    with torch.device("meta"):
        found = batches((INPUTS,), 4, 0, Processes()).next().value
    assert_equal(found, expected)
