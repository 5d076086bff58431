"""What ends a run before its time, and what is left then: Ctrl-C, numbers that are not finite, no memory, no disk."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fitting
import pytest
import torch
from fitting import TARGETS, adapted, at_call, copies, fit
from handmade import hidden
from snapshot import assert_equal, flags
from torch import Tensor

import mmadapt as mm
from mmadapt.errors import CheckError, MmadaptError


@pytest.fixture(autouse=True)
def listening() -> Iterator[None]:
    """SIGINT interrupts, whoever started the tests: a shell's background jobs ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


# -- Ctrl-C -----------------------------------------------------------------------------------------


def interrupt(value: Tensor) -> Tensor:
    signal.raise_signal(signal.SIGINT)
    return value


def twice(value: Tensor) -> Tensor:
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)
    return value


def test_the_first_interrupt_ends_the_run_after_the_step() -> None:
    backbone, attachment = adapted()
    before, hooks = flags(backbone.model), list(backbone.model._forward_pre_hooks)
    handler = signal.getsignal(signal.SIGINT)
    history = fit(backbone, loss=at_call(3, interrupt), steps=10)
    assert history.interrupted and len(history.losses) == 3
    assert flags(backbone.model) == before
    assert list(backbone.model._forward_pre_hooks) == hooks
    assert signal.getsignal(signal.SIGINT) is handler
    again, other = adapted()
    fit(again, loss=at_call(4, lambda value: (_ for _ in ()).throw(KeyboardInterrupt)), steps=10)
    assert_equal(copies(attachment), copies(other))


def test_an_interrupt_in_the_last_step_leaves_a_finished_run() -> None:
    history = fit(adapted()[0], loss=at_call(5, interrupt))
    assert not history.interrupted and len(history.losses) == 5


def test_an_interrupt_while_batches_accumulate_drops_the_step() -> None:
    backbone, attachment = adapted()
    history = fit(backbone, loss=at_call(5, interrupt), accumulate=3)
    assert history.interrupted and len(history.losses) == 1
    assert all(p.grad is None for p in attachment.parameters())


def test_the_second_interrupt_raises() -> None:
    backbone, attachment = adapted()
    before = flags(backbone.model)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        fit(backbone, loss=at_call(2, twice))
    assert signal.getsignal(signal.SIGINT) is handler
    assert flags(backbone.model) == before
    assert all(bool(p.isfinite().all()) for p in attachment.parameters())


def test_an_interrupt_while_the_model_is_evaluated_is_one_too() -> None:
    def look(model: Any) -> float:
        signal.raise_signal(signal.SIGINT)
        return 1.0

    history = fit(adapted()[0], evaluation=mm.Evaluation(look, every=2))
    assert history.interrupted and len(history.losses) == 2
    assert history.evaluations == [(2, {"value": 1.0})]


def test_where_interrupts_are_ignored_they_stay_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    history = fit(adapted()[0], loss=at_call(2, interrupt))
    assert not history.interrupted and len(history.losses) == 5
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_a_run_in_another_thread_leaves_signals_alone() -> None:
    found: list[Any] = []
    before = signal.getsignal(signal.SIGINT)

    def run() -> None:
        found.append(fit(adapted()[0]))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert len(found[0].losses) == 5
    assert signal.getsignal(signal.SIGINT) is before


PROGRAM = """
import os, signal, sys
import torch
sys.path.insert(0, {tests!r})
from fitting import INPUTS, TARGETS, adapted, distance
import mmadapt as mm

signal.signal(signal.SIGINT, signal.default_int_handler)
backbone, attachment = adapted()
calls = []

def loss(model, batch):
    calls.append(1)
    if len(calls) in (3, 4):
        print("ready", len(calls), flush=True)
        while not sys.stdin.readline().strip() == "go":
            pass  # an interrupted read raises only when the handler does
    return distance(model, batch)

try:
    history = mm.fit(backbone, (INPUTS, TARGETS), loss=loss, steps=10, progress=True)
    print("returned", history.interrupted, len(history.losses), flush=True)
    mm.save(backbone, {folder!r})
except KeyboardInterrupt:
    print("raised", len(calls), flush=True)
"""


@pytest.mark.parametrize("times", [1, 2])
def test_a_real_ctrl_c_reaches_a_real_process(times: int, tmp_path: Path) -> None:
    program = PROGRAM.format(tests=str(Path(__file__).parent), folder=str(tmp_path / "adapter"))
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdin and process.stdout and process.stderr
    assert process.stdout.readline() == "ready 3\n"
    process.send_signal(signal.SIGINT)
    said = ""
    while "interrupt again" not in said:  # the handler has run
        said += process.stderr.read(1)
    if times == 2:
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "raised 3\n"
        process.communicate()
    else:
        output, _ = process.communicate("go\n")
        assert output == "returned True 3\n"
        assert (tmp_path / "adapter" / "adapter.safetensors").is_file()
    assert process.returncode == 0


# -- not finite -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_names_step_and_batch_and_keeps_what_was_good(bad: float) -> None:
    backbone, attachment = adapted()
    other, expected = adapted()
    fit(other, steps=3, optimiser=mm.Optimiser(schedule="constant", warmup=0.0))
    with pytest.raises(CheckError) as caught:
        fit(
            backbone,
            loss=at_call(4, lambda value: value * bad),
            optimiser=mm.Optimiser(schedule="constant", warmup=0.0),
        )
    text = str(caught.value)
    assert f"the loss is {bad} at step 3; nothing was changed by this step" in text
    assert "It was batch 1 of epoch 1, rows " in text
    assert_equal(copies(attachment), copies(expected))
    assert all(p.grad is None for p in attachment.parameters())


