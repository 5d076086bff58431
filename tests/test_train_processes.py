"""Several processes learn what one does: started for real, with accelerate's launcher and torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from handmade import hidden, small

import mmadapt as mm
from mmadapt.errors import MissingDependencyError
from mmadapt.train.batches import batches
from mmadapt.train.processes import Processes

PROGRAM = Path(__file__).with_name("together.py")
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "ACCELERATE_USE_CPU": "true",
    "CUDA_VISIBLE_DEVICES": "",
}
ALONE = [sys.executable]
ACCELERATE = [
    *(sys.executable, "-m", "accelerate.commands.launch"),
    *("--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--main_process_port", "0"),
    *("--mixed_precision", "no", "--dynamo_backend", "no"),
]
TORCHRUN = [
    *(sys.executable, "-m", "torch.distributed.run"),
    *("--standalone", "--nproc_per_node", "2"),
]


def run(launcher: list[str], folder: Path, *scenarios: str) -> None:
    command = [*launcher, str(PROGRAM), str(folder), *scenarios]
    done = subprocess.run(
        command, capture_output=True, text=True, env=ENVIRONMENT, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]


def left(folder: Path, scenario: str, rank: int = 0) -> Any:
    return torch.load(folder / f"{scenario}-{rank}.pt", weights_only=True)


def assert_alike(found: Any, expected: Any, bound: float = 1e-6) -> None:
    assert len(found["values"]) == len(expected["values"]) > 0
    for one, other in zip(found["values"], expected["values"], strict=True):
        assert float((one - other).abs().max()) <= bound
    assert found["losses"] == pytest.approx(expected["losses"], abs=1e-6)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    run(ALONE, folder, "gradients", "rows", "turns", "passed_by", "plain", "cut", "refused", "four")
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("accelerate")
    folder = tmp_path_factory.mktemp("two")
    scenarios = ("gradients", "rows", "turns", "passed_by", "dropout", "cut", "refused", "uneven")
    run(ACCELERATE, folder, *scenarios)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["gradients", "rows", "turns", "passed_by", "refused"])
def test_two_processes_learn_what_one_does(scenario: str, alone: Path, two: Path) -> None:
    assert_alike(left(two, scenario), left(alone, scenario))
    for one, other in zip(
        left(two, scenario, 0)["values"], left(two, scenario, 1)["values"], strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.slow
def test_one_process_writes(two: Path) -> None:
    assert (two / "adapter-0" / "adapter.safetensors").is_file()
    assert not (two / "adapter-1").exists()
    backbone = small()
    attachment = mm.load_adapter(backbone, two / "adapter-0")
    for one, other in zip(attachment.parameters(), left(two, "rows")["values"], strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
def test_processes_drop_out_differently(two: Path) -> None:
    first, second = (left(two, "dropout", rank)["values"][0] for rank in (0, 1))
    assert not torch.equal(first, second)


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(alone: Path, two: Path) -> None:
    run(ALONE, two, "resumed")
    assert_alike(left(two, "resumed"), left(alone, "plain"))
    run(ACCELERATE, alone, "resumed")
    assert_alike(left(alone, "resumed"), left(alone, "plain"))


@pytest.mark.slow
def test_sharded_by_fsdp2_the_same_is_learned_saved_and_resumed(
    alone: Path, tmp_path: Path
) -> None:
    run(TORCHRUN, tmp_path, "fsdp", "fsdp_cut", "fsdp_late")
    assert_alike(left(tmp_path, "fsdp"), left(alone, "four"))
    from safetensors.torch import load_file

    whole = load_file(alone / "alone" / "adapter.safetensors")
    saved = load_file(tmp_path / "fsdp-0" / "adapter.safetensors")
    assert not (tmp_path / "fsdp-1").exists()
    assert saved.keys() == whole.keys()
    for name, value in whole.items():
        assert float((saved[name] - value).abs().max()) <= 1e-6, name
    assert "handmade.Small" in (tmp_path / "fsdp-0" / "adapter.json").read_text()
    run(ALONE, tmp_path, "resumed")  # from sharded to one
    assert_alike(left(tmp_path, "resumed"), left(alone, "plain"))
    run(ALONE, tmp_path, "plain")
    again = tmp_path / "again"
    again.mkdir()
    run(ALONE, again, "cut")
    run(TORCHRUN, again, "fsdp_resumed")  # and from one to sharded
    assert_alike(left(again, "fsdp_resumed"), left(alone, "plain"))


@pytest.mark.slow
def test_accelerate_shards_the_model_where_its_launcher_asks_for_it(
    alone: Path, tmp_path: Path
) -> None:
    pytest.importorskip("accelerate")
    run(TORCHRUN, tmp_path, "fsdp_launched")
    assert_alike(left(tmp_path, "fsdp_launched"), left(alone, "four"))
    assert not (tmp_path / "launched-1").exists()


# -- in this process --------------------------------------------------------------------------------


def test_without_accelerate_the_line_that_installs_it_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    backbone = small()
    mm.attach(backbone, mm.Bottleneck(4), at="layers[*].mlp")
    with pytest.raises(MissingDependencyError, match="needs accelerate") as caught:
        mm.fit(backbone, hidden(8), loss=lambda m, b: m(b).square().mean(), progress=False)
    assert caught.value.hint == "pip install 'mmadapt[train]'"


def test_one_process_is_a_group_of_its_own() -> None:
    alone = Processes()
    assert (alone.rank, alone.size, alone.main) == (0, 1, True)
    assert alone.mean(3.0) == 3.0 and alone.any(True) and alone.broadcast("a") == "a"


def test_rows_are_shared_out_without_overlap() -> None:
    found = []
    for rank in range(3):
        group = Processes()
        group.rank, group.size = rank, 3
        found += batches(torch.arange(12), 12, 0, group).next().value.tolist()
    assert sorted(found) == list(range(12))
    assert found == batches(torch.arange(12), 12, 0, Processes()).next().value.tolist()
