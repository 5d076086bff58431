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
    COLUMNS,
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
from sam_cost_tables import write
from torch._subclasses.fake_tensor import FakeTensorMode

import mmadapt as mm
from mmadapt.tasks import segment
from mmadapt.train.kept import kept_for_backward

HERE = Path(__file__).resolve().parent
RESULTS, DOCUMENT = HERE / "sam_cost.json", HERE.parent / "docs" / "sam_cost.md"


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
    rounds = (3, 3) if quick else (5, 5)
    forwards = interleaved({case.key: case.forward for case in cases}, rounds[0], 1, warm=False)
    training = [case for case in cases if case.trained]
    steps = interleaved({case.key: case.step for case in training}, rounds[1], 1, warm=False)
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
    return {
        "shape": list(shape),
        "slices": slices,
        "rounds": list(rounds),
        "rows": rows,
        **machine(),
    }


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
