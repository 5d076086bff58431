"""A spectrogram transformer in a noisy hall from end to end: compare, keep one adapter, load it elsewhere.

The backbone has heard clean recordings of generated sounds only; the task is the same sounds with
echoes, under noise as loud as they are.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy

import mmadapt as mm
from mmadapt.core.table import Table, count
from mmadapt.demos import kept
from mmadapt.errors import DataError
from mmadapt.tasks import tagging
from mmadapt.tasks.tagging import compare
from mmadapt.tasks.tagging.compare import Prepared, Result
from mmadapt.tasks.tagging.scores import Scores
from mmadapt.train.cache import data_digest

BACKBONE = "tiny/ast"
METHODS = ("Bottleneck", "ConvAdapter", "LoRA", "full fine-tuning")
KEPT = "ConvAdapter"
TEST_CLIPS = SOURCE_CLIPS = 520
STEPS, BATCH = 100, 26


def task(shots: int = 10) -> compare.Task:
    """Clips of the hall to train on, and others to test on."""
    if shots < 2:
        raise DataError(f"shots is {shots}, expected at least 2 clips of every class to train on")
    return compare.hall(shots, TEST_CLIPS)


def run(
    out: Path, shots: int = 10, seeds: tuple[int, ...] = (1,), show: Callable[[str], None] = print
) -> list[Result]:
    """Run the whole job and write `report.html`, `results.json` and the adapter into `out`."""
    started, hall = time.perf_counter(), task(shots)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    ast = mm.load(BACKBONE)
    test = Prepared(ast, hall.test())
    source = Prepared(ast, compare.source(SOURCE_CLIPS))
    show(f"{ast!r}\n{13 * shots} clips of a hall to train on, {len(test.data)} to test on\n")
    before = {"studio": source.scores(ast), "hall": test.scores(ast)}
    results = [compare.run_frozen(ast, test, source)]
    kept_model: Any = None
    for seed in seeds:
        train = Prepared(ast, hall.draw(seed))
        results.append(compare.run_statistics(train, test, seed))
        results.append(compare.run_probe(ast, train, test, seed))
        for name in METHODS:
            model, method = mm.load(BACKBONE), compare.METHODS[name]
            history, seconds = compare.adapt(
                model, method, train, head=False, seed=seed, steps=STEPS, batch=BATCH
            )
            results.append(compare.finish(model, name, history, seconds, seed, test, source, False))
            show(
                f"{name}, seed {seed}: {100 * results[-1].accuracy:.1f} %, {seconds:.0f} s of training"
            )
            if name == KEPT:
                kept_model, kept_history = model, history
    table = summary(results)
    show(f"\n{table}\n")
    after = {"studio": source.scores(kept_model), "hall": test.scores(kept_model)}
    metrics = {"accuracy": after["hall"].accuracy, "shots": shots}
    mm.save(kept_model, out / "adapter", "sounds", metrics=metrics)
    accuracy = f"{100 * after['hall'].accuracy:.2f} %"
    show(f"saved {out / 'adapter'}: {kept.size(out / 'adapter')}, accuracy {accuracy}")
    kept.confirm("audio", out / "adapter", _verdict(after["hall"], test))
    show(f"loaded into a fresh backbone in a second process: accuracy {accuracy}, equal")
    found = {"backbone": BACKBONE, "shots": shots, "test_clips": len(test.data), "steps": STEPS}
    found["results"] = [dataclasses.asdict(result) for result in results]
    (out / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    report = _report(out, table, kept_model, kept_history, test, before, after)
    show(f"report: {report}\n{time.perf_counter() - started:.0f} s in all")
    return results


def verify(adapter: Path) -> str:
    """Score a saved adapter on the demo's test clips, in a fresh backbone; one line of JSON."""
    ast = mm.load(BACKBONE)
    mm.load_adapter(ast, adapter)
    test = Prepared(ast, task().test())
    return json.dumps(_verdict(test.scores(ast), test))


def _verdict(scores: Scores, test: Prepared) -> dict[str, Any]:
    clips = [clip.samples for clip in test.data.clips]
    return {"answers": scores.answers.argmax(1).tolist(), "data": data_digest(clips)}


