"""What adapting SAM costs: memory for backward by configuration, time of a step, cached embeddings.

    python benchmarks/sam_cost.py                         # everything, about half an hour
    python benchmarks/sam_cost.py --parts memory,check    # some parts again, the rest stays
    python benchmarks/sam_cost.py --quick                 # tiny shapes, few rounds: does it run?

Writes sam_cost.json beside itself and the tables of docs/sam_cost.md; `--quick` prints and writes
nothing. `memory` computes shapes only. PEFT is installed by pip into a folder of its own; `--keep
FOLDER` keeps it there.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import gc
import json
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cost import overlay
from cost_clock import interleaved, peak_increase, quartiles, ratios
from machine import processor
from sam_cost_cases import (
    REDUCED,
    SIZES,
    TINY,
    VIT_B,
    WAYS,
    Way,
    checkpointed,
    published,
    reduced,
    timed,
)
from torch._subclasses.fake_tensor import FakeTensorMode

import mmadapt as mm
from mmadapt.tasks import segment
from mmadapt.train.kept import kept_for_backward

HERE = Path(__file__).resolve().parent
RESULTS, DOCUMENT = HERE / "sam_cost.json", HERE.parent / "docs" / "sam_cost.md"
#: pixels and precision of the memory tables
COLUMNS = [
    (1024, torch.float32),
    (1024, torch.bfloat16),
    (512, torch.float32),
    (256, torch.float32),
]


# -- memory, from shapes --------------------------------------------------------------------------


def memory(quick: bool) -> dict[str, Any]:
    """Bytes an image (or a slice) that the encoder keeps for backward, and what stays beside."""
    rows = []
    for size in ("vit_b",) if quick else SIZES:
        for pixels, dtype in [(256, torch.float32)] if quick else COLUMNS:
            rows += counted(size, pixels, dtype, WAYS)
            print(*rows[-len(WAYS) :], sep="\n", flush=True)
    return {"rows": rows, "parts": {size: parts(size) for size in SIZES}}


def counted(size: str, pixels: int, dtype: torch.dtype, ways: list[Way]) -> list[dict[str, Any]]:
    """One row a way, without a computation."""
    before, rows = torch.get_default_dtype(), []
    torch.set_default_dtype(dtype)
    try:
        with FakeTensorMode():
            model: Any = published(size, pixels)
            for way in ways:
                images = torch.empty(way.depth, 3, pixels, pixels)
                with way.attached(model):
                    rows.append(
                        {
                            "size": size,
                            "pixels": pixels,
                            "dtype": str(dtype).removeprefix("torch."),
                            "way": way.name,
                            **kept(model, images),
                        }
                    )
    finally:
        torch.set_default_dtype(before)
    return rows


def kept(model: Any, images: torch.Tensor) -> dict[str, int]:
    """What the encoder keeps for each image, and the bytes and numbers that are there anyway."""
    encoder, count = model.image_encoder, len(images)
    plain = kept_for_backward(model, lambda: encoder(images))
    with checkpointed(encoder):  # as backward finds it: its last block is there again
        recomputing = kept_for_backward(model, lambda: encoder(images))
    tensors = list(model.parameters())
    return {
        "kept": plain // count,
        "checkpointed": recomputing // count,
        "weights": sum(p.numel() * p.element_size() for p in tensors),
        "trained": sum(p.numel() for p in tensors if p.requires_grad),
    }


def parts(size: str) -> dict[str, int]:
    """Of a frozen encoder at 1024 pixels whose input wants a gradient."""
    width, _, heads, whole = SIZES[size]
    with FakeTensorMode():
        encoder: Any = published(size, 1024).image_encoder.requires_grad_(False)
        x = torch.empty(1, 64, 64, width, requires_grad=True)
        image = torch.empty(1, 3, 1024, 1024, requires_grad=True)
        return {
            "windowed": kept_for_backward(encoder, lambda: encoder.blocks[0](x)),
            "global": kept_for_backward(encoder, lambda: encoder.blocks[whole[0]](x)),
            "encoder": kept_for_backward(encoder, lambda: encoder(image)),
            "matrix": heads * 4096 * 4096 * 4,
            "input": x.numel() * 4,
        }


# -- the same, allocated --------------------------------------------------------------------------


def check(quick: bool) -> dict[str, Any]:
    """Real passes of vit_b beside the count from shapes."""
    pixels, rows = (64 if quick else 448), []
    ways = [dataclasses.replace(way, depth=min(way.depth, 2)) for way in WAYS]
    for way, shapes in zip(ways, counted("vit_b", pixels, torch.float32, ways), strict=True):
        torch.manual_seed(0)
        model: Any = published("vit_b", pixels)
        images = torch.randn(way.depth, 3, pixels, pixels)
        with way.attached(model):
            call = lambda model=model, images=images: model.image_encoder(images)  # noqa: E731
            real = kept_for_backward(model, call)
            resident = held(call)

            def step(model: Any = model, call: Callable = call) -> None:
                model.zero_grad(set_to_none=True)
                call().square().mean().backward()

            step()
            model.zero_grad(set_to_none=True)
            peak = peak_increase(step)
        rows.append(
            {"way": way.name, "slices": way.depth, "shapes": way.depth * shapes["kept"], "real": real,
             "resident": resident, "peak": peak, "gradients": 4 * shapes["trained"]}
        )  # fmt: skip
        print(rows[-1], flush=True)
        del model, call, step
        gc.collect()
    return {"pixels": pixels, "rows": rows, **machine()}


def held(call: Callable[[], Any]) -> int | None:
    """Bytes by which resident memory has grown while the graph of `call()` is there."""
    import ctypes

    if not Path("/proc/self/statm").exists():
        return None

    def now() -> int:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        return os.sysconf("SC_PAGE_SIZE") * int(Path("/proc/self/statm").read_text().split()[1])

    del_first = call()  # what the first pass alone allocates does not count
    del del_first
    before = now()
    graph = call()
    after = now()
    del graph
    return after - before


# -- time -----------------------------------------------------------------------------------------


def times(quick: bool, folder: Path) -> dict[str, Any]:
    """CPU time of the encoder, forward and with backward, by turns."""
    if not quick:
        sys.path.insert(0, str(overlay("peft", folder)))
    shape, slices = (TINY, 2) if quick else (REDUCED, 4)
    cases = list(timed(shape, slices))
    rounds = 3 if quick else 5
    forwards = interleaved({case.key: case.forward for case in cases}, rounds, 1, warm=False)
    training = [case for case in cases if case.trained]
    steps = interleaved({case.key: case.step for case in training}, rounds, 1, warm=False)
    rows = []
    for case in cases:
        row: dict[str, Any] = {
            "library": case.library,
            "case": case.name,
            "trained": sum(p.numel() for p in case.trained),
            "forward": {
                "ms": quartiles(forwards[case.key]),
                "ratio": quartiles(ratios(forwards[case.key], forwards["plain: forward"])),
            },
        }
        if case.key in steps:
            base = steps["plain: everything trained"]
            row["step"] = {
                "ms": quartiles(steps[case.key]),
                "ratio": quartiles(ratios(steps[case.key], base)),
            }
        rows.append(row)
        print(row, flush=True)
    return {"shape": list(shape), "slices": slices, "rounds": rounds, "rows": rows, **machine()}


def epochs(quick: bool) -> dict[str, Any]:
    """Epochs of a mask decoder that learns, its images encoded every time and once."""
    shape, images, batch = (TINY, 4, 2) if quick else (VIT_B, 8, 4)
    pixels = shape[-1]
    draw = torch.Generator().manual_seed(2)
    data = torch.randn(images, 3, pixels, pixels, generator=draw)
    masks = torch.zeros(images, pixels, pixels)
    masks[:, pixels // 4 : pixels // 2, pixels // 4 : 3 * pixels // 4] = 1

    def train(adapter: Any, at: Any, cached: bool) -> tuple[list[float], list[float], int]:
        model = reduced(shape)
        mm.attach(model, adapter, at=at(model), seed=1)
        loss, losses, seconds = segment.PromptedLoss(seed=3), [], []

        def run(epochs: int) -> None:
            for _ in range(epochs):
                start = time.process_time()
                losses.extend(
                    mm.fit(
                        model, (data, masks), loss=loss, steps=images // batch, batch_size=batch,
                        progress=False,
                    ).losses
                )  # fmt: skip
                seconds.append(time.process_time() - start)

        if not cached:
            run(2)
            return losses, seconds, 0
        with mm.cached_prefix(model) as cache:
            run(4)
            return losses, seconds, cache.bytes // images

    words = ("token_to_image", "mlp", "image_to_token")
    ways: dict[str, tuple[Any, Any]] = {
        "MedSA's decoder adapters": (
            mm.MedSA(), lambda model: [f"decoder.layers[*].{word}:out" for word in words],
        ),
        "the mask decoder in full": (mm.Unlock(), segment.decoder_sites),
    }  # fmt: skip
    rows = []
    for name, (adapter, at) in ways.items():
        plain, plain_seconds, _ = train(adapter, at, False)
        cached, cached_seconds, size = train(adapter, at, True)
        later = statistics.median(cached_seconds[1:])
        rows.append(
            {
                "trained": name,
                "epoch": round(statistics.median(plain_seconds), 2),
                "first cached": round(cached_seconds[0], 2),
                "later": round(later, 2),
                "ratio": round(statistics.median(plain_seconds) / later, 1),
                "loss difference": max(abs(a - b) for a, b in zip(plain, cached, strict=False)),
                "bytes an image": size,
            }
        )
        print(rows[-1], flush=True)
    return {"images": images, "batch": batch, "shape": list(shape), "rows": rows, **machine()}


def machine() -> dict[str, Any]:
    """What numbers were measured on."""
    return {
        "machine": f"{processor()}, 1 thread, torch {torch.__version__}",
        "date": datetime.date.today().isoformat(),
    }


# -- tables ---------------------------------------------------------------------------------------


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
        f"{result['rounds']} rounds (quartiles). Plain: "
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--parts", default="memory,check,times,epochs")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--keep", type=Path, help="folder for the peer's packages")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        made = {
            "memory": lambda: memory(options.quick),
            "check": lambda: check(options.quick),
            "times": lambda: times(options.quick, options.keep or Path(temporary)),
            "epochs": lambda: epochs(options.quick),
        }
        for part in options.parts.split(","):
            if part not in made:
                parser.error(f"no part {part!r}; the parts are {', '.join(made)}")
            found = made[part]()
            if not options.quick:
                results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
                results[part] = found
                RESULTS.write_text(json.dumps(results, indent=None, separators=(", ", ": ")) + "\n")
    if not options.quick:
        results = json.loads(RESULTS.read_text())
        DOCUMENT.write_text(write(DOCUMENT.read_text(), results))


if __name__ == "__main__":
    main()
