"""What further clicks are worth on generated volumes, slice by slice and in three dimensions.

    python benchmarks/volume_clicks.py [--write]

Writes `volume_clicks.json` beside itself and puts the table into docs/volumes.md. What the file already
holds is not run again; delete it to start over. One CPU thread.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import processor

import mmadapt as mm
from mmadapt.demos.volume import as_volume
from mmadapt.tasks import volume as volumes
from mmadapt.tasks.segment import compare, dice, organs, set_input
from mmadapt.train.fit import fit

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "volume_clicks.json"
PAGE = HERE.parent / "docs" / "volumes.md"
BACKBONE = "tiny/sam"
SEEDS = (0, 1, 2)
SETTINGS = {"train": 24, "test": 24, "steps": 110, "batch": 2, "clicks": 3}
SLICES = ("Bottleneck", "MedSA, with depth")
#: the learning rate and sizes were chosen on volumes of another seed than those of the test
THREE_D = mm.ThreeDSAM(zoom=2, window=4, planes=3, heads=4)
THREE_D_RATE = 2e-3
METHODS = ("frozen", *SLICES, "ThreeDSAM")


def trained(method: str, seed: int, train: compare.Cases) -> tuple[Any, int, float]:
    """The model, how many numbers were trained, and CPU seconds."""
    model = mm.load(BACKBONE)
    if method == "frozen":
        return model, 0, 0.0
    data = compare.training_tensors(model, train)
    size = {"steps": SETTINGS["steps"], "batch": SETTINGS["batch"]}
    if method in SLICES:
        attachment, _, seconds = compare.adapt(
            model, compare.METHODS[method], data, name="organs", seed=seed, **size
        )
        assert attachment is not None
        set_input(model, depth=organs.DEPTH)
        return model, attachment.num_parameters, seconds
    ways: Any = [(), (-1,), (-2,), (-1, -2)]
    values = torch.from_numpy(train.slices / np.float32(255))[:, None]
    values = torch.cat([values.flip(way) for way in ways])
    started = time.process_time()
    attachment = mm.attach(model, THREE_D, name="organs", seed=seed)
    fit(
        model,
        (values, data[1]),
        loss=volumes.VolumeLoss(seed=seed),
        steps=size["steps"],
        batch_size=size["batch"],
        lr=THREE_D_RATE,
        seed=seed,
        progress=False,
    )
    return model, attachment.num_parameters, time.process_time() - started


def study_of(method: str, model: Any, slices: np.ndarray) -> Callable[..., np.ndarray]:
    """A function that takes a click and gives the mask of the whole volume."""
    volume = as_volume(slices)
    if method == "ThreeDSAM":
        return volumes.VolumeSegmenter(model, volume, volume.size).click
    study = volumes.SliceSegmenter(model, volume)

    def click(point: Any, label: int) -> np.ndarray:
        study.click(point, label)
        return study.propagate()

    return click


def clicked(method: str, model: Any, test: compare.Cases) -> list[list[float]]:
    """Dice of each volume after each click; the first is the case's own, others on the largest error."""
    rows = []
    for slices, truth, (x, y) in zip(test.slices, test.masks, test.clicks, strict=True):
        click = study_of(method, model, slices)
        asked: Any = ((int(truth.sum((1, 2)).argmax()), y, x), 1)
        mask, row = np.zeros_like(truth), []
        for _ in range(SETTINGS["clicks"]):
            if asked is not None:
                mask = click(*asked)
            row.append(dice(mask, truth))
            asked = volumes.next_click(mask, truth)
        rows.append(row)
    return rows


def jobs() -> list[tuple[str, int]]:
    """Every (method, seed), seed by seed; the frozen model has one seed."""
    return [("frozen", 0), *((method, seed) for seed in SEEDS for method in METHODS[1:])]


def finished(known: dict[str, Any]) -> list[int]:
    """The seeds with which every method was run."""
    done = {(row["method"], row["seed"]) for row in known["rows"]}
    return [seed for seed in SEEDS if all((m, seed) in done for m in METHODS[1:])]


def run() -> dict[str, Any]:
    """Do what is still missing, and write the file after every row."""
    torch.set_num_threads(1)
    context = {
        "machine": f"{processor()}, 1 thread, torch {torch.__version__}",
        "backbone": BACKBONE,
        "weights": mm.zoo.entry(BACKBONE).sha256,
        "settings": SETTINGS,
        "three_d": THREE_D.to_json(),
        "rows": [],
    }
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else context
    if any(known[key] != context[key] for key in ("weights", "settings", "three_d")):
        raise SystemExit(f"{RESULTS} is of other weights or settings; delete it to start over")
    train = compare.Cases(*organs.volumes(SETTINGS["train"], seed=1))
    test = compare.Cases(*organs.volumes(SETTINGS["test"], seed=2))
    done = {(row["method"], row["seed"]) for row in known["rows"]}
    for method, seed in [job for job in jobs() if job not in done]:
        model, parameters, seconds = trained(method, seed, train)
        row = {"method": method, "seed": seed, "parameters": parameters, "seconds": seconds}
        known["rows"].append({**row, "dice": clicked(method, model, test)})
        RESULTS.write_text(json.dumps(known, indent=1) + "\n")
        print(method, seed, np.mean(known["rows"][-1]["dice"], 0).round(3), flush=True)
    return known


def table(known: dict[str, Any]) -> str:
    """Markdown, a row a method; the seeds with which all were run."""
    words = [f"{n} click{'s' if n > 1 else ''}" for n in range(1, SETTINGS["clicks"] + 1)]
    lines = [
        "| method | trained | " + " | ".join(words) + " | worst quarter: first and last click "
        "| training, CPU s |",
        "|---" * (len(words) + 4) + "|",
    ]
    seeds = finished(known)
    if not seeds:
        return "Not run yet; `python benchmarks/volume_clicks.py` does."
    for method in METHODS:
        own = [
            row
            for row in known["rows"]
            if row["method"] == method and (row["seed"] in seeds or method == "frozen")
        ]
        every = [np.array(row["dice"]) for row in own]
        worst = [v[np.argsort(v[:, 0])[: len(v) // 4]] for v in every]
        ends = [statistics.mean(float(v[:, place].mean()) for v in worst) for place in (0, -1)]
        seconds = statistics.mean(row["seconds"] for row in own)
        columns = [_spread([float(v[:, n].mean()) for v in every]) for n in range(len(words))]
        lines.append(
            f"| {method} | {own[0]['parameters']:,} | {' | '.join(columns)} | {ends[0]:.3f}, "
            f"{ends[1]:.3f} | {f'{seconds:.0f}' if seconds else '–'} |"
        )
    size = SETTINGS
    lines.append(
        f"\n{size['train']} to train on, {size['steps']} steps of {size['batch']}, {size['test']} to test "
        f"on; {'seeds' if len(seeds) > 1 else 'one seed,'} {', '.join(map(str, seeds))}. "
        f"{known['machine']}. `python benchmarks/volume_clicks.py` writes it."
    )
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.3f}"
    return f"{mean} ± {statistics.stdev(values):.3f}" if len(values) > 1 else mean


def write(document: str, known: dict[str, Any]) -> str:
    """The document with its table between the markers."""
    begin, end = "<!-- clicks table -->", "<!-- end of clicks table -->"
    before, _, rest = document.partition(begin)
    return f"{before}{begin}\n{table(known)}\n{end}{rest.partition(end)[2]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="run nothing, only write the table")
    known = json.loads(RESULTS.read_text()) if parser.parse_args().write else run()
    PAGE.write_text(write(PAGE.read_text(), known))


if __name__ == "__main__":
    main()
