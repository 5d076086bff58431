"""The demo of speech recognition: whispers, from clips that come with the package."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mmadapt as mm
from mmadapt.core.table import Table, count
from mmadapt.demos import kept
from mmadapt.errors import DataError
from mmadapt.tasks import asr
from mmadapt.tasks.asr.clips import Speech
from mmadapt.tasks.asr.methods import teach
from mmadapt.tasks.asr.score import percent
from mmadapt.train.cache import data_digest

BACKBONE = "tiny/ctc"
COMPARED, KEPT = ("head only", "ConvAdapter"), "ConvAdapter"
STEPS, BATCH = 250, 8
NEW, KNOWN = "whispers", "known voices"


def task(shots: int | None = None) -> tuple[Speech, dict[str, Speech]]:
    """Whispers to train on; and by name whispers and known voices to test on, of other sentences."""
    sets = asr.shipped(BACKBONE)
    clips, texts = sets["whisper train"]
    shots = len(clips) if shots is None else shots
    if not 1 <= shots <= len(clips):
        raise DataError(f"shots is {shots}, expected 1 to {len(clips)} clips to train on")
    tests = {NEW: sets["whisper test"], KNOWN: sets["source test"]}
    return (clips[:shots], texts[:shots]), tests


def run(
    out: Path,
    shots: int | None = None,
    seeds: tuple[int, ...] = (1,),
    show: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Run the whole job and write `report.html`, `results.json` and the adapter into `out`."""
    started = time.perf_counter()
    (clips, texts), tests = task(shots)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    backbone = mm.load(BACKBONE)
    seconds = sum(clip.seconds for clip in clips)
    show(
        f"{backbone!r}\n{len(clips)} whispers to train on, {seconds:.0f} s; to test on "
        + ", ".join(f"{len(own)} {name}" for name, (own, _) in tests.items())
        + "\n"
    )
    rows: list[dict[str, Any]] = []
    compared = attachment = None
    losses: dict[str, list[float]] = {}
    for method in COMPARED:
        for seed in seeds:
            backbone = mm.load(BACKBONE)
            listen = asr.Recogniser(backbone)
            taught = teach(
                listen, method, clips, texts,
                steps=STEPS, size=BATCH, seed=seed, name="whisper",
            )  # fmt: skip
            compared, attachment = asr.compare(listen, tests), taught.attachment
            losses[method] = taught.history.losses
            if not rows:
                rows.append(_row("frozen", 0, 0, 0.0, compared, adapted=False))
            parameters = taught.history.parameters or 0
            rows.append(_row(method, seed, parameters, taught.seconds, compared))
            wer = percent(rows[-1]["wer"][NEW])
            show(f"{method}, seed {seed}: WER {wer} %, {taught.seconds:.0f} s of training")
    assert compared is not None and attachment is not None
    table = summary(rows)
    show(f"\n{table}\n")
    wer = rows[-1]["wer"][NEW]
    mm.save(backbone, out / "adapter", "whisper", metrics={"wer": wer, "clips": len(clips)})
    show(f"saved {out / 'adapter'}: {kept.size(out / 'adapter')}, WER {100 * wer:.2f} %")
    kept.confirm("asr", out / "adapter", _verdict([one.text for one in compared[NEW].on], tests))
    show(f"loaded into a fresh backbone in a second process: WER {100 * wer:.2f} %, the same words")
    found = {"backbone": BACKBONE, "clips": len(clips), "steps": STEPS, "results": rows}
    (out / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    report = _report(out, table, attachment, losses, compared, tests)
    show(f"report: {report}\n{time.perf_counter() - started:.0f} s in all")
    return rows


def verify(adapter: Path) -> str:
    """Let a saved adapter hear the demo's whispers, in a fresh backbone; one line of JSON."""
    backbone = mm.load(BACKBONE)
    mm.load_adapter(backbone, adapter)
    _, tests = task()
    heard = asr.Recogniser(backbone).transcribe(tests[NEW][0])
    return json.dumps(_verdict([one.text for one in heard], tests))


def _verdict(heard: list[str], tests: dict[str, Speech]) -> dict[str, Any]:
    import torch

    samples = [torch.from_numpy(clip.samples) for clip in tests[NEW][0]]
    return {"heard": heard, "data": data_digest(samples)}


def _row(
    method: str,
    seed: int,
    parameters: int,
    seconds: float,
    found: asr.Comparison,
    adapted: bool = True,
) -> dict[str, Any]:
    scores = {name: pair.after if adapted else pair.before for name, pair in found.sets.items()}
    return {
        "method": method,
        "seed": seed,
        "parameters": parameters,
        "seconds": seconds,
        "wer": {name: score.wer for name, score in scores.items()},
        "cer": {name: score.cer for name, score in scores.items()},
        "interval": {name: list(score.interval()) for name, score in scores.items()},
        "wer_off": {name: pair.before.wer for name, pair in found.sets.items()},
    }


def summary(rows: list[dict[str, Any]]) -> Table:
    """One row a method and seed."""
    table = Table(
        ("method", "seed", "trained", f"WER {NEW} %", "CER %", f"WER {KNOWN} %", "off", "seconds")
    )
    for row in rows:
        low, high = row["interval"][NEW]
        table.rows.append(
            (
                row["method"],
                row["seed"],
                count(row["parameters"]) if row["parameters"] else "0",
                f"{percent(row['wer'][NEW])} [{percent(low)}, {percent(high)}]",
                percent(row["cer"][NEW]),
                percent(row["wer"][KNOWN]),
                percent(row["wer_off"][KNOWN]),
                f"{row['seconds']:.0f}",
            )
        )
    table.notes = [
        "in brackets: 95 % bounds from drawing the clips anew; off: with the adaptation switched off"
    ]
    return table


def _report(
    out: Path,
    table: Table,
    attachment: mm.Attachment,
    losses: dict[str, list[float]],
    found: asr.Comparison,
    tests: dict[str, Speech],
) -> Path:
    from mmadapt.ui.page import Page, loss_figure

    page = Page("A recogniser that learns to understand whispers")
    page.text(
        f"{BACKBONE}, a small wav2vec 2.0 with a CTC head, was trained on digits said aloud by sixteen "
        "synthetic voices. Here the same synthesiser whispers. The clips to test on are sentences that "
        "no training ever heard, in either voice. Speech is synthetic: the numbers show that the "
        "mechanism works, not how it does on people."
    )
    page.text("A voice it knows, and a whisper:")
    page.table(tests[KNOWN][0][0])
    page.table(tests[NEW][0][0])
    page.heading("Results")
    page.table(table)
    page.text(
        "WER counts changed, missing and added words over the words said, and can be over 100 %. "
        "While the adapter is on, voices it was not trained on are understood worse; switched off, "
        "the backbone is what it was, since it was never changed."
    )
    page.heading("Backbone and adapter side by side")
    page.table(found.table)
    page.heading("What was heard")
    pair = found[NEW]
    gains = [
        before.errors.wrong - after.errors.wrong
        for before, after in zip(pair.before.words, pair.after.words, strict=True)
    ]
    order = sorted(range(len(gains)), key=lambda place: -gains[place])
    for label, place in (
        ("The largest gain", order[0]),
        ("In the middle", order[len(order) // 2]),
        ("The smallest gain", order[-1]),
    ):
        page.text(f"{label}. S: replaced, D: missing, I: added.")
        page.table(pair.clips[place])
        page.text("The backbone:")
        page.table(pair.alignment(place, adapted=False))
        page.text("With the adapter:")
        page.table(pair.alignment(place))
    page.heading("The adapter that was kept")
    page.table(attachment.summary())
    page.figure(loss_figure(losses, "CTC loss"), "Training loss.")
    page.code(
        "import mmadapt as mm\nfrom mmadapt.tasks import asr\n\n"
        f'ctc = mm.load("{BACKBONE}")\n'
        f'mm.load_adapter(ctc, "./{out.name}/adapter")\n'
        "asr.Recogniser(ctc).transcribe(clips)"
    )
    return page.write(out / "report.html")