def test_the_batch_of_an_iterable_is_named_by_its_place() -> None:
    data = [(hidden(8), TARGETS)] * 3
    loss = at_call(5, lambda value: value * float("nan"))
    with pytest.raises(CheckError, match=r"at step 4; .* It was batch 1 of epoch 1\n"):
        fit(adapted()[0], data, loss=loss)


def test_a_gradient_that_is_not_finite_keeps_what_was_good_though_nothing_is_clipped() -> None:
    backbone, attachment = adapted()
    loss = at_call(2, lambda value: torch.sqrt(value * 0))
    kept: list[Any] = []

    def watched(model: Any, batch: Any) -> Tensor:
        kept.append(copies(attachment))
        return loss(model, batch)

    with pytest.raises(CheckError, match=r"the gradient's norm is nan at step 1; .*batch 1 of"):
        fit(backbone, loss=watched, optimiser=mm.Optimiser(clip=None))
    assert_equal(copies(attachment), kept[1])


def test_an_update_that_overflows_is_taken_back() -> None:
    backbone, attachment = adapted()
    kept: list[Any] = []

    build = torch.optim.SGD(attachment.parameters(), lr=0.1)

    def infinite(value: Tensor) -> Tensor:
        build.param_groups[0]["lr"] = float("inf")
        return value

    loss = at_call(3, infinite)

    def both(model: Any, batch: Any) -> Tensor:
        kept.append(copies(attachment))
        return loss(model, batch)

    with pytest.raises(CheckError, match=r"the update at step 2 left numbers that are not finite"):
        fit(backbone, loss=both, optimiser=mm.Optimiser(build=build, schedule="constant"))
    assert_equal(copies(attachment), kept[2])


# -- no memory --------------------------------------------------------------------------------------


def test_running_out_of_memory_says_what_to_do_with_numbers() -> None:
    backbone, attachment = adapted()
    before, start = flags(backbone.model), copies(attachment)

    def greedy(value: Tensor) -> Tensor:
        return value + torch.empty(2**50).sum()

    with pytest.raises(MmadaptError) as caught:
        fit(backbone, loss=at_call(1, greedy), accumulate=2)
    error = caught.value
    assert isinstance(error, torch.OutOfMemoryError)
    assert "out of memory at step 0, with a batch of 4 rows (f32[4,5,6], f32[4,5,4])" in str(error)
    assert "allocate" in error.message
    assert "batch_size=2 with accumulate=4" in error.hint
    assert "autocast=torch.bfloat16" in error.hint
    assert "now 3, from layers[0].mlp:out on" in error.hint
    assert isinstance(error.__cause__, RuntimeError)
    assert flags(backbone.model) == before
    assert_equal(copies(attachment), start)


def test_other_errors_of_the_loss_stay_what_they_are() -> None:
    def wrong(value: Tensor) -> Tensor:
        return value @ torch.zeros(3, 3)

    with pytest.raises(RuntimeError) as caught:
        fit(adapted()[0], loss=at_call(1, wrong))
    assert not isinstance(caught.value, MmadaptError)


# -- no disk ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def small_files(size: int) -> Iterator[None]:
    """No file of this process may grow beyond `size`: writing fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def _say_once(caught: Any, history: mm.History, path: Path) -> None:
    texts = [str(w.message) for w in caught if "could not be written" in str(w.message)]
    assert len(texts) == 1 and str(path) in texts[0] and "training continues" in texts[0]
    assert history.notes == texts
    assert len(history.losses) == 6


def test_a_checkpoint_that_cannot_be_written_is_said_once_and_training_goes_on(
    tmp_path: Path,
) -> None:
    path = tmp_path / "run.pt"
    backbone, attachment = adapted()
    checkpoint = mm.Checkpoint(path, every=2)
    with pytest.warns(UserWarning, match="could not be written") as caught, small_files(2_000):
        history = fit(backbone, steps=6, checkpoint=checkpoint)
    _say_once(caught, history, path)
    assert caught[0].filename == fitting.__file__  # said to the caller
    assert list(tmp_path.iterdir()) == []  # no half-written file either
    other, expected = adapted()
    fit(other, steps=6)
    assert_equal(copies(attachment), copies(expected))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts a small file system")
def test_a_full_file_system_keeps_the_checkpoint_of_before(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(disk)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this container may not mount")
    try:
        path = disk / "run.pt"
        backbone, _ = adapted()

        def filling(value: Tensor) -> Tensor:
            with contextlib.suppress(OSError), (disk / "other").open("wb") as file:
                file.write(bytes(10**6))
            return value

        with pytest.warns(UserWarning, match="could not be written") as caught:
            history = fit(
                backbone,
                steps=6,
                checkpoint=mm.Checkpoint(path, every=2),
                loss=at_call(3, filling),
            )
        _say_once(caught, history, path)
        (disk / "other").unlink()
        resumed, _ = adapted()
        assert "at step 2" in fit(resumed, steps=6, checkpoint=path).notes[0]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_log_that_cannot_be_written_is_said_once_too(tmp_path: Path) -> None:
    log = tmp_path / "run.csv"
    with pytest.warns(UserWarning, match="could not be written") as caught, small_files(100):
        history = fit(adapted()[0], steps=6, log=log)
    texts = [str(w.message) for w in caught]
    assert len(texts) == 1 and "the log could not be written" in texts[0]
    assert len(history.losses) == 6
