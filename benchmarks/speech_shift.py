"""What adapting a recogniser gains on speakers it has never heard, and what it forgets of those it has.

    python benchmarks/speech_shift.py [--write]

Writes `speech_shift.json` beside itself and puts the tables into docs/speech.md. What the file already
holds is not run again; delete it to start over. A method that was given another rate since
(`speech_rates.py` chooses them) is run again, and what it did at the old one stays in a table of its own. One
CPU thread. espeak-ng says the clips, which are kept in build/.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from machine import processor
from pages import fill

import mmadapt as mm
from mmadapt.tasks import asr
from mmadapt.tasks.asr.methods import METHODS, teach

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "zoo" / "recipes"))
from spoken_digits import SPEAKERS, corpus  # noqa: E402

RESULTS = HERE / "speech_shift.json"
PAGE = HERE.parent / "docs" / "speech.md"
WORK = HERE.parent / "build" / "spoken_digits"
BACKBONE = "tiny/ctc"
SEEDS = (0, 1, 2)
#: what each is stands in `spoken_digits.SPEAKERS`
SHIFTS = ("whisper", "german", "spanish", "timbre")
SETTINGS = {"train": 300, "test": 150, "source": 150, "steps": 200, "batch": 8}


def measured(listen: asr.Recogniser, name: str, count: int) -> dict[str, Any]:
    """Rates on held-out sentences: the first `count` of the speaker's."""
    clips, texts = corpus(name, 300 if name == "source" else 150, test=True, work=WORK)
    score = listen.score(clips[:count], texts[:count])
    words = [one.errors.said for one in score.words]
    return {
        "wer": round(score.wer, 5),
        "cer": round(score.cer, 5),
        "interval": [round(bound, 5) for bound in score.interval()],
        "words": sum(words),
    }


def rate(method: str) -> float | None:
    """The peak learning rate of a method; the frozen backbone has none."""
    return METHODS[method].rate if method in METHODS else None


def measure(shift: str, method: str, seed: int) -> dict[str, Any]:
    """One row."""
    backbone = mm.load(BACKBONE)
    listen = asr.Recogniser(backbone)
    row: dict[str, Any] = {"shift": shift, "method": method, "seed": seed, "rate": rate(method)}
    if method == "frozen":
        row |= {"parameters": 0, "seconds": 0.0}
    else:
        clips, texts = corpus(shift, SETTINGS["train"], work=WORK)
        taught = teach(
            listen, method, clips, texts,
            steps=SETTINGS["steps"], size=SETTINGS["batch"], seed=seed,
        )  # fmt: skip
        row |= {"parameters": taught.history.parameters, "seconds": round(taught.seconds, 2)}
        row["loss"] = round(statistics.mean(taught.history.losses[-20:]), 5)
    row["target"] = measured(listen, shift, SETTINGS["test"])
    row["source_on"] = measured(listen, "source", SETTINGS["source"])
    if method == "frozen":
        row["source_off"] = row["source_on"]
    elif method != "full fine-tuning":
        with mm.disabled(backbone):
            row["source_off"] = measured(listen, "source", SETTINGS["source"])
    return row


def jobs() -> list[tuple[str, str, int]]:
    """Every (shift, method, seed), seed by seed; the frozen backbone has one."""
    found = [(shift, "frozen", 0) for shift in SHIFTS]
    for seed in SEEDS:
        found += [(shift, method, seed) for shift in SHIFTS for method in METHODS]
    return found


def run() -> dict[str, Any]:
    """Do what is still missing, and write the file after every row."""
    torch.set_num_threads(1)
    context = {
        "machine": f"{processor()}, 1 thread, torch {torch.__version__}",
        "backbone": BACKBONE,
        "weights": mm.zoo.entry(BACKBONE).sha256,
        "settings": SETTINGS,
        "rows": [],
    }
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else context
    if known["weights"] != context["weights"] or known["settings"] != SETTINGS:
        raise SystemExit(f"{RESULTS} is of other weights or settings; delete it to start over")
    done = {(row["shift"], row["method"], row["seed"]) for row in current(known)}
    for job in jobs():
        if job in done:
            continue
        began = time.perf_counter()
        row = measure(*job)
        known["rows"].append(row)
        RESULTS.write_text(json.dumps(known, indent=1) + "\n")
        print(
            f"{job[0]:8} {job[1]:18} {job[2]}  WER {row['target']['wer']:.4f}  source "
            f"{row['source_on']['wer']:.4f}  {row['seconds']:.0f} CPU s, "
            f"{time.perf_counter() - began:.0f} s",
            flush=True,
        )
    return known