def summary(results: Sequence[Result]) -> Table:
    """One row a method, means over its seeds."""
    table = Table(
        ("method", "trained", "accuracy %", "± seeds", "mAP", "studio %", "off %", "seconds")
    )
    for name in dict.fromkeys(result.method for result in results):
        own = [result for result in results if result.method == name]
        reached = [100 * result.accuracy for result in own]

        def share(which: str, own: list[Result] = own) -> str:
            found = [getattr(result, which) for result in own]
            return "" if None in found else f"{100 * numpy.mean(found):.1f}"

        table.rows.append(
            (
                name,
                count(own[0].parameters),
                f"{numpy.mean(reached):.1f}",
                f"{numpy.std(reached, ddof=1):.1f}" if len(own) > 1 else "",
                f"{numpy.mean([result.mean_average_precision for result in own]):.3f}",
                share("source_on"),
                share("source_off"),
                f"{numpy.mean([result.seconds for result in own]):.0f}",
            )
        )
    table.notes = ["studio: what the backbone was trained on, with the adaptation on; off: without"]
    return table


def _report(
    out: Path,
    table: Table,
    ast: Any,
    history: mm.History,
    test: Prepared,
    before: dict[str, Scores],
    after: dict[str, Scores],
) -> Path:
    from mmadapt.tasks.tagging.sounds import SOURCE
    from mmadapt.ui.page import Page, loss_figure

    page = Page("Sounds in a noisy hall, with an adapter that looks along time")
    page.text(
        f"{BACKBONE}, a small audio spectrogram transformer trained on clean recordings, meets the same "
        "kinds of sounds in a hall: echoes of 0.15 to 0.45 s, and noise 0 to 10 dB below the sound. All "
        "sounds are generated."
    )
    clean = compare.source(len(SOURCE)).clips
    noisy = test.data.clips[: len(SOURCE)]
    page.figure(tagging.clips_figure(clean, ast.preprocess), "What the backbone was trained on.")
    page.figure(
        tagging.clips_figure(noisy, ast.preprocess), "The same kinds of sounds in the hall."
    )
    for where, clips in (("Clean:", clean), ("In the hall:", noisy)):
        page.text(where)
        for one in clips[1:4]:
            page.table(one)
    page.heading("Results")
    page.table(table)
    page.text(
        "Mel statistics and linear probe are regressions on the same clips, the first without any "
        "backbone. The frozen backbone answers with its own classes, which adapters keep. Switched off, "
        "an adapter costs nothing, since the backbone was never changed."
    )
    page.heading("The adapter that was kept")
    page.table(mm.attachments(ast)["sounds"].summary())
    page.figure(loss_figure({KEPT: history.losses}), "Training loss.")
    page.table(
        tagging.side_by_side(
            {
                "hall, frozen": before["hall"],
                "hall, adapted": after["hall"],
                "studio, frozen": before["studio"],
                "studio, adapted": after["studio"],
            }
        )
    )
    page.figure(
        tagging.class_bars({"frozen": before["hall"], "adapted": after["hall"]}),
        "Share of each class's clips of the hall that is found.",
    )
    page.table(after["hall"].by_class)
    page.figure(before["hall"].figure(), "Confusions in the hall, frozen.")
    page.figure(after["hall"].figure(), "Confusions in the hall, adapted.")
    page.heading("Heard")
    gained = numpy.flatnonzero(
        (after["hall"].answers == after["hall"].truth).all(1)
        & (before["hall"].answers != before["hall"].truth).any(1)
    )
    for place in gained[:6]:
        page.text(f"Taken for {_said(before, place)}; with the adapter, {_said(after, place)}:")
        page.table(test.data.clips[int(place)])
    page.code(
        "import mmadapt as mm\nfrom mmadapt.tasks import tagging\n\n"
        f'ast = mm.load("{BACKBONE}")\n'
        f'mm.load_adapter(ast, "./{out.name}/adapter")\n'
        "tagging.Tagger(ast).tag(clip)"
    )
    return page.write(out / "report.html")


def _said(scores: dict[str, Scores], place: int) -> str:
    one = scores["hall"]
    return one.names[int(one.probabilities[place].argmax())]
