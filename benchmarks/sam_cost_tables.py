"""The tables of docs/sam_cost.md, made of sam_cost.json."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from sam_cost_cases import COLUMNS, SIZES, WAYS


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def gigabytes(value: float) -> str:
    """Three digits."""
    return f"{value / 1e9:.3g}" if value < 99.95e9 else f"{value / 1e9:.0f}"


def memory_tables(result: dict[str, Any]) -> str:
    """A table a size."""
    written = []
    for size in SIZES:
        found = {
            (row["way"], row["pixels"], row["dtype"]): row
            for row in result["rows"]
            if row["size"] == size
        }
        columns = [(pixels, str(dtype).removeprefix("torch.")) for pixels, dtype in COLUMNS]
        lines = []
        for way in WAYS:
            rows = [found[(way.name, *column)] for column in columns]
            cells = [f"{gigabytes(row['kept'])} → {gigabytes(row['checkpointed'])}" for row in rows]
            state = rows[0]["weights"] + 12 * rows[0]["trained"]
            lines.append([way.name, f"{rows[0]['trained'] / 1e6:.3g}", gigabytes(state), *cells])
        head = ["", "trained, M", "weights and state, GB"]
        head += [f"{pixels} px{', bf16' if 'b' in dtype else ''}" for pixels, dtype in columns]
        written.append(f"**{size}**\n\n{table(head, lines)}")
    return "\n\n".join(written)


def parts_table(result: dict[str, Any]) -> str:
    """What one block keeps."""
    words = {
        "windowed": "one windowed block",
        "global": "one global block",
        "encoder": "whole encoder",
        "matrix": "one global attention matrix",
        "input": "what enters a block",
    }
    rows = [
        [size, *(f"{found[word] / 1e6:,.1f}" for word in words)]
        for size, found in result["parts"].items()
    ]
    return table(["MB", *words.values()], rows)


def check_table(result: dict[str, Any]) -> str:
    """From shapes, allocated, and seen by the operating system."""
    lines = []
    for row in result["rows"]:
        beside = row["peak"] - row["gradients"]
        lines.append(
            [f"{row['way']}, {row['slices']} slices" if row["slices"] > 1 else row["way"],
             f"{row['shapes'] / 1e6:,.1f}", f"{row['real'] / row['shapes']:.4f}",
             f"{row['resident'] / row['shapes']:.2f}", f"{beside / row['shapes']:.2f}"]
        )  # fmt: skip
    head = ["vit_b", "from shapes, MB", "allocated ÷ shapes", "resident ÷ shapes", "peak ÷ shapes"]
    note = f"{result['pixels']} pixels, float32; {result['machine']}; {result['date']}."
    return f"{table(head, lines)}\n\n{note}"


def spread(values: list[float]) -> str:
    """Median with quartiles."""
    return f"**{values[1]:.2f}** ({values[0]:.2f}–{values[2]:.2f})"


def times_table(result: dict[str, Any]) -> str:
    """Ratios to the plain encoder."""
    lines = [
        [row["library"], row["case"], f"{row['trained'] / 1e6:.3g}", spread(row["forward"]["ratio"]),
         spread(row["step"]["ratio"]) if "step" in row else "–"]
        for row in result["rows"]
    ]  # fmt: skip
    width, blocks, heads, whole, pixels = result["shape"]
    base = {row["case"]: row for row in result["rows"] if row["library"] == "plain"}
    note = (
        f"Reduced SAM of transformers: {width} channels, {blocks} blocks of which {len(whole)} global, "
        f"{heads} heads, {pixels} pixels; {result['slices']} slices a batch, one volume; medians of "
        f"{result['rounds'][0]} and {result['rounds'][1]} rounds (quartiles). Plain: "
        f"{base['forward']['forward']['ms'][1] / 1000:.2f} s forward, "
        f"{base['everything trained']['step']['ms'][1] / 1000:.2f} s a step. "
        f"{result['machine']}; CPU time of the process; {result['date']}."
    )
    head = ["", "", "trained, M", "forward ÷ plain", "step ÷ everything trained"]
    return f"{table(head, lines)}\n\n{note}"


def epochs_table(result: dict[str, Any]) -> str:
    """Epochs with and without."""
    lines = [
        [row["trained"], f"{row['epoch']:.2f}", f"{row['first cached']:.2f}", f"{row['later']:.2f}",
         f"{row['ratio']:.1f}×", f"{row['loss difference']:g}",
         f"{row['bytes an image'] / 1e6:.2f}"]
        for row in result["rows"]
    ]  # fmt: skip
    head = ["trained", "epoch without, s", "first epoch with, s", "later epochs, s", "ratio",
            "largest difference of a loss", "MB an image"]  # fmt: skip
    note = (
        f"transformers' SAM with vit_b's encoder at {result['shape'][-1]} pixels, random weights; "
        f"{result['images']} images an epoch in batches of {result['batch']}, "
        f"two clicks each; {result['machine']}; CPU time of the process; {result['date']}."
    )
    return f"{table(head, lines)}\n\n{note}"


TABLES: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "parts": ("memory", parts_table),
    "memory": ("memory", memory_tables),
    "check": ("check", check_table),
    "times": ("times", times_table),
    "epochs": ("epochs", epochs_table),
}


def write(document: str, results: dict[str, Any]) -> str:
    """The page with its tables renewed."""
    for name, (part, make) in TABLES.items():
        if part in results:
            text = make(results[part])
            document = re.sub(
                rf"(<!-- {name} -->\n).*?(<!-- end -->)",
                lambda m, text=text: f"{m[1]}{text}\n{m[2]}",
                document,
                flags=re.S,
            )
    return document
