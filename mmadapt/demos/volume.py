"""Volumes from end to end: compare, click on, keep one adapter, and a real scan from NIfTI to NIfTI.

The methods learn on the generated stacks of `mmadapt demo sam`; here they are asked as a reader would,
in three dimensions. The scan comes with nibabel and has no labels: what is shown on it is the way in
and out, and nothing about how good the answer is.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

import mmadapt as mm
from mmadapt.core.table import Table, count
from mmadapt.demos import kept, sam
from mmadapt.errors import CheckError
from mmadapt.tasks import volume as volumes
from mmadapt.tasks.segment import figure, organs, set_input
from mmadapt.tasks.segment.compare import (
    METHODS,
    Cases,
    Result,
    adapt,
    predictions,
    run_ellipsoid,
    score,
    training_tensors,
)
from mmadapt.tasks.segment.metrics import dice, hausdorff
from mmadapt.tasks.volume.nifti import nibabel

FLAT, KEPT, WHOLE = "Bottleneck", "MedSA, with depth", "full fine-tuning"
CLICKS, CLICKED = 3, 12  # clicks on each of the first test volumes
STRUCTURES = {1: "brighter body", 2: "darker body"}
TOLERANCE = 2.5  # mm, the distance of slices

#: a real scan, what of it is looked at, and where it is clicked, all (z, y, x) in its own voxels
SCAN, TIME, WINDOW = "example4d.nii.gz", 0, "mr"
PART = (6, 24, 40, 24, 72, 88)
SCAN_CLICKS = (((18, 50, 66), 1), ((13, 54, 63), 1))

verify = sam.verify


def run(
    out: Path, shots: int = 24, seeds: tuple[int, ...] = (1,), show: Callable[[str], None] = print
) -> list[Result]:
    """Run the whole job and write `report.html`, `results.json`, the adapter and a mask into `out`."""
    started = time.perf_counter()
    scan = volumes.read_nifti(scan_file(), t=TIME)  # before anything else, lest the end be missing
    hausdorff(np.ones((1, 1), bool), np.ones((1, 1), bool))
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    train, test = sam.task(shots)
    show(f"{len(train)} volumes to train on, {len(test)} to test on, one click each\n")
    results, refined, attachment, history, model = _compare(train, test, seeds, show)
    table, clicks = summary(results, test), click_table(refined)
    show(f"\n{table}\n\n{clicks}\n")

    found = predictions(model, test)
    structures = volumes.score_table(_structures(found, test))
    show(f"{structures}\n")
    set_input(model, depth=organs.DEPTH)
    mm.save(model, out / "adapter", metrics={"dice": results[-1].mean, "volumes": shots})
    show(f"saved {out / 'adapter'}: {kept.size(out / 'adapter')}")
    kept.confirm("volume", out / "adapter", sam.verdict(results[-1].dice, test))
    show("loaded into a fresh backbone in a second process: every Dice equal\n")

    study, path, told = segment_scan(model, scan, out)
    show("\n".join(f"{name}: {value}" for name, value in told.items()))
    (out / "results.json").write_text(
        json.dumps(
            {
                "backbone": sam.BACKBONE,
                "volumes": shots,
                "test_volumes": len(test),
                "steps": sam.STEPS,
                "results": [dataclasses.asdict(result) for result in results],
                "clicks": refined,
                "scan": told,
            },
            indent=1,
        )
        + "\n"
    )
    tables = table, clicks, structures
    report = _report(out, tables, attachment, history, test, found, (scan, study, path, told))
    show(f"report: {report}\n{time.perf_counter() - started:.0f} s in all")
    return results


def scan_file() -> Path:
    """The scan that nibabel ships; an error with the line that installs it where there is none."""
    nibabel()
    return Path(str(files("nibabel"))) / "tests" / "data" / SCAN


def as_volume(slices: np.ndarray) -> volumes.Volume:
    """A generated stack uint8 (D, H, W) as a volume of 0 to 1, with its spacing."""
    z, y, x = organs.SPACING
    return volumes.Volume(slices / 255.0, np.diag([x, y, z, 1.0]), name="generated")


def _compare(
    train: Cases, test: Cases, seeds: Sequence[int], show: Callable[[str], None]
) -> tuple[list[Result], dict[str, list[list[float]]], mm.Attachment, mm.History, Any]:
    """Every method's result, Dice after each click, and the adapter that is kept, in its model."""
    model = mm.load(sam.BACKBONE)
    results = [Result("frozen", 0, 0, *score(predictions(model, test), test))]
    results.append(run_ellipsoid(train, test))
    refined = {"frozen": refine(model, test)}
    data = training_tensors(model, train)
    for name in (WHOLE, FLAT, KEPT):  # the one that is kept comes last
        for seed in seeds:
            model = mm.load(sam.BACKBONE)
            attachment, history, seconds = adapt(
                model,
                METHODS[name],
                data,
                name="organs",
                seed=seed,
                steps=sam.STEPS,
                batch=sam.BATCH,
            )
            scores = score(predictions(model, test), test)
            results.append(Result(name, history.parameters or 0, seed, *scores, seconds))
            show(f"{name}, seed {seed}: Dice {results[-1].mean:.3f}, {seconds:.0f} s of training")
        if name != WHOLE:
            refined[name] = refine(model, test)
    assert attachment is not None
    return results, refined, attachment, history, model


