"""The fused kernels: what they compute, in the interpreter, and what they compile to, without a GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from interpreted import QUICK, SLOW, Case
from mmadapt.kernels.cuda import compiler

from mmadapt.ops.reference import ACTIVATIONS

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed here"
)

#: of y and every gradient, against float64 with the same rounded inputs
BOUNDS = {"f32": 3e-6, "f16": 3e-3, "bf16": 2e-2}
#: where a relu's mask may flip because operands are rounded, as it does without a kernel
KINKED = {"f32": 3e-6, "f16": 2e-2, "bf16": 8e-2}


def interpreted(which: str) -> dict[str, Any]:
    """What `interpreted.py` printed; the interpreter has to be chosen before Triton is imported."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    env.pop("MMADAPT_OPS", None)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(HERE / "interpreted.py"), which],
        capture_output=True,
        text=True,
        env=env,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def quick() -> dict[str, Any]:
    return interpreted("quick")


@pytest.fixture(scope="module")
def slow() -> dict[str, Any]:
    return interpreted("slow")


def within_bounds(case: Case, errors: dict[str, float]) -> None:
    bound = (KINKED if case.activation == "relu" else BOUNDS)[case.dtype]
    assert {"y", "d x", "d down", "d up"} <= set(errors)
    assert {name: error for name, error in errors.items() if not error <= bound} == {}


@pytest.mark.parametrize("case", QUICK, ids=lambda case: case.key)
def test_outputs_and_gradients_are_the_references(case: Case, quick: dict[str, Any]) -> None:
    within_bounds(case, quick[case.key])


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW, ids=lambda case: case.key)
def test_and_over_ragged_sizes(case: Case, slow: dict[str, Any]) -> None:
    within_bounds(case, slow[case.key])


@pytest.mark.parametrize(
    "fact",
    [
        "the same bits again",
        "rows without an adapter",
        "nan as in the reference",
        "nan is there",
        "inf as in the reference",
        "inf is there",
        "rows apart in memory",
        "axes in another order",
        "rows that overlap",
        "a model",
        "a model's mixed rows",
    ],
)
def test_bit_for_bit(fact: str, quick: dict[str, Any]) -> None:
    assert quick["facts"][fact] is True


def test_a_model_reaches_the_kernels(quick: dict[str, Any]) -> None:
    assert quick["facts"]["launches"] == 2 * 2  # layers, alone and mixed


def test_every_activation_has_a_number_and_is_tried() -> None:
    from mmadapt.kernels.settings import NUMBERS

    assert set(NUMBERS) == set(ACTIVATIONS)
    assert {case.activation for case in QUICK} == set(ACTIVATIONS)


# -- the table of a mixed batch ------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 4, 16])
def test_tiles_cover_each_row_once_with_its_adapter(block: int) -> None:
    from mmadapt.kernels.table import RowOrder

    draw = torch.Generator().manual_seed(3)
    for adapters, rows, length in ((1, 1, 1), (3, 17, 1), (5, 11, 7), (4, 0, 3)):
        ids = torch.randint(-1, adapters, (rows,), generator=draw)
        placed = RowOrder(ids, length, adapters)
        seen = torch.full((rows * length,), -9)
        for start, stop, adapter in placed.tiles(block).tolist():
            if adapter >= -1:
                assert stop - start <= block
                tokens = placed.order[start:stop].long()
                assert bool((seen[tokens] == -9).all())
                seen[tokens] = adapter
        assert torch.equal(seen, ids.repeat_interleave(length))
        for n in range(adapters):
            tokens = placed.order[placed.first[n] : placed.first[n + 1]].long()
            assert bool((seen[tokens] == n).all()) and len(tokens) == int((seen == n).sum())


# -- ahead of time -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Triton brings ptxas for Linux only")
def test_no_kernel_spills_registers_on_any_architecture() -> None:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "mmadapt.kernels.compile_ahead", "--quick"],
        capture_output=True,
        text=True,
        env=env,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    clusters = 0 if compiler.missing() else 2  # the CUDA kernel's, from sm_90 on
    for architecture, many in (("sm_80", 6), ("sm_90", 6 + clusters), ("sm_100", 6 + clusters)):
        of_it = [line for line in lines if line.startswith(architecture)]
        assert len(of_it) == many
        for line in of_it:
            assert " 0 B spilled" in line
            assert not line.endswith("  0 MMA"), f"{line} uses no tensor core"
