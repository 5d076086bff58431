"""The kernels' benchmark: what its numbers decide, and that it walks through every part without a GPU."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from emulated import COMPILER

BENCH = Path(__file__).parent.parent / "kernels" / "bench"
PARTS = ("checked", "forward", "step", "mixed", "launch", "tiles", "vit_b")


@pytest.fixture
def rules(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCH))
    import rules  # pyright: ignore[reportMissingImports]

    yield rules
    del sys.modules["rules"]


def measured(cluster: float = 85.0, triton: float = 100.0, eager: float = 400.0) -> dict[str, Any]:
    """A run on a device that copies 65,536 rows of 768 channels of bfloat16 in 70 µs."""
    found: dict[str, Any] = {"device": "a device", "torch": "2", **{part: [] for part in PARTS}}
    for channels, width in ((768, 64), (1024, 64), (1280, 32)):
        us = {"triton": triton, "cluster 2": 99.0, "cluster 4": cluster, "eager": eager}
        row = {"channels": channels, "width": width, "tokens": 65_536, "norm": True, "us": us}
        shares = {name: 70 / value for name, value in us.items() if name != "eager"}
        found["forward"].append({**row, "share_of_copy": shares})
        # few tokens decide nothing
        found["forward"].append({**row, "tokens": 197, "share_of_copy": {"triton": 0.01}})
        found["step"].append({**row, "us": {**us, "compiled": 170.0}})
        found["step"].append({**row, "norm": False})
    for adapters, taken in ((8, 900.0), (64, 120.0)):
        us = {"one": 100.0, "triton": taken, "loop": 999.0}
        found["mixed"].append({"adapters": adapters, "skewed": False, "us": us})
    return found


def test_each_target_is_met_or_missed_by_what_was_measured(rules: Any) -> None:
    verdicts = rules.verdicts(measured())
    assert [verdict.met for verdict in verdicts] == [
        False,
        True,
        False,
        True,
        True,
        True,
        False,
        True,
    ]
    assert [verdict.reached for verdict in verdicts] == [
        "70% to 70%",
        "70% to 70%",
        "82% to 82%",
        "1.18 in clusters of 4; Thresholds(cluster=4)",
        "4.00 to 4.00",
        "4.00 to 4.00",
        "1.70 to 1.70",
        "1.20 to 1.20",
    ]


def test_a_cluster_that_is_hardly_faster_is_not_chosen(rules: Any) -> None:
    verdict = rules.cluster_verdict(measured(cluster=90.0))
    assert verdict.met is False and verdict.reached == "1.11 in clusters of 4"
    one = measured()
    one["forward"] = [row for row in one["forward"] if row["channels"] != 1024]
    assert rules.cluster_verdict(one).met is None  # both shapes have to be there


def test_what_was_not_measured_is_said_to_be_so(rules: Any) -> None:
    nothing = {"device": "a device", "torch": "2", **{part: [] for part in PARTS}}
    assert {verdict.met for verdict in rules.verdicts(nothing)} == {None}
    assert "| not measured | – |" in rules.table(nothing)


def test_the_table_has_every_row(rules: Any) -> None:
    table = rules.table(measured())
    assert "| 768 → 64 | yes | 65,536 | 100 | – | 99 | 85 | 400 | – |" in table
    assert "**missed**" in table and table.count("→") >= 12


def test_predictions_turn_from_memory_to_the_cache_to_products(rules: Any) -> None:
    ceilings = {"copy_bytes_per_second": 4.3e12, "flop_per_second": 7.9e14}

    def microseconds(width: int, rows: int, cluster: int) -> float:
        row = {"tokens": 65_536, "channels": 768, "width": width}
        return rules.predicted(row, ceilings, rows, cluster)

    memory = 3 + 1e6 * 4 * 65_536 * 768 / 4.3e12
    assert microseconds(16, 128, 0) == pytest.approx(memory)
    assert microseconds(64, 128, 0) == pytest.approx(57.9, abs=0.2)  # the second cache binds
    assert microseconds(64, 64, 4) == pytest.approx(memory)
    assert microseconds(128, 64, 4) == pytest.approx(57.4, abs=0.2)  # products bind


def test_the_page_has_what_is_committed_of_every_compiled_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    import compiled_table  # pyright: ignore[reportMissingImports]

    found = json.loads((BENCH / "compiled.json").read_text())
    page = (BENCH.parents[1] / "docs" / "kernels.md").read_text()
    assert compiled_table.filled(page, found) == page
    assert [kernel for kernel in found["kernels"] if kernel["spilled"]] == []
    found["kernels"][-1]["spilled"] = 8
    assert "and 8 B spilled |" in compiled_table.filled(page, found)


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed here"
)
def test_what_is_committed_is_of_the_shapes_there_are() -> None:
    from mmadapt.kernels import compile_ahead

    found = json.loads((BENCH / "compiled.json").read_text())["kernels"]
    for architecture in compile_ahead.ARCHITECTURES:
        kept = [kernel for kernel in found if kernel["architecture"] == architecture]
        clusters = [k["tiles"]["cluster"] for k in kept if k["kernel"] == "cluster"]
        sizes = [size for _, size in compile_ahead.CLUSTERS] if architecture > 80 else []
        assert clusters == sizes
        assert len(kept) == 3 * len(compile_ahead.CASES) + len(sizes)


@pytest.mark.slow
@pytest.mark.skipif(
    COMPILER is None or importlib.util.find_spec("triton") is None,
    reason="the walk takes g++ and Triton's interpreter",
)
def test_every_part_runs_without_a_gpu(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    run = [sys.executable, "-W", "ignore", str(BENCH / "run.py")]
    done = subprocess.run([*run, "--dry", "--out", str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(out.read_text())
    assert all(found[part] for part in PARTS)
    paths = {"triton", "cluster 1", "cluster 2", "cluster 4"}
    assert set(found["checked"][0]["error"]) == paths
    assert {row["path"] for row in found["vit_b"]} == {"reference", "triton", "cluster 4"}
    again = subprocess.run([*run, "--table", str(out)], capture_output=True, text=True, check=True)
    assert again.stdout.strip() and again.stdout.strip() in done.stdout
