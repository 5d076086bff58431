"""`mm.ui.live`: training beside the notebook, with a clean stop."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest
import torch
from backbones import BACKBONES, pixels
from snapshot import flags
from torch import nn

import mmadapt as mm
from mmadapt.train.progress import Progress
from mmadapt.ui.training import _Frame


@pytest.fixture
def model() -> nn.Module:
    model = BACKBONES["open_clip_vision"].fresh()
    mm.attach(model, mm.Bottleneck(4), name="a")
    return model


def loss(model: Any, batch: Any) -> torch.Tensor:
    return model(batch).square().mean()


def test_a_live_run_is_fit(model: nn.Module) -> None:
    run = mm.ui.live(model, pixels(8), loss=loss, steps=5, batch_size=4, seed=3)
    history = run.wait(60)
    other = BACKBONES["open_clip_vision"].fresh()
    mm.attach(other, mm.Bottleneck(4), name="a")
    expected = mm.fit(other, pixels(8), loss=loss, steps=5, batch_size=4, seed=3, progress=False)
    assert history is not None
    assert history.losses == expected.losses == run.losses
    assert run.history is history
    assert not run.running
    assert repr(run) == repr(history)


class Paced:
    """A loss that waits in its third step until it is let go."""

    def __init__(self) -> None:
        self.reached, self.go, self.calls = threading.Event(), threading.Event(), 0

    def __call__(self, model: Any, batch: Any) -> torch.Tensor:
        self.calls += 1
        if self.calls == 3:
            self.reached.set()
            assert self.go.wait(60)
        return loss(model, batch)


def test_stop_ends_after_the_present_step_and_keeps_what_was_learned(model: nn.Module) -> None:
    before, paced = flags(model), Paced()
    run = mm.ui.live(model, pixels(8), loss=paced, steps=10**6, label="sketch")
    assert paced.reached.wait(60)
    assert run.running
    assert run.history is None
    assert len(run.losses) == 2
    assert "sketch: 2/1000000 steps, loss" in repr(run)
    run.stop()
    paced.go.set()
    history = run.wait(60)
    assert history is not None
    assert (len(history.losses), history.interrupted) == (3, True)
    assert flags(model) == before
    mm.fit(model, pixels(8), loss=loss, steps=1, progress=False)


def test_a_model_is_trained_once_at_a_time(model: nn.Module) -> None:
    paced = Paced()
    run = mm.ui.live(model, pixels(8), loss=paced, steps=3)
    assert paced.reached.wait(60)
    with pytest.raises(mm.errors.CheckError, match="is being trained already") as caught:
        mm.ui.live(model, pixels(8), loss=loss, steps=1)
    assert "run.stop()" in caught.value.hint
    paced.go.set()
    run.wait(60)
    again = mm.ui.live(model, pixels(8), loss=loss, steps=1).wait(60)
    assert again is not None
    assert len(again.losses) == 1


def test_what_a_run_raises_is_kept_and_raised_by_wait(model: nn.Module) -> None:
    def fails(model: Any, batch: Any) -> torch.Tensor:
        raise ValueError("no <loss>")

    run = mm.ui.live(model, pixels(4), loss=fails, steps=3)
    with pytest.raises(ValueError, match="no <loss>"):
        run.wait(60)
    assert isinstance(run.error, ValueError)
    assert "no &lt;loss&gt;" in run._repr_html_()
    assert "failed" in repr(run)
    assert mm.ui.live(model, pixels(4), loss=loss, steps=1).wait(60) is not None


def test_what_fit_refuses_is_raised_by_wait(model: nn.Module) -> None:
    run = mm.ui.live(model, pixels(4), loss=loss, steps=0)
    with pytest.raises(mm.errors.DataError, match="steps is 0"):
        run.wait(60)


def test_a_frame_tells_the_loss_the_speed_and_what_is_left() -> None:
    frame = _Frame("sketch", 100)
    frame.show = False
    frame._times.extend([(10.0, 0), (12.0, 20)])
    frame.update(20, "loss 0.5", [1.0, 0.5])
    frame._times.pop()
    assert frame.line() == "sketch: 20/100 steps, loss 0.5, 10 steps/s, about 8 s left"
    going, final = frame.bundle(False), frame.bundle(True)
    assert going["text/plain"] == frame.line()
    assert "width:20.0%" in going["text/html"]
    assert "width:20.0%" not in final["text/html"]
    assert "<polyline" in final["text/html"]
    frame.stop()
    assert "left" not in frame.line()


def test_fit_takes_a_progress_that_can_stop_it(model: nn.Module) -> None:
    class Three(Progress):
        def update(self, done: int, text: str = "", curve: Any = ()) -> None:
            super().update(done, text, curve)
            if done == 3:
                self.stop()

    shown = Three("x", 1, show=False)
    history = mm.fit(model, pixels(4), loss=loss, steps=50, progress=shown)
    assert (len(history.losses), history.interrupted, shown.total) == (3, True, 50)


@pytest.mark.slow
def test_a_notebook_keeps_the_last_frame_and_no_button(tmp_path: Any) -> None:
    import nbformat
    from nbclient import NotebookClient

    cells = [
        "import torch, mmadapt as mm\n"
        "model = torch.nn.Sequential(torch.nn.Linear(4, 4))\n"
        "loss = lambda model, batch: model(batch).square().mean()\n"
        "run = mm.ui.live(model, torch.randn(8, 4), loss=loss, steps=40, label='tiny')",
        "history = run.wait(); print(len(history.losses))",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    first, second = (cell.outputs for cell in notebook.cells)
    assert second[0].text.strip() == "40"
    frames = [out for out in first if "tiny: 40/40 steps" in out.data["text/plain"]]
    assert len(frames) == 1
    assert "<polyline" in frames[0].data["text/html"]
    assert len(first) == 2  # and what was the button
    (rest,) = [out for out in first if out is not frames[0]]
    assert rest.data["text/plain"] == ""
    assert "application/vnd.jupyter.widget-view+json" not in json.dumps(rest.data)
