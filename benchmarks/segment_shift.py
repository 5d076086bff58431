"""What adapting a SAM gains far from its scenes: grey stacks of slices and single slices, one click each.

    python benchmarks/segment_shift.py [--processes 1]

Writes `segment_shift.json` beside itself and puts the tables into docs/segmentation.md. What the file
already holds is not run again; delete it to start over. Each run has one CPU thread.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import statistics
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from machine import processor
from pages import fill

import mmadapt as mm
from mmadapt.tasks.segment import compare, organs

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "segment_shift.json"
PAGE = HERE.parent / "docs" / "segmentation.md"
BACKBONE = "tiny/sam"
SEEDS = (0, 1, 2)
SETTINGS: dict[str, dict[str, int]] = {
    "volumes": {"train": 24, "test": 24, "steps": 110, "batch": 2},
    "images": {"train": 24, "test": 96, "steps": 100, "batch": 8},
}
SCENES = 64
BASELINES = ("frozen", "best fixed ellipsoid")


def methods(part: str) -> list[str]:
    """Where there are no neighbours, methods that look for them, and their control, are left out."""
    names = list(compare.METHODS)
    if part == "images":
        names = [n for n in names if not compare.METHODS[n].depth and "one slice" not in n]
    return names


def cases(part: str) -> tuple[compare.Cases, compare.Cases]:
    """To train on and to test on, drawn from different seeds."""
    draw = organs.volumes if part == "volumes" else organs.images
    size = SETTINGS[part]
    return (
        compare.Cases(*draw(size["train"], seed=1)),
        compare.Cases(*draw(size["test"], seed=2)),
    )


def measure(part: str, method: str, seed: int) -> dict[str, Any]:
    """One row, in whatever process."""
    torch.set_num_threads(1)
    train, test = cases(part)
    model, size = mm.load(BACKBONE), SETTINGS[part]
    if method == "frozen":
        result = compare.run_frozen(model, test, scenes=SCENES)
    elif method == "best fixed ellipsoid":
        result = compare.run_ellipsoid(train, test)
    else:
        _, history, seconds = compare.adapt(
            model,
            compare.METHODS[method],
            compare.training_tensors(model, train),
            name="organs",
            seed=seed,
            steps=size["steps"],
            batch=size["batch"],
        )
        result = compare.finish(model, method, history, seconds, seed, test, SCENES)
    return {"part": part, **dataclasses.asdict(result)}


def jobs() -> list[tuple[str, str, int]]:
    """Every (part, method, seed), seed by seed; baselines have one seed."""
    found = [(part, method, 0) for part in SETTINGS for method in BASELINES]
    for seed in SEEDS:
        found += [(part, method, seed) for part in SETTINGS for method in methods(part)]
    return found


def finished(known: dict[str, Any], part: str) -> list[int]:
    """The seeds with which every method was run."""
    done = {(row["part"], row["method"], row["seed"]) for row in known["rows"]}
    return [s for s in SEEDS if all((part, method, s) in done for method in methods(part))]


def run(processes: int) -> dict[str, Any]:
    """Do what is still missing, and write the file after every row."""
    context = {
        "machine": f"{processor()}, 1 thread a run, torch {torch.__version__}",
        "backbone": BACKBONE,
        "weights": mm.zoo.entry(BACKBONE).sha256,
        "settings": SETTINGS,
        "scenes": SCENES,
        "rows": [],
    }
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else context
    if known["weights"] != context["weights"] or known["settings"] != SETTINGS:
        raise SystemExit(f"{RESULTS} is of other weights or settings; delete it to start over")
    done = {(row["part"], row["method"], row["seed"]) for row in known["rows"]}
    left = [job for job in jobs() if job not in done]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=spawn) as pool:
        for future in as_completed([pool.submit(measure, *job) for job in left]):
            row = future.result()
            known["rows"].append(row)
            order = {job: place for place, job in enumerate(jobs())}
            known["rows"].sort(key=lambda r: order[r["part"], r["method"], r["seed"]])
            RESULTS.write_text(json.dumps(known, indent=1) + "\n")
            dice = statistics.mean(row["dice"])
            print(f"{row['part']:8} {row['method']:32} {row['seed']}  Dice {dice:.3f}", flush=True)
    return known


def spread(values: list[float], digits: int) -> str:
    """Mean, and standard deviation over seeds where there are several."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def table(known: dict[str, Any], part: str) -> str:
    """Markdown, a row a method."""
    lines = [
        "| method | trained | Dice | HD95, mm | missed | source IoU box, on / off "
        "| source IoU point, on / off | training, CPU s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    seeds, size = finished(known, part), known["settings"][part]
    if not seeds:
        return "Not run yet; `python benchmarks/segment_shift.py` does."
    rows = [row for row in known["rows"] if row["part"] == part and row["seed"] in seeds]
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        depth = method in compare.METHODS and compare.METHODS[method].depth
        missed = statistics.mean(sum(value == 0 for value in row["dice"]) for row in own)
        seconds = statistics.mean(row["seconds"] for row in own)
        lines.append(
            "| "
            + " | ".join(
                [
                    f"**{method}**" if depth else method,
                    f"{own[0]['parameters']:,}",
                    spread([statistics.mean(row["dice"]) for row in own], 3),
                    spread([statistics.mean(row["distances"]) for row in own], 1),
                    f"{missed:.1f} of {len(own[0]['dice'])}",
                    source(own, "box"),
                    source(own, "point"),
                    f"{seconds:.0f}" if seconds else "–",
                ]
            )
            + " |"
        )
    lines.append(
        f"\n{size['train']} to train on, {size['steps']} steps of {size['batch']}, {size['test']} to "
        f"test on; {'seeds' if len(seeds) > 1 else 'one seed,'} {', '.join(map(str, seeds))}. "
        f"{known['machine']}. `python benchmarks/segment_shift.py` writes it."
    )
    return "\n".join(lines)


def source_table(metrics: dict[str, Any]) -> str:
    """What the backbone's own recipe measured."""
    seen, unseen = metrics["iou"]["seen"], metrics["iou"]["held_out_shapes"]
    lines = [
        f"| asked by | {metrics['n']:,} new scenes | {metrics['n']:,} scenes of shapes never shown |",
        "|---|---|---|",
    ]
    for name in seen:
        lines.append(f"| {metrics['definitions'][name]} | {seen[name]:.3f} | {unseen[name]:.3f} |")
    return "\n".join(lines)


def source(rows: list[dict[str, Any]], prompt: str) -> str:
    """What the scenes the backbone knows still get, with the adaptation on and off."""

    def mean(which: str) -> str:
        found = [row[which][prompt] for row in rows if row[which]]
        return f"{statistics.mean(found):.3f}" if found else "–"

    return f"{mean('source_on')} / {mean('source_off')}"


def write(document: str, known: dict[str, Any]) -> str:
    """The document with its tables between their markers."""
    tables = {part: table(known, part) for part in SETTINGS}
    tables["source"] = source_table(mm.zoo.entry(BACKBONE).metrics)
    return fill(document, tables)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="run nothing, only write the tables")
    options = parser.parse_args()
    known = json.loads(RESULTS.read_text()) if options.write else run(options.processes)
    PAGE.write_text(write(PAGE.read_text(), known))


if __name__ == "__main__":
    main()
