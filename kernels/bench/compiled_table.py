"""Fill the tables of docs/kernels.md with what compiled.json says of the compiled kernels.

python kernels/bench/compiled_table.py
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from pages import fill

TRITON = {"forward": "forward", "input": "gradient to x", "weight": "to the weights"}


def filled(page: str, found: dict[str, Any]) -> str:
    """The page with both tables as they were measured."""
    return fill(page, {"Triton kernels": triton(found), "cluster kernel": clusters(found)})


def triton(found: dict[str, Any]) -> str:
    """Registers on each architecture, a row for each shape."""
    rows = _registers(found, lambda k: (_shape(k), k["kernel"]), set(TRITON))
    shapes = dict.fromkeys(shape for shape, _ in rows)
    cells = [[*shape, *(rows[shape, kernel] for kernel in TRITON)] for shape in shapes]
    return _table(["C → H", "", *TRITON.values()], cells)


def clusters(found: dict[str, Any]) -> str:
    """Registers on each architecture and what a block keeps in shared memory."""
    rows = _registers(
        found, lambda k: (_shape(k), tuple(k["tiles"].items()), k["shared"]), {"cluster"}
    )
    cells = []
    for (shape, tiles, shared), registers in rows.items():
        cut = dict(tiles)
        cells.append([
            *shape,
            str(cut["cluster"]),
            f"{16 * cut['warps']} rows × {cut['buffers']}, {cut['stages']} stages",
            f"{shared / 1024:.0f} kB",
            registers,
        ])  # fmt: skip
    return _table(["C → H", "", "cluster", "in shared memory", "", "registers"], cells)


def _registers(found: dict[str, Any], key: Any, kernels: set[str]) -> dict[Any, str]:
    """By key: registers on every architecture, in the file's order."""
    rows: dict[Any, list[str]] = {}
    for kernel in found["kernels"]:
        if kernel["kernel"] in kernels:
            said = str(kernel["registers"])
            rows.setdefault(key(kernel), []).append(
                said if not kernel["spilled"] else f"{said} and {kernel['spilled']} B spilled"
            )
    return {each: " / ".join(said) for each, said in rows.items()}


def _shape(kernel: dict[str, Any]) -> tuple[str, str]:
    case = kernel["case"]
    dtype = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[case["dtype"]]
    mixed = ", mixed" if case["mixed"] else ""
    return f"{case['channels']} → {case['width']}", f"{dtype}, T = {case['rows']:,}{mixed}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    page = Path(__file__).parents[2] / "docs" / "kernels.md"
    found = json.loads((Path(__file__).parent / "compiled.json").read_text())
    page.write_text(filled(page.read_text(), found))
