"""What `mmadapt demo volume` finds, as the table in docs/volumes.md.

    python benchmarks/volume_demo.py [--write]

Runs the demo on one CPU thread, keeps its numbers in `volume_demo.json` beside itself and puts the table
into the page; with `--write` only the latter.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from machine import processor
from pages import fill

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "volume_demo.json"
PAGE = HERE.parent / "docs" / "volumes.md"


def run() -> dict[str, Any]:
    """Run the demo and keep what it measured."""
    from mmadapt.demos import volume

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        volume.run(Path(folder))
        known = json.loads((Path(folder) / "results.json").read_text())
    return kept(known, f"{processor()}, 1 thread, torch {torch.__version__}")


def kept(known: dict[str, Any], machine: str) -> dict[str, Any]:
    """The numbers, and where they come from; the scan has no truth and so no numbers."""
    return {"machine": machine, **{key: value for key, value in known.items() if key != "scan"}}


def table(known: dict[str, Any]) -> str:
    """Markdown, a row a method."""
    lines = [
        "| method | trained | Dice, one click for all slices | HD95, mm | carried on, 1 click | 2 clicks "
        "| 3 clicks | the worst quarter, 1 click | 3 clicks |",
        "|---" * 9 + "|",
    ]
    for row in known["results"]:
        clicks = known["clicks"].get(row["method"])
        columns = ["–"] * 5
        if clicks:
            every = np.array(clicks)
            worst = every[np.argsort(every[:, 0])[: len(every) // 4]].mean(0)
            columns = [f"{value:.3f}" for value in (*every.mean(0), worst[0], worst[-1])]
        lines.append(
            f"| {row['method']} | {row['parameters']:,} | {mean(row['dice']):.3f} | "
            f"{mean(row['distances']):.1f} | {' | '.join(columns)} |"
        )
    clicked = len(known["clicks"]["frozen"])
    lines.append(
        f"\n{known['volumes']} to train on, {known['steps']} steps, {known['test_volumes']} to test on, the "
        f"first {clicked} of them clicked again and again; one seed. {known['machine']}. "
        "`python benchmarks/volume_demo.py` writes it."
    )
    return "\n".join(lines)


def write(document: str, known: dict[str, Any]) -> str:
    """The document with its table between the markers."""
    return fill(document, {"clicks": table(known)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="run nothing, only write the table")
    if not parser.parse_args().write:
        RESULTS.write_text(json.dumps(run(), indent=1) + "\n")
    PAGE.write_text(write(PAGE.read_text(), json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    main()
