"""Time the fused bottleneck on a GPU: both kernels beside eager and compiled torch, and what that decides.

    python kernels/bench/run.py --out kernels/bench/<device>.json [--minutes 9]
    python kernels/bench/run.py --table kernels/bench/<device>.json    # once more, from the file

Correctness comes first: every shape is checked against float64 and for equal bits in two runs before
anything is timed. What decides comes next, and what is nice to know last; the JSON is written after
every row, so that a run that is cut short leaves what it has. `--dry` walks through all of it with
one tiny shape, in Triton's interpreter and the emulator, and times nothing.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import rules
from device import Device
from parts import MANY, Parts
from vit_b import training_steps

#: seconds that a row may take, which have to be left for it to begin
ROW = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument(
        "--table", type=Path, help="print the table of this file and measure nothing"
    )
    parser.add_argument("--dry", action="store_true")
    asked = parser.parse_args()
    if asked.table:
        print(rules.table(json.loads(asked.table.read_text())))
        return
    device = Device(asked.dry, asked.minutes)
    if not asked.dry and not device.torch.cuda.is_available():
        sys.exit("there is no GPU here; --dry walks through it without one")
    found = Run(device, asked.out).everything()
    print(rules.table(found))


class Run:
    """One run, and the file it writes."""

    def __init__(self, device: Device, out: Path | None) -> None:
        self.device, self.out, self.parts = device, out, Parts(device)
        names = ("checked", "forward", "step", "mixed", "launch", "tiles", "vit_b")
        self.found: dict[str, Any] = {**device.facts(), **{name: [] for name in names}}

    def everything(self) -> dict[str, Any]:
        parts, dry = self.parts, self.device.dry
        many = 33 if dry else MANY
        parts.compiled_ahead()
        ceilings = self.found["ceilings"] = parts.ceilings()
        self.keep("checked", parts.checked())
        self.keep("forward", parts.forward(many, True, ceilings))
        self.keep("step", parts.step(many, True, compiled=True))
        self.keep("mixed", parts.mixed())
        self.keep("forward", parts.forward(many, False, ceilings))
        self.keep("step", parts.step(many, False, compiled=False))
        self.keep("launch", parts.launch())
        self.keep("vit_b", training_steps(self.device))
        for tokens in () if dry else (262_144, 16_384, 1_576):
            self.keep("forward", parts.forward(tokens, True, ceilings))
        self.keep("tiles", parts.tiles())
        return self.found

    def keep(self, name: str, rows: Iterable[dict[str, Any]]) -> None:
        """Rows of one part, until they end or time does."""
        rows = iter(rows)
        while self.device.left() > ROW:
            row = next(rows, None)
            if row is None:
                return
            self.found[name].append(row)
            print(name, json.dumps(row), flush=True)
            if self.out:
                partial = self.out.with_suffix(".partial")
                partial.write_text(json.dumps(self.found, indent=1) + "\n")
                os.replace(partial, self.out)
        print(f"out of time: {name} and what follows were not measured whole", flush=True)


if __name__ == "__main__":
    main()