def current(known: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of methods at the rate they have now."""
    return [row for row in known["rows"] if row["rate"] == rate(row["method"])]


def finished(known: dict[str, Any], shift: str) -> list[int]:
    """The seeds with which every method was run."""
    done = {(row["shift"], row["method"], row["seed"]) for row in current(known)}
    return [s for s in SEEDS if all((shift, method, s) in done for method in METHODS)]


def spread(values: list[float]) -> str:
    """Mean in %, and standard deviation over seeds where there are several."""
    values = [100 * value for value in values]
    mean = f"{statistics.mean(values):.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean


def table(known: dict[str, Any], shift: str) -> str:
    """Markdown, a row a method."""
    seeds, size = finished(known, shift), known["settings"]
    if not seeds:
        return "Not run yet; `python benchmarks/speech_shift.py` does."
    lines = [
        "| method | trained | WER % | CER % | known voices, WER % on / off | training, CPU s |",
        "|---|---|---|---|---|---|",
    ]
    rows = [row for row in current(known) if row["shift"] == shift and row["seed"] in (0, *seeds)]
    for method in ("frozen", *METHODS):
        own = [row for row in rows if row["method"] == method]
        if method != "frozen":
            own = [row for row in own if row["seed"] in seeds]
        off = [row["source_off"]["wer"] for row in own if "source_off" in row]
        seconds = statistics.mean(row["seconds"] for row in own)
        on = spread([row["source_on"]["wer"] for row in own])
        cells = [
            method,
            f"{own[0]['parameters']:,}",
            spread([row["target"]["wer"] for row in own]),
            spread([row["target"]["cer"] for row in own]),
            f"{on} / {100 * statistics.mean(off):.1f}" if off else f"{on} / –",
            f"{seconds:.0f}" if seconds else "–",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    words = rows[0]["target"]["words"]
    lines.append(
        f"\n{size['train']} clips to train on, {size['steps']} steps of {size['batch']}; {size['test']} "
        f"clips of sentences never trained on, {words} words; "
        f"{'seeds' if len(seeds) > 1 else 'one seed,'} {', '.join(map(str, seeds))}. "
        f"{known['machine']}. `python benchmarks/speech_shift.py` writes it."
    )
    return "\n".join(lines)


def trade_table(known: dict[str, Any]) -> str:
    """Markdown: methods that were run at several rates, on whispers and on known voices."""
    lines = ["| method | peak rate | whispers, WER % | known voices, WER % |", "|---|---|---|---|"]
    for method in METHODS:
        own = [r for r in known["rows"] if (r["shift"], r["method"]) == ("whisper", method)]
        rates = sorted({row["rate"] for row in own})
        for one in rates if len(rates) > 1 else ():
            rows = [row for row in own if row["rate"] == one]
            target, source = (
                spread([row[part]["wer"] for row in rows]) for part in ("target", "source_on")
            )
            lines.append(f"| {method} | {one:g} | {target} | {source} |")
    return "\n".join(lines)


def source_table(metrics: dict[str, Any]) -> str:
    """What the backbone's own recipe measured."""
    lines = ["| said by | clips | WER % | 95 % | CER % |", "|---|---|---|---|---|"]
    for name in SPEAKERS:
        rate = metrics["wer"][name]
        low, high = metrics["wer_95"][name]
        lines.append(
            f"| {metrics['definitions'][name]} | {metrics['n'][name]} | {100 * rate:.1f} | "
            f"{100 * low:.1f} to {100 * high:.1f} | {100 * metrics['cer'][name]:.1f} |"
        )
    return "\n".join(lines)


def write(document: str, known: dict[str, Any]) -> str:
    """The document with its tables between their markers."""
    tables = {shift: table(known, shift) for shift in SHIFTS}
    tables["trade"] = trade_table(known)
    tables["source"] = source_table(mm.zoo.entry(BACKBONE).metrics)
    return fill(document, tables)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="run nothing, only write the tables")
    options = parser.parse_args()
    known = json.loads(RESULTS.read_text()) if options.write else run()
    PAGE.write_text(write(PAGE.read_text(), known))


if __name__ == "__main__":
    main()
