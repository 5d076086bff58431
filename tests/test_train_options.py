"""The options of `fit`, each seen to do what it says, and what is recorded."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import BACKBONES
from fitting import TARGETS, adapted, copies, distance, fit, pictures
from handmade import hidden, small
from snapshot import assert_close, assert_equal
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import mmadapt as mm
from mmadapt.errors import AttachError, CheckError, DataError
from mmadapt.train.optimiser import decays

# -- the optimiser ----------------------------------------------------------------------------------


def test_gates_norms_scales_and_biases_do_not_decay() -> None:
    backbone, attachment = adapted(mm.Bottleneck(4, scale_kind="channel", norm="before"))
    given: list[dict[str, Any]] = []

    def build(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        given.extend(groups)
        return torch.optim.AdamW(groups)

    fit(backbone, optimiser=mm.Optimiser(weight_decay=0.3, build=build), steps=1)
    names = {id(p): name.rpartition(".")[2] for name, p in attachment.named_parameters()}
    decay = {g["weight_decay"]: {names[id(p)] for p in g["params"]} for g in given}
    assert decay[0.3] == {"down", "up"}
    assert decay[0.0] >= {"down_bias", "up_bias", "scale", "norm_weight", "norm_bias"}


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("layers.0.linear.weight", (3, 3), True),
        ("layers.0.linear.bias", (3,), False),
        ("layers.0.conv.kernel", (3, 3, 3, 3), True),
        ("layers.0.gate", (1, 8, 1, 1), False),
        ("layers.0.norm1.weight", (1, 3, 1), False),
        ("layers.0.scale_out", (1, 3), False),
        ("scale.0.linear.weight", (3, 3), True),
        ("alpha", (), False),
    ],
)
def test_what_decays_is_told_by_name_and_axes(
    name: str, shape: tuple[int, ...], expected: bool
) -> None:
    assert decays(name, torch.zeros(shape)) is expected


def test_decay_acts_on_matrices_only() -> None:
    backbone, attachment = adapted()
    with torch.no_grad():
        for parameter in attachment.parameters():
            parameter.fill_(1.0)
    still = torch.zeros(())

    def loss(model: Any, batch: Any) -> Tensor:
        return still + 0 * distance(model, batch)

    recipe = mm.Optimiser(weight_decay=0.5, schedule="constant", warmup=0.0)
    fit(backbone, loss=loss, lr=0.1, steps=2, optimiser=recipe)
    for name, parameter in attachment.named_parameters():
        expected = 0.95**2 if parameter.ndim > 1 else 1.0
        assert torch.allclose(parameter, torch.full_like(parameter, expected)), name


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 0.01 + 0.99 * (2 + math.sqrt(2)) / 4, 0.505, None]),
        (lambda done: 2 - done, [1.0, 1.75, 1.5, 1.25]),
    ],
)
def test_rates_rise_and_follow_the_schedule(schedule: Any, expected: list[float | None]) -> None:
    history = fit(
        adapted()[0], steps=4, lr=0.2, optimiser=mm.Optimiser(schedule=schedule, warmup=0.5)
    )
    for rate, factor in zip(history.rates, expected, strict=True):
        assert factor is None or rate == pytest.approx(0.2 * factor)


def test_every_group_of_an_own_optimiser_keeps_its_rate() -> None:
    backbone, attachment = adapted()
    first, *rest = attachment.parameters()
    own = torch.optim.SGD([{"params": [first], "lr": 0.1}, {"params": rest, "lr": 0.4}])
    fit(backbone, optimiser=own, steps=4)
    assert own.param_groups[1]["lr"] == pytest.approx(4 * own.param_groups[0]["lr"])
    with pytest.raises(DataError, match=r"lr=0\.1 was given beside an optimiser that has rates"):
        fit(backbone, optimiser=own, lr=0.1)


def test_an_optimiser_made_before_attach_is_refused() -> None:
    backbone = small()
    early = torch.optim.AdamW(backbone.model.parameters())
    mm.attach(backbone, mm.Bottleneck(4), at="layers[*].mlp")
    with pytest.raises(AttachError) as caught:
        fit(backbone, optimiser=early)
    assert "lacks 12 of the 12 tensors that train, first '_mmadapt.layers.default" in str(
        caught.value
    )
    assert "made before attach" in caught.value.message
    assert "make it after attach" in caught.value.hint


def test_gradients_are_clipped_to_the_norm_asked_for() -> None:
    for clip in (0.01, None):
        backbone, attachment = adapted()
        start = copies(attachment)
        recipe = mm.Optimiser(
            clip=clip,
            weight_decay=0.0,
            schedule="constant",
            warmup=0.0,
            build=lambda groups: torch.optim.SGD(groups, lr=1.0),
        )
        history = fit(backbone, steps=1, optimiser=recipe)
        moved = torch.cat(
            [(a - b).flatten() for a, b in zip(start, copies(attachment), strict=True)]
        )
        expected = history.norms[0] if clip is None else clip
        assert float(moved.norm()) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"schedule": "cosin"}, r"schedule is 'cosin'(.|\n)*did you mean 'cosine'"),
        ({"warmup": 3}, "warmup is 3, expected a share"),
        ({"clip": 0}, "clip is 0, expected a norm above 0"),
    ],
)
def test_an_optimiser_without_meaning_is_refused(options: Any, text: str) -> None:
    with pytest.raises(DataError, match=text):
        mm.Optimiser(**options)


def test_a_build_that_makes_no_optimiser_is_refused() -> None:
    with pytest.raises(DataError, match=r"build returned list, expected a torch\.optim"):
        fit(adapted()[0], optimiser=mm.Optimiser(build=lambda groups: groups))  # type: ignore


# -- accumulation and precision ---------------------------------------------------------------------


def test_accumulated_batches_learn_as_one_large_batch() -> None:
    parts, whole = adapted(), adapted()
    half = [(hidden(8)[:4], TARGETS[:4]), (hidden(8)[4:], TARGETS[4:])]
    several = fit(parts[0], half, accumulate=2, lr=1e-2)
    one = fit(whole[0], [(hidden(8), TARGETS)], lr=1e-2)
    assert several.losses == pytest.approx(one.losses, rel=1e-5)
    assert_close(copies(parts[1]), copies(whole[1]), 1e-4)


@pytest.mark.parametrize("accumulate", [0, -1, 1.5])
def test_accumulation_is_a_whole_number(accumulate: Any) -> None:
    with pytest.raises(DataError, match=f"accumulate is {accumulate}"):
        fit(adapted()[0], accumulate=accumulate)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_the_forward_pass_runs_in_the_precision_asked_for(precision: torch.dtype) -> None:
    backbone, attachment = adapted()
    seen: list[torch.dtype] = []

    def loss(model: Any, batch: Any) -> Tensor:
        output = model(batch[0])
        seen.append(output.dtype)
        return F.mse_loss(output.float(), batch[1])

    history = fit(backbone, loss=loss, autocast=precision, steps=30, lr=1e-2)
    assert set(seen) == {precision}
    assert all(p.dtype == torch.float32 for p in attachment.parameters())
    assert history.losses[-1] < history.losses[0]
    reference = fit(adapted()[0], steps=30, lr=1e-2)
    assert history.norms[0] == pytest.approx(reference.norms[0], rel=0.05)  # unscaled again


def test_a_step_whose_scaled_gradient_overflows_is_passed_over() -> None:
    backbone, attachment = adapted()
    seen: list[Any] = []

    def loss(model: Any, batch: Any) -> Tensor:
        seen.append(copies(attachment))
        return distance(model, batch) * (1e36 if len(seen) == 2 else 1.0)

    history = fit(backbone, loss=loss, autocast=torch.float16, steps=4)
    assert not math.isfinite(history.norms[1])
    assert_equal(seen[2], seen[1])
    assert not all(map(torch.equal, seen[3], seen[2]))


def test_another_precision_is_refused() -> None:
    with pytest.raises(DataError, match=r"autocast is torch\.float64, expected torch\.bfloat16"):
        fit(adapted()[0], autocast=torch.float64)


def test_two_fits_of_different_precision_in_one_process_know_nothing_of_each_other() -> None:
    def run(autocast: Any) -> tuple[Tensor, ...]:
        model: Any = BACKBONES["open_clip"].fresh()
        attachment = mm.attach(model, mm.LoRA(2), at="vision.layers[*].attn.*")
        pixels = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))

        def loss(model: Any, batch: Tensor) -> Tensor:
            return model.encode_image(batch).float().square().mean()

        size = model.visual.image_size
        side = size[0] if isinstance(size, tuple) else size
        fit(model, pixels[..., :side, :side], loss=loss, autocast=autocast)
        with torch.no_grad():
            output = model.encode_image(pixels[..., :side, :side])
        return (*copies(attachment), output)

    alone = run(None)
    half = run(torch.bfloat16)
    assert_equal(run(None), alone)
    assert_equal(run(torch.bfloat16), half)
    assert not all(map(torch.equal, alone, half))


# -- the default loss -------------------------------------------------------------------------------


class Classifier(nn.Module):
    """Computes its own loss, as models of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4)

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.linear(inputs)
        loss = None if labels is None else F.mse_loss(logits, labels)
        return type("Output", (), {"loss": loss, "logits": logits})()


