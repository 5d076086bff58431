"""What the views of `mm.ui` cost: a move of a slider, a first display, a tree of 2,000 sites.

    python benchmarks/views.py

CPU milliseconds on one thread, the median of repeated calls; of a move everything between the message
of the front end and what is sent back to it. Writes views.json beside itself and the table in
docs/widgets.md.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import processor
from pages import fill
from torch import nn

import mmadapt as mm
from mmadapt.tasks.few_shot.classifier import CosineHead, ZeroShotClassifier

HERE = Path(__file__).resolve().parent


def milliseconds(run: Callable[[int], Any], times: int = 15) -> float:
    """The median CPU time of a call; the first is not counted."""
    found = []
    run(0)
    for turn in range(1, times + 1):
        started = time.process_time()
        run(turn)
        found.append(1000 * (time.process_time() - started))
    return statistics.median(found)


def shots(classes: int, each: int, tests: int, width: int) -> Any:
    """A view of random embeddings."""
    torch.manual_seed(0)
    names = tuple(f"class {k}" for k in range(classes))
    head = CosineHead(torch.randn(classes, width), 100.0)
    classifier = ZeroShotClassifier(mm.load("tiny/clip"), head, names).eval()
    labels = torch.arange(classes).repeat(each)
    truth = torch.randint(classes, (tests,))
    return mm.ui.few_shot(
        torch.randn(len(labels), width), labels, torch.randn(tests, width), truth, classifier
    )


class Block(nn.Module):
    """Two linears."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(x))


def two_thousand() -> nn.Module:
    """A model with LoRA at 2,000 sites."""
    model = nn.Module()
    model.blocks = nn.ModuleList(Block() for _ in range(1000))
    mm.attach(model, mm.LoRA(4), at=["blocks[*].up", "blocks[*].down"])
    return model


def measure() -> dict[str, float]:
    """CPU milliseconds by what was done."""
    found: dict[str, float] = {}
    for label, size in (
        ("10 classes, 16 shots, 1,000 test images, 512 channels", (10, 16, 1000, 512)),
        ("100 classes, 16 shots, 2,500 test images, 512 channels", (100, 16, 2500, 512)),
    ):
        view = shots(*size)
        slider = view.widget.children[0].children[0]
        found[f"few_shot, a move: {label}"] = milliseconds(
            lambda turn, s=slider: s.set_state({"value": 1 + turn % 16})
        )
    model = two_thousand()
    found["inspect, 2,000 sites: numbers of every layer"] = milliseconds(
        lambda _: mm.ui.inspect(model), 3
    )
    tree = mm.ui.inspect(model)
    found["inspect, 2,000 sites: widgets"] = milliseconds(lambda _: (tree.close(), tree.widget), 5)
    (_, switch, opened, _), *_ = tree._rows.values()
    found["inspect, 2,000 sites: a switch of 1,000"] = milliseconds(
        lambda turn: switch.set_state({"value": bool(turn % 2)})
    )
    found["inspect, 2,000 sites: opening and closing a row of 1,000"] = milliseconds(
        lambda _: (opened.set_state({"value": True}), opened.set_state({"value": False}))
    )
    tree.resting = []
    found["inspect, 2,000 sites: picture"] = milliseconds(lambda _: tree._repr_mimebundle_(), 3)
    mixed = mm.ui.mix(model, lambda: 0)
    slider = mixed.widget.children[0].children[0]
    found["mix, 2,000 sites: a move, without the function"] = milliseconds(
        lambda turn: slider.set_state({"value": 0.02 * (turn % 50)})
    )
    return found


def table(results: dict[str, Any]) -> str:
    """The table in docs/widgets.md."""
    lines = ["| what | CPU ms |", "|---|---|"]
    lines += [f"| {what} | {cost:.1f} |" for what, cost in results["milliseconds"].items()]
    return "\n".join([
        *lines,
        "",
        f"Medians of repeated calls on one thread. {results['processor']}, torch {results['torch']}. "
        "`python benchmarks/views.py` prints it.",
    ])  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    results = {
        "processor": processor(),
        "torch": torch.__version__,
        "milliseconds": {what: round(cost, 2) for what, cost in measure().items()},
    }
    (HERE / "views.json").write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))
    page = HERE.parent / "docs" / "widgets.md"
    page.write_text(fill(page.read_text(), {"views": table(results)}))


if __name__ == "__main__":
    main()