def refine(model: Any, test: Cases) -> list[list[float]]:
    """Dice of each volume after 1, 2 … clicks, each deep inside the largest error of the last answer.

    The first click is the case's own; the answer is carried from slice to slice by boxes.
    """
    rows = []
    first = (part[:CLICKED] for part in (test.slices, test.masks, test.clicks))
    for slices, truth, (x, y) in zip(*first, strict=True):
        study = volumes.SliceSegmenter(model, as_volume(slices))
        click: Any = ((int(truth.sum((1, 2)).argmax()), y, x), 1)
        row: list[float] = []
        for _ in range(CLICKS):
            if click is not None:
                study.click(*click)
                study.propagate()
            row.append(dice(study.mask, truth))
            click = volumes.next_click(study.mask, truth)
        rows.append(row)
    return rows


def _structures(found: Sequence[np.ndarray], test: Cases) -> list[list[volumes.Score]]:
    """Scores by whether the body is brighter or darker than what is around it."""
    cases = []
    for slices, mask, truth in zip(test.slices, found, test.masks, strict=True):
        label = 1 if slices[truth].mean() > slices[~truth].mean() else 2
        grid = as_volume(slices).grid
        own, true = label * mask.astype(np.uint8), label * truth.astype(np.uint8)
        names = {label: STRUCTURES[label]}
        cases.append(volumes.score_structures(own, true, grid, names, TOLERANCE, grid.diagonal))
    return sorted(cases, key=lambda scores: scores[0].structure)


def segment_scan(
    model: Any, scan: volumes.Volume, out: Path
) -> tuple[volumes.SliceSegmenter, Path, dict[str, Any]]:
    """Click a real scan, save the mask on its own grid, and read it back; what was found, in words."""
    study = volumes.SliceSegmenter(model, scan.window(WINDOW).crop(PART))
    for point, label in SCAN_CLICKS:
        study.click(point, label)
        study.propagate()
    path = volumes.save_mask(out / "prediction.nii.gz", study.mask, study.volume)
    again = volumes.read_mask(path, like=scan)  # refuses another grid
    file = nibabel().load(str(path))
    if not np.array_equal(file.affine, scan.affine) or not np.array_equal(
        again, study.on_original()
    ):
        raise CheckError(
            f"{path} does not hold the mask that was saved, or lies elsewhere: affine "
            f"{file.affine.tolist()}, of the scan {scan.affine.tolist()}",
            "this should not happen; please report it with both",
        )
    millilitres = int(again.sum()) * float(np.prod(scan.spacing)) / 1000
    return study, path, {
        "scan": repr(scan),
        "looked at": str(study.volume.grid),
        "clicks (z, y, x)": ", ".join(str(point) for point, _ in SCAN_CLICKS),
        "found": f"{int(again.sum())} voxels, {millilitres:.1f} ml; there is no truth to compare with",
        "saved": f"{path}: {file.get_data_dtype()} {file.shape}",
        "read back": "voxels and affine equal",
    }  # fmt: skip


def summary(results: Sequence[Result], test: Cases) -> Table:
    """One row a method, means over volumes and seeds."""
    table = Table(("method", "sees neighbours", "trained", "Dice", "HD95 mm", "missed", "seconds"))
    for name in dict.fromkeys(result.method for result in results):
        own = [result for result in results if result.method == name]
        distances = [result.distance for result in own if result.distance is not None]
        table.rows.append(
            (
                name,
                "yes" if name in METHODS and METHODS[name].depth else "no",
                count(own[0].parameters),
                f"{np.mean([result.mean for result in own]):.3f}",
                f"{np.mean(distances):.1f}",
                f"{np.mean([result.missed for result in own]):.2g} of {len(test)}",
                f"{np.mean([result.seconds for result in own]):.0f}",
            )
        )
    return table


