"""How much faster an epoch is when the frozen part of a ViT-B/16 is computed once.

    python benchmarks/cached_prefix.py

Random weights, 224 pixels, one thread, CPU time; writes cached_prefix.json beside itself and the
table in docs/performance.md. The epochs train the same adapter on the same images, and their losses
are compared.
"""

from __future__ import annotations

import json
import re
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from machine import processor

import mmadapt as mm

HERE = Path(__file__).resolve().parent
IMAGES, BATCH, EPOCHS, CLASSES = 16, 8, 3, 10
CASES: dict[str, Any] = {
    "top third (4 of 12 layers), bottleneck 16": (mm.Bottleneck(16), "vision.layers[-4:].mlp"),
    "last layer, bottleneck 16": (mm.Bottleneck(16), "vision.layers[-1].mlp"),
    "classifier only (pooled features)": (mm.Head(CLASSES), "logits"),
}


def train(adapter: Any, at: str, cached: bool) -> tuple[list[float], list[float]]:
    """Losses of every step and CPU seconds of every epoch."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(num_labels=CLASSES)).eval()
    mm.attach(model, adapter, at=at, seed=1)
    draw = torch.Generator().manual_seed(2)
    pixels = torch.randn(IMAGES, 3, 224, 224, generator=draw)
    labels = torch.randint(0, CLASSES, (IMAGES,), generator=draw)
    seconds: list[float] = []

    def loss(model: Any, batch: Any) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(model(batch[0]).logits, batch[1])

    def epochs() -> list[float]:
        losses: list[float] = []
        for _ in range(EPOCHS):
            started = time.process_time()
            history = mm.fit(
                model,
                (pixels, labels),
                loss=loss,
                steps=IMAGES // BATCH,
                batch_size=BATCH,
                progress=False,
            )
            seconds.append(time.process_time() - started)
            losses += history.losses
        return losses

    if not cached:
        return epochs(), seconds
    with mm.cached_prefix(model):
        return epochs(), seconds


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for name, (adapter, at) in CASES.items():
        plain, plain_seconds = train(adapter, at, False)
        cached, cached_seconds = train(adapter, at, True)
        difference = max(abs(a - b) for a, b in zip(plain, cached, strict=True))
        epoch, later = statistics.median(plain_seconds), statistics.median(cached_seconds[1:])
        rows.append(
            {
                "adapted": name,
                "epoch": round(epoch, 2),
                "first cached": round(cached_seconds[0], 2),
                "later": round(later, 2),
                "ratio": round(epoch / later, 1),
                "loss difference": float(f"{difference:.1g}"),
            }
        )
        print(rows[-1])
    result = {
        "machine": f"{processor()}, 1 thread, torch {torch.__version__}",
        "images": IMAGES,
        "rows": rows,
    }
    (HERE / "cached_prefix.json").write_text(json.dumps(result, indent=1) + "\n")
    write(result)


def table(result: dict[str, Any]) -> str:
    """The table of the page, in Markdown."""
    lines = [
        "| adapted | epoch without, s | first epoch with, s | later epochs, s | ratio | largest "
        "difference of a loss |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['adapted']} | {r['epoch']:.2f} | {r['first cached']:.2f} | {r['later']:.2f} | "
        f"{r['ratio']:.1f}× | {r['loss difference']:g} |"
        for r in result["rows"]
    ]
    note = f"{result['images']} images of 224 pixels an epoch; {result['machine']}; CPU time."
    return "\n".join([*lines, "", note])


def write(result: dict[str, Any]) -> None:
    """Put the table into the page."""
    page = HERE.parent / "docs" / "performance.md"
    text = page.read_text()
    pattern = r"(<!-- cached prefix -->\n).*?(\n<!-- end -->)"
    page.write_text(re.sub(pattern, lambda m: m[1] + table(result) + m[2], text, flags=re.S))


if __name__ == "__main__":
    main()
