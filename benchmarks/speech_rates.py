"""Which peak learning rate suits each way to teach a recogniser, tried on whispers of their own.

    python benchmarks/speech_rates.py [--write]

Writes `speech_rates.json` beside itself and puts the table into docs/speech.md. A method starts at one rate
and tries half and twice of it, and so on as long as the best is the least or the largest tried. What the
file already holds is not run again; delete it to start over. Nothing here is ever tested on. The rates
that come out are those of `mmadapt.tasks.asr.methods`.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from machine import processor
from pages import fill
from speech_shift import BACKBONE, HERE, PAGE, SETTINGS, WORK, corpus

import mmadapt as mm
from mmadapt.tasks import asr
from mmadapt.tasks.asr.clips import Speech
from mmadapt.tasks.asr.methods import METHODS, teach

RESULTS = HERE / "speech_rates.json"
SHIFT = "whisper"
#: another initialisation and order than those of the study
SEED = 10
#: drawn after the clips to train on; sentences that are among those are left out
FURTHER = 150
START = {"biases": 4.8e-2, "LoRA": 2.4e-2, "full fine-tuning": 1.5e-3}  # else 1.2e-2


def clips() -> tuple[Speech, Speech]:
    """What is trained on, as in the study, and what the rates are chosen on."""
    count = SETTINGS["train"]
    sounds, texts = corpus(SHIFT, count + FURTHER, work=WORK)
    trained = set(texts[:count])
    new = [i for i in range(count, count + FURTHER) if texts[i] not in trained]
    return (sounds[:count], texts[:count]), ([sounds[i] for i in new], [texts[i] for i in new])


def measure(method: str, rate: float) -> dict[str, Any]:
    """One trial."""
    train, validation = clips()
    listen = asr.Recogniser(mm.load(BACKBONE))
    taught = teach(
        listen, method, *train, rate=rate,
        steps=SETTINGS["steps"], size=SETTINGS["batch"], seed=SEED,
    )  # fmt: skip
    score = listen.score(*validation)
    return {
        "method": method,
        "rate": rate,
        "wer": round(score.wer, 5),
        "cer": round(score.cer, 5),
        "seconds": round(taught.seconds, 2),
    }


def by_rate(known: dict[str, Any], method: str) -> dict[float, tuple[float, float]]:
    """WER and CER of a method by the rates it was tried at."""
    own = [row for row in known["rows"] if row["method"] == method]
    return {row["rate"]: (row["wer"], row["cer"]) for row in own}


def best(known: dict[str, Any], method: str) -> float:
    """The rate with the fewest wrong words, of several the one with the fewest wrong characters."""
    found = by_rate(known, method)
    return min(found, key=found.__getitem__)


def to_try(known: dict[str, Any], method: str) -> list[float]:
    """The rates that are still to be tried: none where the best stands between two others."""
    found = by_rate(known, method)
    middle = best(known, method) if found else START.get(method, 1.2e-2)
    wanted = (middle, float(f"{middle / 2:g}"), float(f"{middle * 2:g}"))
    return [rate for rate in wanted if rate not in found]


def run() -> dict[str, Any]:
    """Do what is still missing, and write the file after every trial."""
    torch.set_num_threads(1)
    _, (sounds, texts) = clips()
    context = {
        "machine": f"{processor()}, 1 thread, torch {torch.__version__}",
        "backbone": BACKBONE,
        "weights": mm.zoo.entry(BACKBONE).sha256,
        "settings": SETTINGS,
        "shift": SHIFT,
        "validation": {"clips": len(sounds), "words": sum(len(text.split()) for text in texts)},
        "seed": SEED,
        "rows": [],
    }
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else context
    if any(known[key] != context[key] for key in ("weights", "settings", "validation", "seed")):
        raise SystemExit(f"{RESULTS} is of other weights or settings; delete it to start over")
    for method in METHODS:
        while rates := to_try(known, method):
            known["rows"].append(measure(method, rates[0]))
            RESULTS.write_text(json.dumps(known, indent=1) + "\n")
            print(known["rows"][-1], flush=True)
        print(f"{method}: {best(known, method):g} (now {METHODS[method].rate:g})", flush=True)
    return known


def table(known: dict[str, Any]) -> str:
    """Markdown, a row a method."""
    lines = ["| method | peak rate | WER % by the rates that were tried |", "|---|---|---|"]
    for method in METHODS:
        chosen = best(known, method)
        tried = [
            f"{rate:g}: {100 * found[0]:.1f}"
            for rate, found in sorted(by_rate(known, method).items())
        ]
        lines.append(f"| {method} | {chosen:g} | {', '.join(tried)} |")
    size, of = known["settings"], known["validation"]
    lines.append(
        f"\nWER % of {of['clips']} whispers, {of['words']} words, of sentences that no method is trained "
        f"or tested on; {size['train']} clips to train on, {size['steps']} steps of {size['batch']}; "
        f"seed {known['seed']}. {known['machine']}. "
        "`python benchmarks/speech_rates.py` writes it."
    )
    return "\n".join(lines)


def write(document: str, known: dict[str, Any]) -> str:
    """The document with its table between the markers."""
    return fill(document, {"rates": table(known)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="run nothing, only write the table")
    options = parser.parse_args()
    known = json.loads(RESULTS.read_text()) if options.write else run()
    PAGE.write_text(write(PAGE.read_text(), known))


if __name__ == "__main__":
    main()
