"""A run that was stopped and taken up again is the run that was not, bit by bit."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from handmade import hidden, small
from snapshot import assert_equal
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

import mmadapt as mm
from mmadapt.errors import AdapterFileError, DataError

ROWS = 13
TARGETS = torch.randn(ROWS, 5, 4, generator=torch.Generator().manual_seed(4))


class Pairs(Dataset):
    """Rows with noise drawn from the global random states, as augmentations draw it."""

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        noise = torch.rand(()) + random.random() + float(numpy.random.rand())
        return hidden(ROWS)[row] + 0.1 * noise, TARGETS[row]


def tensors() -> Any:
    return (hidden(ROWS), TARGETS)


def shuffled() -> Any:
    return DataLoader(Pairs(), batch_size=4, shuffle=True)


def own_generator() -> Any:
    generator = torch.Generator().manual_seed(7)
    data = TensorDataset(hidden(ROWS), TARGETS)
    return DataLoader(data, batch_size=4, shuffle=True, generator=generator)


def generator_function() -> Any:
    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        order = list(range(ROWS))
        random.shuffle(order)
        for start in range(0, ROWS - 3, 3):
            rows = order[start : start + 3]
            yield hidden(ROWS)[rows] + 0.1 * torch.randn(3, 5, 6), TARGETS[rows]

    return batches


DATA = {f.__name__: f for f in (tensors, shuffled, own_generator, generator_function)}


def loss(model: Any, batch: Any) -> Tensor:
    inputs, targets = batch
    return F.mse_loss(F.dropout(model(inputs), 0.3), targets)


class Model:
    """An adapted backbone with dropout in its adapter, made anew."""

    def __init__(self) -> None:
        self.backbone = small()
        adapter = mm.Bottleneck(4, dropout=0.2)
        self.attachment = mm.attach(self.backbone, adapter, at="layers[*].mlp")
        torch.manual_seed(11)
        random.seed(11)
        numpy.random.seed(11)

    def fit(self, data: Any, **options: Any) -> mm.History:
        defaults = {"loss": loss, "steps": 12, "batch_size": 4, "progress": False, "lr": 1e-2}
        return mm.fit(self.backbone, data, **{**defaults, **options})

    @property
    def values(self) -> tuple[Tensor, ...]:
        return tuple(p.detach().clone() for p in self.attachment.parameters())


def stopped_by(calls: int) -> Any:
    """The loss, with a Ctrl-C in the given call."""
    made = [0]

    def interrupted(model: Any, batch: Any) -> Tensor:
        made[0] += 1
        if made[0] == calls:
            raise KeyboardInterrupt
        return loss(model, batch)

    return interrupted


@pytest.mark.parametrize("calls", [1, 2, 6, 9, 17, 23])
@pytest.mark.parametrize("data", DATA)
def test_a_resumed_run_equals_one_that_was_not_stopped(
    data: str, calls: int, tmp_path: Path
) -> None:
    """Two batches a step: odd calls stop at a step's start, even ones in its midst."""
    whole = Model()
    expected = whole.fit(DATA[data](), accumulate=2)
    first = Model()
    options: Any = {"accumulate": 2, "checkpoint": tmp_path / "run.pt"}
    cut = first.fit(DATA[data](), **{**options, "loss": stopped_by(calls)})
    assert cut.interrupted and len(cut.losses) == (calls - 1) // 2
    second = Model()
    torch.manual_seed(99)  # nothing of the first process is left
    random.seed(99)
    numpy.random.seed(99)
    history = second.fit(DATA[data](), **options)
    assert history.losses == expected.losses
    assert history.norms == expected.norms
    assert history.rates == expected.rates
    assert not history.interrupted
    assert_equal(second.values, whole.values)


@pytest.mark.parametrize("calls", [6, 9])
def test_augmentations_of_workers_are_drawn_again(calls: int, tmp_path: Path) -> None:
    def data() -> Any:
        return DataLoader(Pairs(), batch_size=4, shuffle=True, num_workers=1)

    whole = Model()
    expected = whole.fit(data(), steps=10)
    first = Model()
    first.fit(data(), steps=10, checkpoint=tmp_path / "run.pt", loss=stopped_by(calls))
    second = Model()
    history = second.fit(data(), steps=10, checkpoint=tmp_path / "run.pt")
    assert history.losses == expected.losses
    assert_equal(second.values, whole.values)