def click_table(refined: dict[str, list[list[float]]]) -> Table:
    """Mean Dice after each click, of all volumes clicked and of the quarter that began worst."""
    words = [f"{n} click{'s' if n > 1 else ''}" for n in range(1, CLICKS + 1)]
    table = Table(("method", *words, *(f"worst quarter: {word}" for word in words)))
    for name, rows in refined.items():
        every = np.array(rows)
        worst = every[np.argsort(every[:, 0])[: max(1, len(every) // 4)]]
        table.rows.append((name, *(f"{v:.3f}" for v in (*every.mean(0), *worst.mean(0)))))
    table.notes.append(
        f"{CLICKED} of the test volumes, clicked as a reader would, slice by slice, and carried on by "
        "boxes; the worst quarter is that after the first click"
    )
    return table


def _report(
    out: Path,
    tables: Sequence[Table],
    attachment: mm.Attachment,
    history: mm.History,
    test: Cases,
    found: list[np.ndarray],
    scanned: tuple[volumes.Volume, volumes.SliceSegmenter, Path, dict[str, Any]],
) -> Path:
    from mmadapt.ui.page import Page, loss_figure

    page = Page("Volumes: adapters that look along the depth, clicks in three dimensions")
    page.text(
        f"{sam.BACKBONE}, a small SAM trained on coloured scenes, meets generated grey stacks of "
        f"{organs.DEPTH} slices, {organs.SPACING[0]:g} mm apart. One click, in the slice where the body is "
        "largest, is given to all slices. No patient was involved."
    )
    page.heading("Methods")
    page.table(tables[0])
    page.text(
        "Dice counts whole volumes never trained on; HD95 has misses at the volume's diagonal. The "
        "ellipsoid is the same for every volume, centred at the click: what is below it has learned "
        "nothing about the image. Full fine-tuning sees one slice at a time. The settings are those of "
        "the study in docs/segmentation.md, which has more methods and seeds."
    )
    page.figure(_errors_figure(test, found), f"{KEPT}: the volume in the middle, by Dice.")
    page.heading("Structures")
    page.table(tables[2])
    page.heading("More clicks")
    page.table(tables[1])
    page.text(
        "Each further click is put deep inside the largest error of the last answer, which only someone "
        "who knows the truth can do. Read across: where numbers do not rise, clicks did not help."
    )
    page.heading("The adapter that was kept")
    page.table(attachment.summary())
    page.figure(loss_figure({KEPT: history.losses}, "Dice + cross-entropy"), "Training loss.")
    page.heading("A real scan, from NIfTI to NIfTI")
    scan, study, path, told = scanned
    page.text(
        f"{SCAN} comes with nibabel's tests: an MR scan of a head. It has no labels, and the adapter has "
        "seen generated stacks alone, so no number says how good the answer below is, and none is "
        "claimed. The part and the clicks were chosen by eye. What is shown is that a volume gets in, is "
        "clicked in its own voxels, and that the mask comes out where the scan lies."
    )
    page.table(_told_table(told))
    page.figure(
        volumes.planes_figure(
            scan.window(WINDOW),
            at=SCAN_CLICKS[0][0],
            mask=volumes.read_mask(path, like=scan),
            names={1: "answer"},
        ),
        "The saved mask, read again, over the whole scan; at the cross the first click.",
    )
    first = np.array(PART[:3])
    z, y, x = (int(v) for v in np.array(SCAN_CLICKS[0][0]) - first)
    page.figure(
        figure.slices(
            study.volume.array[0],
            study.mask,
            spacing=study.volume.spacing,
            prompted=z,
            points=[(x, y)],
            labels=[1],
            count=study.volume.size[0],
        ),
        "The part that was looked at, slice by slice.",
    )
    page.code(
        "import mmadapt as mm\nfrom mmadapt.tasks import volume\n\n"
        f'sam = mm.load("{sam.BACKBONE}")\n'
        f'mm.load_adapter(sam, "./{out.name}/adapter")\n'
        f'scan = volume.read_nifti("{SCAN}", t={TIME})\n'
        f'study = volume.SliceSegmenter(sam, scan.window("{WINDOW}").crop({PART}))\n'
        f"study.click({SCAN_CLICKS[0][0]})\nstudy.propagate()\n"
        'volume.save_mask("prediction.nii.gz", study.mask, study.volume)'
    )
    return page.write(out / "report.html")


def _errors_figure(test: Cases, found: list[np.ndarray]) -> Any:
    """Three planes of the test volume of middle Dice: what is right, beside and missed."""
    dices = [dice(*pair) for pair in zip(found, test.masks, strict=True)]
    place = int(np.argsort(dices)[len(dices) // 2])
    own, true = found[place], test.masks[place]
    labels = 1 * (own & true) + 2 * (own & ~true) + 3 * (true & ~own)
    names = {1: "right", 2: "beside the body", 3: "missed"}
    return volumes.planes_figure(as_volume(test.slices[place]), mask=labels, names=names)


def _told_table(told: dict[str, Any]) -> Table:
    table = Table(("", "what"))
    table.rows = [(name, str(value)) for name, value in told.items()]
    return table
