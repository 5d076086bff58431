"""A decoder and a wording it never saw, from end to end: compare, keep one adapter, load it elsewhere.

The backbone knows eight operations on strings in one wording each; the task is one of them, asked for
in another.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mmadapt as mm
from mmadapt.core.table import Table
from mmadapt.demos import kept
from mmadapt.errors import DataError
from mmadapt.tasks import instruct
from mmadapt.tasks.instruct import compare, strings
from mmadapt.train.cache import data_digest

BACKBONE = "tiny/llama"
WORDING = "spell {} backwards = "
KEPT, OTHER = "LLaMA-Adapter", "LoRA (q, v)"
STEPS = {KEPT: 400, OTHER: 150}
TESTS, EVERY = 200, 20


def task(shots: int = 200, tests: int = TESTS) -> tuple[list[instruct.Example], ...]:
    """Examples to train on; test strings in the new wording, and in those the backbone knows."""
    if shots < 1:
        raise DataError(f"shots is {shots}, expected at least 1 example to train on")
    new = {WORDING: strings.WORDINGS[WORDING]}
    return (
        strings.instructions(shots, seed=100, wordings=new),
        strings.instructions(tests, seed=77, split="test", wordings=new),
        strings.instructions(tests, seed=78, split="test"),
    )


def run(
    out: Path, shots: int = 200, seeds: tuple[int, ...] = (1,), show: Callable[[str], None] = print
) -> list[compare.Result]:
    """Run the whole job and write `report.html`, `results.json` and the adapter into `out`."""
    started = time.perf_counter()
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    train, new, old = task(shots)
    llama = mm.load(BACKBONE)
    show(f"{llama!r}\n{shots} examples such as {train[0].prompt!r} → {train[0].response!r}\n")
    results = [compare.bare(llama, new, old)]
    record = None
    for name in (OTHER, KEPT):
        for seed in seeds:
            llama = mm.load(BACKBONE)
            attachment, history, seconds, record = adapt(llama, name, train, seed)
            result = compare.finish(llama, name, history, new, old, seed=seed, seconds=seconds)
            results.append(result)
            show(
                f"{name}, seed {seed}: {100 * result.new:.1f} % right, {seconds:.0f} s of training"
            )
    assert attachment is not None and record is not None
    table = compare.summary(results)
    answers = instruct.side_by_side(llama, [*new[:4], *old[:4]])
    show(f"\n{table}\n\n{answers}\n")
    reached = results[-1].new
    mm.save(llama, out / "adapter", "wording", metrics={"exact_match": reached, "shots": shots})
    show(f"saved {out / 'adapter'}: {kept.size(out / 'adapter')}, {100 * reached:.1f} % right")
    kept.confirm("llama", out / "adapter", _verdict(reached, new))
    show(f"loaded into a fresh backbone in a second process: {100 * reached:.1f} % right, equal")
    found = {"backbone": BACKBONE, "examples": shots, "tests": len(new), "steps": STEPS}
    found["results"] = [dataclasses.asdict(result) for result in results]
    (out / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    report = _report(out, table, answers, attachment, history, record)
    show(f"report: {report}\n{time.perf_counter() - started:.0f} s in all")
    return results


def adapt(
    llama: mm.Backbone, name: str, train: Sequence[instruct.Example], seed: int
) -> tuple[mm.Attachment, mm.History, float, instruct.GateRecord | None]:
    """Attach and train one method; its gates on the way where it has any."""
    records: list[instruct.GateRecord] = []

    def watch(attachment: mm.Attachment) -> mm.Evaluation:
        records.append(instruct.GateRecord(attachment, EVERY))
        return mm.Evaluation(records[0], every=EVERY)

    attachment, history, seconds = compare.adapt(
        llama,
        compare.METHODS[name],
        train,
        seed=seed,
        steps=STEPS[name],
        watch=watch if name == KEPT else None,
    )
    assert attachment is not None
    return attachment, history, seconds, records[0] if records else None


def verify(adapter: Path) -> str:
    """Score a saved adapter on the demo's test strings, in a fresh backbone; one line of JSON."""
    llama = mm.load(BACKBONE)
    mm.load_adapter(llama, adapter)
    _, new, _ = task(1)
    return json.dumps(_verdict(instruct.exact_match(llama, new), new))


def _verdict(right: float, new: Sequence[instruct.Example]) -> dict[str, Any]:
    return {"exact_match": right, "data": data_digest([[one.prompt, one.response] for one in new])}


def _report(
    out: Path,
    table: Table,
    answers: Table,
    attachment: mm.Attachment,
    history: mm.History,
    record: instruct.GateRecord,
) -> Path:
    from mmadapt.ui.page import Page, loss_figure

    page = Page("A new wording, with trained tokens behind gates that start closed")
    page.text(
        f"{BACKBONE}, a small Llama that reads bytes, was trained on eight operations on strings, each "
        "asked for in one wording. The task is one of them in another wording, which the backbone gets "
        "wrong every time though it can do it. All strings here are ones that no training saw."
    )
    page.heading("Results")
    page.table(table)
    page.text(
        "Per cent of greedy answers that are right to the letter. With an adapter on, much of the old "
        "task is lost: it has learned one wording from examples of nothing else. Taken away, it costs "
        "nothing, since the backbone was never changed."
    )
    page.table(answers)
    page.heading("The adapter that was kept")
    page.table(attachment.summary())
    page.figure(
        loss_figure({KEPT: history.losses}), "Training loss; the first is the backbone's own."
    )
    page.figure(
        record.plot(),
        "How far each head's gate was open while training: tanh of the trained number.",
    )
    page.figure(instruct.gate_figure(attachment), "The gates at the end, a row a layer.")
    page.code(
        "import mmadapt as mm\nfrom mmadapt.tasks import instruct\n\n"
        f'llama = mm.load("{BACKBONE}")\n'
        f'mm.load_adapter(llama, "./{out.name}/adapter")\n'
        f'instruct.stream(llama, "{WORDING.format("planet")}")'
    )
    return page.write(out / "report.html")
