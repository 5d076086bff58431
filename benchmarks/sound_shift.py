"""What adapting a small AST gains in a noisy hall and on new kinds of sounds, and what it costs the old ones.

    python benchmarks/sound_shift.py --choose     # peak learning rates, on clips of their own
    python benchmarks/sound_shift.py

Writes `sound_shift.json` beside itself and puts the tables into docs/tagging.md. What the file already
holds is not run again; delete it to start over. One CPU thread.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from machine import processor
from pages import fill

import mmadapt as mm
from mmadapt.tasks.tagging import compare

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "sound_shift.json"
PAGE = HERE.parent / "docs" / "tagging.md"
BACKBONE = "tiny/ast"
SEEDS = (0, 1, 2)
SETTINGS: dict[str, Any] = {
    "steps": {"hall": 80, "new-5": 240, "new-20": 240},
    "batch": 26,
    "test": 650,
    "source": 390,
}
TASKS = {
    "hall": lambda: compare.hall(10, SETTINGS["test"]),
    "new-5": lambda: compare.new_kinds(5, SETTINGS["test"]),
    "new-20": lambda: compare.new_kinds(20, SETTINGS["test"]),
}
#: rates were tried in 80 steps, then the number of steps with the best of them
CHOICE = {"seed": 900, "validation": 390, "factors": [0.4, 1.0, 2.5], "steps": [80, 240]}
BASELINES = ("mel statistics + LR", "linear probe")


class Study:
    """The backbone, and the clips of every task as tensors."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self.backbone = mm.load(BACKBONE)
        self.tasks = {part: make() for part, make in TASKS.items()}
        self.tests: dict[str, compare.Prepared] = {}

    @functools.cached_property
    def source(self) -> compare.Prepared:
        """Clean clips of the kinds the backbone knows."""
        return compare.Prepared(self.backbone, compare.source(SETTINGS["source"]))

    def train(self, part: str, seed: int) -> compare.Prepared:
        """The clips of one seed."""
        return compare.Prepared(self.backbone, self.tasks[part].draw(seed))

    def test(self, part: str) -> compare.Prepared:
        """Clips that nothing is trained on or chosen by, the same for all methods."""
        if part not in self.tests:
            self.tests[part] = compare.Prepared(self.backbone, self.tasks[part].test())
        return self.tests[part]

    def validation(self, part: str) -> compare.Prepared:
        """Clips to choose by, neither of a training seed nor tested on."""
        make = compare.hall if part == "hall" else compare.new_kinds
        shots = CHOICE["validation"] // (13 if part == "hall" else 10)
        return compare.Prepared(self.backbone, make(shots).draw(CHOICE["seed"] + 1))

    def adapted(
        self, part: str, method: compare.Method, seed: int, steps: int
    ) -> tuple[Any, Any, float]:
        """A fresh model trained; its history and the seconds that took."""
        model = mm.load(BACKBONE)
        if method.scratch:
            model = compare.random_backbone(model, seed)
        options = {"steps": steps, "batch": SETTINGS["batch"]}
        head = self.tasks[part].head
        found = compare.adapt(
            model, method, self.train(part, seed), head=head, seed=seed, **options
        )
        return model, *found

    def measure(self, part: str, name: str, seed: int) -> dict[str, Any]:
        """One row."""
        test, head = self.test(part), self.tasks[part].head
        if name == "frozen":
            result = compare.run_frozen(self.backbone, test, self.source)
        elif name == "mel statistics + LR":
            result = compare.run_statistics(self.train(part, seed), test, seed)
        elif name == "linear probe":
            result = compare.run_probe(self.backbone, self.train(part, seed), test, seed)
        else:
            steps = SETTINGS["steps"][part]
            model, history, seconds = self.adapted(part, compare.METHODS[name], seed, steps)
            result = compare.finish(model, name, history, seconds, seed, test, self.source, head)
        return {"part": part, **dataclasses.asdict(result)}

    def choose(self, name: str) -> dict[str, float]:
        """Accuracy on validation clips of the hall, by peak learning rate."""
        method = compare.METHODS[name]
        validation = self.validation("hall")
        found = {}
        for factor in CHOICE["factors"]:
            rate = float(f"{CENTRES[name] * factor:.2g}")
            trial = dataclasses.replace(method, rate=rate)
            model, _, _ = self.adapted("hall", trial, CHOICE["seed"], CHOICE["steps"][0])
            found[f"{rate:g}"] = validation.scores(model).accuracy
            print(f"{name:18} {rate:<8g} {found[f'{rate:g}']:.3f}", flush=True)
        return found

    def choose_steps(self, part: str) -> dict[str, float]:
        """Accuracy of the Bottleneck on validation clips, by the number of steps."""
        validation, method, found = self.validation(part), compare.METHODS["Bottleneck"], {}
        for steps in CHOICE["steps"]:
            model, _, _ = self.adapted(part, method, CHOICE["seed"], steps)
            found[str(steps)] = validation.scores(model).accuracy
            print(f"{part:18} {steps:<8} {found[str(steps)]:.3f}", flush=True)
        return found


#: the middle of the rates that are tried; other methods have not been tuned
CENTRES = {"Bottleneck": 5e-3, "ConvAdapter": 5e-3, "LoRA": 5e-3, "full fine-tuning": 5e-4}


#: with every seed
CORE = {
    "hall": ("Bottleneck", "ConvAdapter", "ConvPass1d", "LoRA", "full fine-tuning"),
    "new-5": ("Bottleneck", "ConvAdapter", "full fine-tuning"),
    "new-20": ("Bottleneck", "ConvAdapter", "full fine-tuning"),
}
#: with the first
OTHERS = {"hall": ("DeepPrompts", "from scratch"), "new-20": ("LoRA", "from scratch")}