def test_without_a_loss_the_model_computes_it() -> None:
    data = {"inputs": hidden(8), "labels": TARGETS}
    history = mm.fit(Classifier(), data, steps=30, lr=1e-1, batch_size=8, progress=False)
    assert history.losses[-1] < history.losses[0]


def test_a_model_of_transformers_trains_from_a_dictionary() -> None:
    model = pictures()
    attachment = mm.attach(model, mm.Bottleneck(4))
    data = {"pixel_values": torch.randn(9, 3, 8, 8), "labels": torch.arange(9) % 3}
    start = copies(attachment)
    history = mm.fit(model, data, steps=2, progress=False)
    assert len(history.losses) == 2 and not any(map(torch.equal, start, copies(attachment)))
    with pytest.raises(
        DataError, match="the batch lacks pixel_values, which ViTForImage"
    ) as caught:
        mm.fit(model, {"image": data["pixel_values"], "labels": data["labels"]}, progress=False)
    assert "its keys: image, labels" in caught.value.message
    with pytest.raises(DataError, match="returned no loss; the batch has the keys pixel_values"):
        mm.fit(model, {"pixel_values": data["pixel_values"]}, progress=False)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ({"labels": TARGETS}, r"the batch lacks inputs, which Classifier\.forward needs"),
        (
            {"inputs": hidden(8), "labels": TARGETS, "age": torch.zeros(8)},
            r"Classifier\.forward takes no age; it takes inputs, labels",
        ),
        ({"inputs": hidden(8)}, "Classifier returned no loss; the batch has the keys inputs"),
        ((hidden(8), TARGETS), r"passed as model\(\*\*batch\); this one is a tuple"),
    ],
)
def test_a_batch_that_does_not_fit_the_model_is_named(data: Any, text: str) -> None:
    with pytest.raises(DataError, match=text):
        mm.fit(Classifier(), data, progress=False)


