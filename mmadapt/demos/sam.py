"""SAM on volumes from end to end: compare, keep one adapter, load it elsewhere, report.

The backbone has seen coloured scenes only; the task is a body in grey, speckled stacks of slices,
from one click a volume.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import mmadapt as mm
from mmadapt.core.table import Table, count
from mmadapt.demos import kept
from mmadapt.errors import DataError
from mmadapt.tasks.segment import figure, organs
from mmadapt.tasks.segment.compare import (
    METHODS,
    Cases,
    Result,
    adapt,
    finish,
    predictions,
    run_ellipsoid,
    run_frozen,
    score_dice,
    training_tensors,
)
from mmadapt.train.cache import data_digest

BACKBONE = "tiny/sam"
FLAT, KEPT = "MedSA, slice by slice", "MedSA, with depth"
TEST_VOLUMES = 24
STEPS, BATCH = 110, 2
SCENES = 64  # of those the backbone knows


def task(shots: int = 24, test_volumes: int = TEST_VOLUMES) -> tuple[Cases, Cases]:
    """Volumes to train on, and others to test on."""
    if shots < 1:
        raise DataError(f"shots is {shots}, expected at least 1 volume to train on")
    return Cases(*organs.volumes(shots, seed=1)), Cases(*organs.volumes(test_volumes, seed=2))


def run(
    out: Path, shots: int = 24, seeds: tuple[int, ...] = (1,), show: Callable[[str], None] = print
) -> list[Result]:
    """Run the whole job and write `report.html`, `results.json` and the adapter into `out`."""
    started = time.perf_counter()
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    train, test = task(shots)
    sam = mm.load(BACKBONE)
    show(f"{sam!r}\n{len(train)} volumes to train on, {len(test)} to test on, one click each\n")
    results = [run_frozen(sam, test, scenes=SCENES), run_ellipsoid(train, test)]
    before = predictions(sam, test)
    data = training_tensors(sam, train)
    for name in (FLAT, KEPT):
        for seed in seeds:
            sam = mm.load(BACKBONE)
            attachment, history, seconds = adapt(
                sam, METHODS[name], data, name="organs", seed=seed, steps=STEPS, batch=BATCH
            )
            results.append(finish(sam, name, history, seconds, seed, test, SCENES))
            show(f"{name}, seed {seed}: Dice {results[-1].mean:.3f}, {seconds:.0f} s of training")
    assert attachment is not None
    table = summary(results)
    show(f"\n{table}\n")
    last = results[-1]
    mm.save(sam, out / "adapter", "organs", metrics={"dice": last.mean, "volumes": shots})
    show(f"saved {out / 'adapter'}: {kept.size(out / 'adapter')}, Dice {last.mean:.4f}")
    kept.confirm("sam", out / "adapter", verdict(last.dice, test))
    show(f"loaded into a fresh backbone in a second process: Dice {last.mean:.4f}, equal")
    found = {"backbone": BACKBONE, "volumes": shots, "test_volumes": len(test), "steps": STEPS}
    found["results"] = [dataclasses.asdict(result) for result in results]
    (out / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    after = predictions(sam, test)
    report = _report(out, table, attachment, history, test, before, after)
    show(f"report: {report}\n{time.perf_counter() - started:.0f} s in all")
    return results


def verify(adapter: Path) -> str:
    """Score a saved adapter on the demo's test volumes, in a fresh backbone; one line of JSON."""
    sam = mm.load(BACKBONE)
    mm.load_adapter(sam, adapter)
    _, test = task(1)
    return json.dumps(verdict(score_dice(predictions(sam, test), test), test))


def verdict(dice: list[float], test: Cases) -> dict[str, Any]:
    return {"dice": dice, "data": data_digest(list(test.slices))}