def jobs() -> list[tuple[str, str, int]]:
    """Every (part, method, seed), seed by seed; the frozen backbone has none."""
    found = [(part, "frozen", 0) for part, task in TASKS.items() if task().frozen]
    for seed in SEEDS:
        found += [(part, name, seed) for part in TASKS for name in (*BASELINES, *CORE[part])]
    return found + [(part, name, SEEDS[0]) for part, names in OTHERS.items() for name in names]


def load() -> dict[str, Any]:
    """What is known already, or the beginnings of it."""
    context = {
        "machine": f"{processor()}, 1 thread, torch {torch.__version__}",
        "backbone": BACKBONE,
        "weights": mm.zoo.entry(BACKBONE).sha256,
        "settings": SETTINGS,
        "rates": {name: method.rate for name, method in compare.METHODS.items()},
        "choice": {**CHOICE, "validation_accuracy": {}, "by_steps": {}},
        "rows": [],
    }
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else context
    for key in ("weights", "settings"):
        if known[key] != context[key]:
            raise SystemExit(f"{RESULTS} is of other {key}; delete it to start over")
    if known["rows"] and known["rates"] != context["rates"]:
        raise SystemExit(f"{RESULTS} is of other rates; delete its rows to start over")
    known["rates"] = context["rates"]
    return known


def save(known: dict[str, Any]) -> None:
    """After every row, so that a stop loses one."""
    order = {job: place for place, job in enumerate(jobs())}
    known["rows"].sort(key=lambda row: order[row["part"], row["method"], row["seed"]])
    RESULTS.write_text(json.dumps(known, indent=1) + "\n")


def run() -> dict[str, Any]:
    """Do what is still missing."""
    known, study = load(), Study()
    for job in missing(known):
        row = study.measure(*job)
        known["rows"].append(row)
        save(known)
        on = "" if row["source_on"] is None else f"  source {row['source_on']:.3f}"
        print(f"{job[0]:7} {job[1]:20} {job[2]}  {row['accuracy']:.3f}{on}", flush=True)
    return known


def choose() -> None:
    """Try learning rates; what is best stands in `compare.METHODS`."""
    known, study = load(), Study()
    for name in CENTRES:
        found = known["choice"]["validation_accuracy"]
        if name not in found:
            found[name] = study.choose(name)
            save(known)
    for part in ("hall", "new-20"):
        if part not in known["choice"]["by_steps"]:
            known["choice"]["by_steps"][part] = study.choose_steps(part)
            save(known)
    for name, rates in known["choice"]["validation_accuracy"].items():
        best = max(rates, key=rates.__getitem__)
        print(f"{name:18} {best} (now {compare.METHODS[name].rate:g})")


def missing(known: dict[str, Any]) -> list[tuple[str, str, int]]:
    """The jobs that are still to be done."""
    done = {(row["part"], row["method"], row["seed"]) for row in known["rows"]}
    return [job for job in jobs() if job not in done]


def spread(values: list[float]) -> str:
    """Mean in %, with the standard deviation over seeds; one seed alone has none."""
    mean = f"{100 * statistics.mean(values):.1f}"
    return f"{mean} ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else mean


def table(known: dict[str, Any], part: str) -> str:
    """Markdown, a row a method."""
    lines = [
        "| method | trained | accuracy % | mAP % | source accuracy %, on / off | training, CPU s |",
        "|---|---|---|---|---|---|",
    ]
    rows = [row for row in known["rows"] if row["part"] == part]
    order = ("frozen", *BASELINES, *compare.METHODS)
    for method in sorted({row["method"] for row in rows}, key=order.index):
        own = [row for row in rows if row["method"] == method]
        cells = [
            method,
            f"{own[0]['parameters']:,}",
            spread([row["accuracy"] for row in own]),
            spread([row["mean_average_precision"] for row in own]),
            source(own),
            f"{statistics.mean(row['seconds'] for row in own):.0f}" if own[0]["seconds"] else "–",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    size = known["settings"]
    lines.append(
        f"\n{size['steps'][part]} steps of {size['batch']} clips; {size['test']} clips to test on, and "
        f"{size['source']} of the source; mean ± standard deviation over seeds "
        f"{', '.join(map(str, SEEDS))}, and seed {SEEDS[0]} alone where there is none. "
        f"{known['machine']}. "
        "`python benchmarks/sound_shift.py` writes it."
    )
    return "\n".join(lines)


def source(rows: list[dict[str, Any]]) -> str:
    """What the sounds the backbone knows still get, with the adaptation on and off."""

    def mean(which: str) -> str:
        found = [row[which] for row in rows if row[which] is not None]
        return f"{100 * statistics.mean(found):.1f}" if found else "–"

    return f"{mean('source_on')} / {mean('source_off')}"


def source_table(metrics: dict[str, Any]) -> str:
    """What the backbone's own recipe measured."""
    words, found = metrics["definitions"], metrics["accuracy"]
    lines = [f"| {metrics['n']:,} clips that training never drew | accuracy % |", "|---|---|"]
    lines += [f"| {words[place]} | {100 * value:.1f} |" for place, value in found.items()]
    return "\n".join(lines)


def write(document: str, known: dict[str, Any]) -> str:
    """The document with its tables between their markers."""
    tables = {part: table(known, part) for part in TASKS}
    tables["source"] = source_table(mm.zoo.entry(BACKBONE).metrics)
    return fill(document, tables)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--choose", action="store_true", help="only try learning rates")
    parser.add_argument("--write", action="store_true", help="run nothing, only write the tables")
    options = parser.parse_args()
    if options.choose:
        choose()
        return
    known = load() if options.write else run()
    PAGE.write_text(write(PAGE.read_text(), known))


if __name__ == "__main__":
    main()