# -- data -------------------------------------------------------------------------------------------


def test_a_loss_is_given_what_the_data_yields() -> None:
    kinds: list[Any] = []

    def loss(model: Any, batch: Any) -> Tensor:
        kinds.append(batch)
        inputs = (
            batch
            if isinstance(batch, Tensor)
            else batch[next(iter(batch), 0)]
            if isinstance(batch, dict)
            else batch[0]
        )
        return model(inputs).square().mean()

    dataset = TensorDataset(hidden(8), TARGETS)
    for data in (
        hidden(8),
        (hidden(8), TARGETS),
        {"inputs": hidden(8), "targets": TARGETS},
        DataLoader(dataset, batch_size=4),
        lambda: iter([(hidden(8), TARGETS)]),
    ):
        fit(adapted()[0], data, loss=loss, steps=1)
    assert [type(kind) for kind in kinds] == [Tensor, tuple, dict, list, tuple]
    assert kinds[2]["inputs"].shape == (4, 5, 6)


def test_a_function_is_called_at_the_start_of_every_epoch() -> None:
    calls: list[int] = []

    def data() -> Any:
        calls.append(1)
        return [(hidden(8), TARGETS)] * 2

    fit(adapted()[0], data, steps=5)
    assert len(calls) == 3


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (TensorDataset(hidden(8)), "data is a TensorDataset(.|\n)*goes into a DataLoader"),
        ({"inputs": hidden(8), "names": ["a"] * 8}, "data is a dict whose values are not all tens"),
        (lambda: 3, r"data\(\) returned a int, expected an iterable"),
        (lambda: [], "data ran out of batches"),
        (torch.zeros(()), r"data tensors have \[0\] rows"),
    ],
)
def test_data_that_is_none_is_refused(data: Any, text: str) -> None:
    with pytest.raises(DataError, match=text):
        fit(adapted()[0], data)


# -- evaluation -------------------------------------------------------------------------------------


def test_patience_stops_early_and_brings_the_best_back() -> None:
    backbone, attachment = adapted()
    scores, seen = iter([0.1, 0.5, 0.4, 0.3, 0.9]), []

    def look(model: Any) -> dict[str, float]:
        seen.append(copies(attachment))
        return {"accuracy": next(scores), "other": 1.0}

    history = fit(backbone, steps=20, evaluation=mm.Evaluation(look, every=2, patience=2))
    assert history.stopped and not history.interrupted
    assert len(history.losses) == 8 and history.best == 4
    assert history.evaluations[-1] == (8, {"accuracy": 0.3, "other": 1.0})
    assert "stopped early after 8 of 20 steps" in repr(history)
    assert "best after 4" in repr(history)
    assert_equal(copies(attachment), seen[1])


def test_lower_may_be_better_and_nan_never_is() -> None:
    values = iter([3.0, float("nan"), 2.0, 4.0])
    evaluation = mm.Evaluation(lambda model: next(values), every=1, patience=3, higher=False)
    assert fit(adapted()[0], steps=4, evaluation=evaluation).best == 3


def test_a_plain_function_is_evaluated_after_the_last_step_too() -> None:
    history = fit(adapted()[0], steps=3, evaluation=lambda model: 2)
    assert history.evaluations == [(3, {"value": 2.0})]