def summary(results: Sequence[Result]) -> Table:
    """One row a method, means over its seeds."""
    table = Table(
        (
            "method",
            "trained",
            "Dice",
            "± seeds",
            "HD95 mm",
            "missed",
            "source box",
            "off",
            "seconds",
        )
    )
    for name in dict.fromkeys(result.method for result in results):
        own = [result for result in results if result.method == name]
        means = [result.mean for result in own]
        distances = [result.distance for result in own if result.distance is not None]

        def kept_of(which: str, own: list[Result] = own) -> str:
            found = [getattr(result, which).get("box") for result in own]
            return "" if None in found else f"{np.mean(found):.3f}"

        table.rows.append(
            (
                name,
                count(own[0].parameters),
                f"{np.mean(means):.3f}",
                f"{np.std(means, ddof=1):.3f}" if len(own) > 1 else "",
                f"{np.mean(distances):.1f}" if distances else "",
                f"{np.mean([result.missed for result in own]):.1f}",
                kept_of("source_on"),
                kept_of("source_off"),
                f"{np.mean([result.seconds for result in own]):.0f}",
            )
        )
    if not any(result.distances for result in results):
        table.notes.append("distances need MONAI: pip install 'mmadapt[medical]'")
    return table


def _report(
    out: Path,
    table: Table,
    attachment: mm.Attachment,
    history: mm.History,
    test: Cases,
    before: list[np.ndarray],
    after: list[np.ndarray],
) -> Path:
    from mmadapt.tasks.segment.scenes import scenes
    from mmadapt.ui.page import Page, image_grid, loss_figure

    page = Page("SAM on volumes, with an adapter that looks along the depth")
    page.text(
        f"{BACKBONE}, a small SAM trained on coloured scenes, meets grey stacks of 12 slices. One "
        "click on the body, in the slice where it is largest, is given to all slices. Speckle is "
        "drawn anew for each slice, so that neighbours know more than the slice itself."
    )
    page.figure(image_grid(scenes(16, seed=99)[0], [""] * 16), "What the backbone was trained on.")
    page.heading("Results")
    page.table(table)
    page.text(
        "Dice counts whole volumes; HD95 has misses at the volume's diagonal. The ellipsoid is one and "
        'the same for everybody, centred at the click. "source box" is the overlap (IoU) on coloured '
        "scenes asked for by a box, with the adapter on; taken away, it costs nothing, since the "
        "backbone was never changed."
    )
    page.heading("The adapter that was kept")
    page.table(attachment.summary())
    page.figure(loss_figure({KEPT: history.losses}, "Dice + cross-entropy"), "Training loss.")
    gains = np.array(score_dice(after, test)) - np.array(score_dice(before, test))
    order = np.argsort(gains)
    chosen = [int(order[-1]), int(order[len(order) // 2]), int(order[0])]
    every = [int(test.masks[place].sum((1, 2)).argmax()) for place in chosen]
    pick = list(zip(chosen, every, strict=True))
    page.figure(
        figure.before_after(
            [test.slices[i][z] for i, z in pick],
            [test.masks[i][z] for i, z in pick],
            [before[i][z] for i, z in pick],
            [after[i][z] for i, z in pick],
            points=[test.clicks[i][None] for i in chosen],
            labels=[[1]] * len(chosen),
            names=["largest gain", "middle", "smallest gain"],
        ),
        "The prompted slice of three test volumes, chosen by what the adapter gains.",
    )
    page.figure(
        figure.slices(
            test.slices[chosen[1]],
            np.stack([before[chosen[1]], after[chosen[1]]]),
            spacing=test.spacing,
            prompted=every[1],
            points=test.clicks[chosen[1]][None],
            labels=[1],
            names=["frozen", KEPT],
        ),
        "All slices of the volume in the middle.",
    )
    page.code(
        "import mmadapt as mm\nfrom mmadapt.tasks import segment\n\n"
        f'sam = mm.load("{BACKBONE}")\n'
        f'mm.load_adapter(sam, "./{out.name}/adapter")\n'
        "stack = segment.Segmenter(sam).encode_stack(slices, grey=True)"
    )
    return page.write(out / "report.html")