def test_a_run_killed_between_checkpoints_is_taken_up_at_the_last_one(tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def dying(model: Any, batch: Any) -> Tensor:
        calls.append(1)
        if len(calls) > 8:
            raise Killed
        return loss(model, batch)

    calls: list[int] = []
    whole, first, second = Model(), Model(), Model()
    torch.manual_seed(11)
    expected = whole.fit(shuffled())
    checkpoint = mm.Checkpoint(tmp_path / "run.pt", every=3)
    torch.manual_seed(11), random.seed(11), numpy.random.seed(11)
    with pytest.raises(Killed):
        first.fit(shuffled(), checkpoint=checkpoint, loss=dying)
    history = second.fit(shuffled(), checkpoint=checkpoint)
    assert "resumed" in history.notes[0] and "at step 6" in history.notes[0]
    assert history.losses == expected.losses
    assert_equal(second.values, whole.values)


def test_resuming_says_what_it_passes_over(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    Model().fit(shuffled(), checkpoint=path, loss=stopped_by(7))
    history = Model().fit(shuffled(), checkpoint=path)
    assert history.notes == [
        f"resumed {path} at step 6, passing over 2 batches of epoch 1 that it has seen"
    ]


def test_evaluation_and_patience_go_on_where_they_were(tmp_path: Path) -> None:
    values = [1.0, 3.0, 2.0, 2.5, 2.9, 0.0, 0.0, 0.0]

    def options(given: Iterator[float]) -> dict[str, Any]:
        return {"evaluation": mm.Evaluation(lambda model: next(given), every=1, patience=3)}

    whole = Model()
    expected = whole.fit(tensors(), **options(iter(values)))
    assert expected.stopped and expected.best == 2 and len(expected.losses) == 5
    path, given, first, second = tmp_path / "run.pt", iter(values), Model(), Model()
    cut = first.fit(tensors(), checkpoint=path, loss=stopped_by(4), **options(given))
    assert cut.evaluations == [(1, {"value": 1.0}), (2, {"value": 3.0}), (3, {"value": 2.0})]
    history = second.fit(tensors(), checkpoint=path, **options(given))
    assert history.evaluations == expected.evaluations
    assert history.best == 2 and history.stopped
    assert_equal(second.values, whole.values)
    again = Model()
    done = again.fit(tensors(), checkpoint=path, **options(iter(())))
    assert "is complete" in done.notes[-1] and done.losses == expected.losses
    assert_equal(again.values, whole.values)


def test_looking_at_the_model_changes_nothing() -> None:
    plain, watched = Model(), Model()
    plain.fit(shuffled())
    torch.manual_seed(11), random.seed(11), numpy.random.seed(11)

    def curious(model: Any) -> float:
        assert not any(module.training for module in model.modules())
        return float(torch.rand(())) + random.random() + float(model(hidden()).sum())

    watched.fit(shuffled(), evaluation=mm.Evaluation(curious, every=2))
    assert_equal(plain.values, watched.values)


def test_a_complete_run_is_not_made_again_unless_asked(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    first = Model()
    expected = first.fit(tensors(), checkpoint=path)
    second = Model()
    history = second.fit(tensors(), checkpoint=path, loss=stopped_by(1))
    assert not history.interrupted and history.losses == expected.losses
    assert "is complete; resume=False starts anew" in history.notes[0]
    assert_equal(second.values, first.values)
    third = Model()
    assert third.fit(tensors(), checkpoint=mm.Checkpoint(path, resume=False)).notes == []
    assert_equal(third.values, first.values)


@pytest.mark.parametrize("data", DATA)
def test_more_steps_go_on_from_the_end(data: str, tmp_path: Path) -> None:
    path, constant = tmp_path / "run.pt", mm.Optimiser(schedule="constant", warmup=0.0)
    whole = Model()
    expected = whole.fit(DATA[data](), steps=7, optimiser=constant)
    Model().fit(DATA[data](), checkpoint=path, steps=4, optimiser=constant)
    Model().fit(DATA[data](), checkpoint=path, steps=4, optimiser=constant)  # looked at only
    second = Model()
    history = second.fit(DATA[data](), checkpoint=path, steps=7, optimiser=constant)
    assert history.losses == expected.losses
    assert_equal(second.values, whole.values)


def test_running_means_of_a_step_that_was_cut_short_are_put_back(tmp_path: Path) -> None:
    def model() -> nn.Module:
        torch.manual_seed(3)
        return nn.Sequential(nn.Conv1d(5, 5, 1), nn.BatchNorm1d(5), nn.Linear(6, 4))

    def squared(model: Any, batch: Any) -> Tensor:
        return F.mse_loss(model(batch[0]), batch[1])

    calls = [0]

    def cut(model: Any, batch: Any) -> Tensor:
        value = squared(model, batch)
        calls[0] += 1
        if calls[0] == 6:
            raise KeyboardInterrupt
        return value

    options: Any = {"steps": 6, "accumulate": 2, "batch_size": 4, "progress": False}
    whole, first, second = model(), model(), model()
    mm.fit(whole, tensors(), loss=squared, **options)
    mm.fit(first, tensors(), loss=cut, checkpoint=tmp_path / "run.pt", **options)
    mm.fit(second, tensors(), loss=squared, checkpoint=tmp_path / "run.pt", **options)
    assert_equal(tuple(second.state_dict().values()), tuple(whole.state_dict().values()))


# -- refusals -----------------------------------------------------------------------------------


def test_another_attachment_is_refused_by_name_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    Model().fit(tensors(), checkpoint=path, steps=2)
    other = Model()
    mm.attach(other.backbone, mm.Bottleneck(3), at="layers[*].mlp", replace=True)
    before = [p.detach().clone() for p in mm.attachments(other.backbone)["default"].parameters()]
    with pytest.raises(AdapterFileError, match=r"state of another run.*numbers there") as caught:
        other.fit(tensors(), checkpoint=path)
    assert "resume=False" in caught.value.hint
    after = mm.attachments(other.backbone)["default"].parameters()
    assert_equal(tuple(before), tuple(p.detach() for p in after))


@pytest.mark.parametrize("options", [{"batch_size": 5}, {"seed": 1}])
def test_another_order_of_the_data_is_refused(options: Any, tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    Model().fit(tensors(), checkpoint=path, loss=stopped_by(3))
    with pytest.raises(DataError, match=r"the run that is resumed had \{'rows': 13, 'batch_size'"):
        Model().fit(tensors(), checkpoint=path, **options)
    with pytest.raises(DataError, match="had tensors as data"):
        Model().fit(shuffled(), checkpoint=path)


def test_data_that_became_shorter_is_refused(tmp_path: Path) -> None:
    path, batches = tmp_path / "run.pt", [(hidden(ROWS), TARGETS)] * 5
    Model().fit(batches, checkpoint=path, loss=stopped_by(5))
    with pytest.raises(
        DataError, match="ended after 2 batches; the run that is resumed had seen 4"
    ):
        Model().fit(batches[:2], checkpoint=path)


@pytest.mark.parametrize("content", [b"", b"no such thing", bytes(300)])
def test_a_damaged_file_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    path.write_bytes(content)
    with pytest.raises(AdapterFileError, match="cannot be read as the state of a run") as caught:
        Model().fit(tensors(), checkpoint=path)
    assert "delete it" in caught.value.hint


def test_a_file_with_code_in_it_is_refused_and_not_run(tmp_path: Path) -> None:
    class Code:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"format": 1, "tensors": Code()}, tmp_path / "run.pt")
    with pytest.raises(AdapterFileError):
        Model().fit(tensors(), checkpoint=tmp_path / "run.pt")
    assert not (tmp_path / "ran").exists()


def test_other_files_of_torch_are_refused(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(2)}, tmp_path / "weights.pt")
    with pytest.raises(AdapterFileError, match=r"not the state of a run of mmadapt\.fit"):
        Model().fit(tensors(), checkpoint=tmp_path / "weights.pt")
    torch.save({"format": 2}, tmp_path / "newer.pt")
    with pytest.raises(AdapterFileError, match="has format 2; this mmadapt reads 1"):
        Model().fit(tensors(), checkpoint=tmp_path / "newer.pt")


def test_the_checkpoint_interval_is_a_whole_number() -> None:
    with pytest.raises(DataError, match="every is 0"):
        mm.Checkpoint("run.pt", every=0)