@pytest.mark.parametrize(
    ("found", "text"), [("good", "returned 'good'"), ({}, "returned no value")]
)
def test_an_evaluation_that_is_no_number_is_refused(found: Any, text: str) -> None:
    with pytest.raises(DataError, match=text):
        fit(adapted()[0], evaluation=lambda model: found)


def test_patience_is_a_whole_number() -> None:
    with pytest.raises(DataError, match="patience is 0"):
        mm.Evaluation(len, patience=0)


# -- logs -------------------------------------------------------------------------------------------


def _lines(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))


def test_a_path_becomes_a_table_of_numbers(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "run.csv"
    history = fit(adapted()[0], steps=4, log=path, evaluation=mm.Evaluation(lambda m: 0.5, every=2))
    lines = _lines(path)
    assert lines[0] == ["step", "name", "value"]
    losses = [float(value) for _, name, value in lines[1:] if name == "loss"]
    assert losses == history.losses
    assert [line for line in lines[1:] if line[1] == "value"] == [
        ["2", "value", "0.5"],
        ["4", "value", "0.5"],
    ]


def test_a_resumed_run_continues_its_table_without_doubles(tmp_path: Path) -> None:
    options: Any = {"log": tmp_path / "run.csv", "checkpoint": tmp_path / "run.pt", "steps": 6}
    calls: list[int] = []

    def dying(model: Any, batch: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 6:
            raise CheckError("the end")
        return distance(model, batch)

    options["checkpoint"] = mm.Checkpoint(tmp_path / "run.pt", every=3)
    with pytest.raises(CheckError):
        fit(adapted()[0], loss=dying, **options)
    assert len(_lines(tmp_path / "run.csv")) == 1 + 5 * 3
    history = fit(adapted()[0], **options)
    lines = [line for line in _lines(tmp_path / "run.csv") if line[1] == "loss"]
    assert [int(line[0]) for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [float(line[2]) for line in lines] == history.losses


def test_a_writer_of_tensorboard_is_given_scalars(tmp_path: Path) -> None:
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with tensorboard.SummaryWriter(str(tmp_path)) as writer:
        history = fit(adapted()[0], steps=3, log=writer)
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("loss")
    assert [event.step for event in events] == [1, 2, 3]
    assert [event.value for event in events] == pytest.approx(history.losses)


def test_a_function_is_called_after_every_step_and_others_are_refused() -> None:
    seen: list[tuple[int, list[str]]] = []
    fit(adapted()[0], steps=2, log=lambda step, numbers: seen.append((step, list(numbers))))
    assert seen == [(1, ["loss", "rate", "norm"]), (2, ["loss", "rate", "norm"])]
    with pytest.raises(DataError, match="log is a int, expected a path, a writer"):
        fit(adapted()[0], log=3)


# -- the history ------------------------------------------------------------------------------------


def _history() -> mm.History:
    return fit(
        adapted()[0], steps=25, evaluation=mm.Evaluation(lambda m: {"accuracy": 0.5}, every=10)
    )


def test_a_history_is_a_table_and_a_figure(tmp_path: Path) -> None:
    history = _history()
    table = history.table(5)
    assert table.columns == ("steps", "loss", "rate", "accuracy")
    assert [row[0] for row in table] == ["1–5", "6–10", "11–15", "16–20", "21–25"]
    assert [row[3] for row in table] == [None, 0.5, None, 0.5, 0.5]
    assert table.rows[0][1] == pytest.approx(sum(history.losses[:5]) / 5)
    figure = history.plot()
    above, below = figure.axes
    assert list(above.lines[0].get_ydata()) == history.losses
    assert list(below.lines[0].get_xdata()) == [10, 20, 25]
    figure.savefig(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
    assert mm.History().plot().axes and not mm.History().table().rows


def test_a_history_goes_into_a_file_of_one_line_a_step(tmp_path: Path) -> None:
    history = _history()
    lines = _lines(history.to_csv(tmp_path / "history.csv"))
    assert lines[0] == ["step", "loss", "rate", "norm", "accuracy"]
    assert [float(line[1]) for line in lines[1:]] == history.losses
    assert [line[4] for line in lines[1:]].count("0.5") == 3 and lines[10][4] == "0.5"


# -- progress ---------------------------------------------------------------------------------------


def test_the_terminal_shows_the_live_loss_and_notes(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    options: Any = {"checkpoint": tmp_path / "run.pt", "progress": True, "label": "sketch"}
    history = fit(adapted()[0], steps=2, **options)
    assert f"loss {history.losses[0]:.4g}" in capsys.readouterr().err
    fit(adapted()[0], steps=4, **options)
    assert "sketch: resumed" in capsys.readouterr().err
