"""What a new wording costs to learn, and to unlearn: LLaMA-Adapter, V2, LoRA and full fine-tuning.

    python benchmarks/instruct_shift.py [--parts choose,wording,images] [--write]

Writes `instruct_shift.json` beside itself and the tables into docs/llama.md. What the file already
holds is not run again; delete it to start over. One CPU thread. Every method's rate is chosen from a
grid of its own, `--parts choose`, on strings of the split "validation" and with seeds that no result
has; results are of the split "test". Neither was ever trained on. Images likewise: the rate is chosen
on held-out triples of object, colour and background, results are of held-out pairs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from machine import processor
from pages import fill

import mmadapt as mm
from mmadapt.tasks import instruct, scenes
from mmadapt.tasks.instruct import compare, strings

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "instruct_shift.json"
PAGE = HERE.parent / "docs" / "llama.md"
BACKBONE, EYES = "tiny/llama", "tiny/clip"
WORDING = "spell {} backwards = "
SEEDS = (0, 1, 2)
IMAGE_SEEDS = (0,)
SETTINGS: dict[str, Any] = {
    "wording": {WORDING: strings.WORDINGS[WORDING]},
    "train": 200,
    "validation": 400,
    "test": 200,
    "old": 200,
    "batch": 24,
    "steps": {
        "LLaMA-Adapter": 400,
        "LLaMA-Adapter V2": 150,
        "LoRA (q, v)": 150,
        "full fine-tuning": 150,
    },
    "rates": {
        "LLaMA-Adapter": [4e-2, 8e-2, 1.6e-1, 3.2e-1, 6.4e-1],
        "LLaMA-Adapter V2": [1.5e-2, 3e-2, 6e-2, 1.2e-1, 2.4e-1],
        "LoRA (q, v)": [2.5e-3, 5e-3, 1e-2, 2e-2],
        "full fine-tuning": [2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3],
    },
    "images": {
        "train": 3000,
        "validation": 400,
        "test": 400,
        "steps": 600,
        "batch": 32,
        "rates": [1e-2, 2e-2, 4e-2, 8e-2],
    },
}
CHOOSING = (8, 9)  # seeds of the runs that rates are chosen on, for images the last
IMAGES = "images"  # their name among methods whose rate is chosen


def task(seed: int, split: str) -> tuple[list[instruct.Example], ...]:
    """Examples to train on, and of a split: of the new wording, and for tests of the old ones."""
    wording = SETTINGS["wording"]
    return (
        strings.instructions(SETTINGS["train"], seed=100 + seed, wordings=wording),
        strings.instructions(SETTINGS[split], seed=77, split=split, wordings=wording),
        strings.instructions(SETTINGS["old"], seed=78, split=split) if split == "test" else [],
    )


def measure(method: str, rate: float, seed: int, split: str) -> dict[str, Any]:
    """One row: train on a fresh backbone, and measure."""
    model = mm.load(BACKBONE)
    train, new, old = task(seed, split)
    recipe = compare.METHODS[method]
    start = compare.start_difference(model, recipe, train[:64], seed)
    _, history, seconds = compare.adapt(
        model,
        recipe,
        train,
        seed=seed,
        steps=SETTINGS["steps"][method],
        batch=SETTINGS["batch"],
        rate=rate,
    )
    result = compare.finish(
        model, method, history, new, old, seed=seed, start=start, rate=rate, seconds=seconds
    )
    return dataclasses.asdict(result)


# -- images -------------------------------------------------------------------------------------------


def seen(count: int, seed: int, split: str) -> tuple[torch.Tensor, list[list[int]]]:
    """Features (N, V) that the frozen eyes give of scenes, and the scenes' attributes."""
    from mmadapt.tasks import few_shot

    pictures, attributes = scenes.scenes(count, seed=seed, split=split)
    features = few_shot.embed(mm.load(EYES), pictures).float()
    return torch.nn.functional.normalize(features, dim=-1) * features.shape[-1] ** 0.5, [
        [int(value) for value in row] for row in attributes
    ]


def right(said: list[list[int | None]], truth: list[list[int]]) -> dict[str, float]:
    """The part of scenes of which each attribute is named right, and all of them at once."""
    names = ("object", "colour", "pattern", "background")
    pairs = list(zip(said, truth, strict=True))
    found = {n: statistics.mean(a[i] == b[i] for a, b in pairs) for i, n in enumerate(names)}
    return {**found, "whole caption": statistics.mean(a == b for a, b in pairs)}


def taught(
    features: torch.Tensor, attributes: list[list[int]], rate: float, seed: int
) -> tuple[mm.Backbone, int]:
    """A decoder that has learned to say what images show, and how many numbers it took."""
    size = SETTINGS["images"]
    model = mm.load(BACKBONE)
    examples = [instruct.Example(strings.CAPTION, strings.caption(row)) for row in attributes]
    data = instruct.encode(model.tokenize, examples).padded()
    adapter = mm.LlamaAdapter(layers=4, visual="added", features=features.shape[1])
    attachment = mm.attach(model, adapter, name="seeing", seed=seed)
    own = [p for n, p in attachment.named_parameters() if n.endswith((".prompt", ".gate"))]
    shared = [p for n, p in attachment.named_parameters() if not n.endswith((".prompt", ".gate"))]
    groups = [
        {"params": own, "lr": rate},
        {"params": shared, "lr": rate / 4},
    ]
    history = mm.fit(
        model,
        {**data, "visual": features},
        loss=instruct.response_loss,
        steps=size["steps"],
        batch_size=size["batch"],
        optimiser=mm.Optimiser(build=torch.optim.AdamW(groups, weight_decay=0.0)),
        seed=seed,
        progress=False,
    )
    return model, history.parameters


def captioned(model: Any, features: torch.Tensor, truth: list[list[int]]) -> dict[str, float]:
    """How much of each image the decoder's caption names right."""
    said = instruct.answers(model, [strings.CAPTION] * len(truth), visual=features)
    return right([strings.read_caption(text) for text in said], truth)


def images_at(rate: float, seed: int) -> dict[str, Any]:
    """One row of the search: attributes named right, on average, in images of the validation."""
    size = SETTINGS["images"]
    model, _ = taught(*seen(size["train"], 10 + seed, "seen"), rate, seed)
    named = captioned(model, *seen(size["validation"], 2000, "held_out_triples"))
    named.pop("whole caption")
    return {"method": IMAGES, "rate": rate, "seed": seed, "new": statistics.mean(named.values())}


def describe(seed: int, rate: float) -> list[dict[str, Any]]:
    """Captions by the adapted decoder, by the bare one, and attributes by linear probes."""
    from sklearn.linear_model import LogisticRegression

    size = SETTINGS["images"]
    features, attributes = seen(size["train"], 10 + seed, "seen")
    unseen, truth = seen(size["test"], 1000, "held_out_pairs")
    model, count = taught(features, attributes, rate, seed)
    adapted = captioned(model, unseen, truth)
    with mm.disabled(model):
        before = captioned(model, unseen, truth)
    probes = []
    for column in range(4):
        probe = LogisticRegression(max_iter=1000)
        probe.fit(features.numpy(), [row[column] for row in attributes])
        probes.append([int(value) for value in probe.predict(unseen.numpy())])
    probed = right([list(row) for row in zip(*probes, strict=True)], truth)
    return [
        {"what": "captions, adapter off", "parameters": 0, "seed": seed, **before},
        {
            "what": "captions, adapter on",
            "parameters": count,
            "seed": seed,
            "rate": rate,
            **adapted,
        },
        {
            "what": "linear probe on the same features",
            "parameters": (features.shape[1] + 1) * (22 + 10 + 5 + 10),
            "seed": seed,
            **probed,
        },
    ]


# -- all of it ----------------------------------------------------------------------------------------


def run(parts: list[str]) -> dict[str, Any]:
    """Do what is still missing, and write the file after every row."""
    context = {
        "machine": f"{processor()}, 1 thread, torch {torch.__version__}",
        "backbone": BACKBONE,
        "weights": mm.zoo.entry(BACKBONE).sha256,
        "settings": SETTINGS,
        "choose": [],
        "wording": [],
        "images": [],
    }
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else context
    if known["weights"] != context["weights"] or _fixed(known["settings"]) != _fixed(SETTINGS):
        raise SystemExit(f"{RESULTS} is of other weights or settings; delete it to start over")
    known["settings"] = SETTINGS

    def keep(part: str, row: dict[str, Any]) -> None:
        known[part].append(row)
        RESULTS.write_text(json.dumps(known, indent=1) + "\n")
        print(part, row, flush=True)

    if "choose" in parts:
        done = {(row["method"], row["rate"], row["seed"]) for row in known["choose"]}
        for method, rates in SETTINGS["rates"].items():
            for rate, seed in ((rate, seed) for rate in rates for seed in CHOOSING):
                if (method, rate, seed) not in done:
                    keep("choose", measure(method, rate, seed, "validation"))
    if "wording" in parts:
        rates = chosen(known)
        unchosen = [method for method in compare.METHODS if method not in rates]
        if unchosen:
            raise SystemExit(f"no rate was chosen for {unchosen}; --parts choose,wording does")
        if not known["wording"]:
            _, new, old = task(0, "test")
            keep("wording", dataclasses.asdict(compare.bare(mm.load(BACKBONE), new, old)))
        for seed in SEEDS:
            for method in compare.METHODS:
                if not any((r["method"], r["seed"]) == (method, seed) for r in known["wording"]):
                    keep("wording", measure(method, rates[method], seed, "test"))
    if "images" in parts:
        for rate in SETTINGS["images"]["rates"]:
            if not any((r["method"], r["rate"]) == (IMAGES, rate) for r in known["choose"]):
                keep("choose", images_at(rate, CHOOSING[-1]))
        for seed in IMAGE_SEEDS:
            if not any(row["seed"] == seed for row in known["images"]):
                for row in describe(seed, chosen(known)[IMAGES]):
                    keep("images", row)
    return known


def _fixed(settings: dict[str, Any]) -> dict[str, Any]:
    """Without the grids: a rate more leaves true what the others gave."""
    images = {k: v for k, v in settings["images"].items() if k != "rates"}
    return {**{k: v for k, v in settings.items() if k != "rates"}, "images": images}


def searched(known: dict[str, Any]) -> dict[str, dict[float, float]]:
    """By method and rate: what was right of the validation, the mean over the seeds of the search."""
    found: dict[str, dict[float, list[float]]] = {}
    for row in known["choose"]:
        found.setdefault(row["method"], {}).setdefault(row["rate"], []).append(row["new"])
    return {
        method: {rate: statistics.mean(values) for rate, values in sorted(rates.items())}
        for method, rates in found.items()
    }


def chosen(known: dict[str, Any]) -> dict[str, float]:
    """The smallest rate of each method that is within a point of its best one."""
    return {
        method: min(rate for rate, right in rates.items() if right >= max(rates.values()) - 0.01)
        for method, rates in searched(known).items()
    }


def spread(values: list[float | None], scale: float = 100, digits: int = 1) -> str:
    """Mean, and standard deviation over seeds where there are several."""
    kept = [scale * value for value in values if value is not None]
    if not kept:
        return "–"
    mean = f"{statistics.mean(kept):.{digits}f}"
    return f"{mean} ± {statistics.stdev(kept):.{digits}f}" if len(kept) > 1 else mean


def finished(known: dict[str, Any]) -> list[int]:
    """The seeds with which every method was run."""
    done = {(row["method"], row["seed"]) for row in known["wording"]}
    return [s for s in SEEDS if all((method, s) in done for method in compare.METHODS)]


def wording_table(known: dict[str, Any]) -> str:
    """Markdown, a row a method."""
    rows, seeds = known["wording"], finished(known)
    if not seeds:
        return "Not run yet; `python benchmarks/instruct_shift.py` does."
    lines = [
        "| method | trained | steps | rate | new wording | perplexity | old, on | old, off "
        "| training, CPU s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in ("backbone", *compare.METHODS):
        own = [row for row in rows if row["method"] == name and row["seed"] in seeds]
        cells = [
            name,
            f"{own[0]['parameters']:,}",
            str(own[0]["steps"] or "–"),
            f"{own[0]['rate']:g}" if own[0]["rate"] else "–",
            spread([row["new"] for row in own]),
            spread([row["perplexity"] for row in own], 1, 3),
            spread([row["old_on"] for row in own]),
            spread([row["old_off"] for row in own]),
            f"{statistics.mean(row['seconds'] for row in own):.0f}" if own[0]["steps"] else "–",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    settings = known["settings"]
    word = "seeds" if len(seeds) > 1 else "one seed,"
    lines.append(
        f"\nExact match in % by greedy decoding, on {settings['test']} test strings in the new wording and "
        f"{settings['old']} instructions in the old ones; {settings['train']} examples to learn from, "
        f"{settings['batch']} a step; {word} {', '.join(map(str, seeds))}. Rates were chosen from "
        f"the grids below. {known['machine']}. `python benchmarks/instruct_shift.py` writes it."
    )
    return "\n".join(lines)


def rate_table(known: dict[str, Any]) -> str:
    """Markdown, a row a method: every rate that was tried and what it gave, the chosen one in bold."""
    if not known["choose"]:
        return "Not run yet; `python benchmarks/instruct_shift.py --parts choose` does."
    taken, settings = chosen(known), known["settings"]
    lines = ["| method | rate: right in % of the validation |", "|---|---|"]
    for method, rates in searched(known).items():
        cells = []
        for rate, right in rates.items():
            cell = f"{rate:g}: {100 * right:.1f}"
            cells.append(f"**{cell}**" if rate == taken[method] else cell)
        lines.append(f"| {method} | {', '.join(cells)} |")
    lines.append(
        f"\n{settings['validation']} validation strings, means over seeds "
        f"{' and '.join(map(str, CHOOSING))}, steps as above; for images the mean of the four attributes of "
        f"{settings['images']['validation']} scenes, seed {CHOOSING[-1]}. In bold what was chosen: the "
        "smallest rate within a point of the best. "
        "`python benchmarks/instruct_shift.py --parts choose` writes it."
    )
    return "\n".join(lines)


def image_table(known: dict[str, Any]) -> str:
    """Markdown, a row a way to say what is in an image."""
    rows, size = known["images"], known["settings"]["images"]
    if not rows:
        return "Not run yet; `python benchmarks/instruct_shift.py` does."
    names = ("object", "colour", "background", "pattern", "whole caption")
    lines = [f"| | trained | {' | '.join(names)} |", f"|---|---|{'---|' * len(names)}"]
    for what in dict.fromkeys(row["what"] for row in rows):
        own = [row for row in rows if row["what"] == what]
        cells = [spread([row[name] for row in own]) for name in names]
        lines.append(f"| {what} | {own[0]['parameters']:,} | {' | '.join(cells)} |")
    seeds = sorted({row["seed"] for row in rows})
    lines.append(
        f"\nAccuracy in % on {size['test']} scenes whose pairs of object and colour were in no training "
        f"image; {size['train']} images to learn from, {size['steps']} steps of {size['batch']}, "
        f"{'seeds' if len(seeds) > 1 else 'seed'} {', '.join(map(str, seeds))}; the rate, "
        f"{chosen(known)[IMAGES]:g}, was chosen on {size['validation']} scenes of other kinds. "
        f"{known['machine']}. `python benchmarks/instruct_shift.py` writes it."
    )
    return "\n".join(lines)


def source_table(metrics: dict[str, Any]) -> str:
    """What the backbone's own recipe measured."""
    lines = ["| operation | exact match % |", "|---|---|"]
    for name, value in metrics["exact_match"].items():
        lines.append(f"| `{strings.plain(name).format('abcd')}` | {100 * value:.1f} |")
    for wording, value in metrics["exact_match_new_wordings"].items():
        shown = wording.format("abcd")
        lines.append(f"| `{shown}`, worded as it never was | {100 * value:.1f} |")
    return "\n".join([*lines, f"\n{metrics['n']} strings each that training never showed."])


def write(document: str, known: dict[str, Any]) -> str:
    """The document with its tables between their markers."""
    tables = {
        "wording": wording_table(known),
        "rate": rate_table(known),
        "image": image_table(known),
        "source": source_table(mm.zoo.entry(BACKBONE).metrics),
    }
    return fill(document, tables)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", default="choose,wording,images")
    parser.add_argument("--write", action="store_true", help="run nothing, only write the tables")
    options = parser.parse_args()
    torch.set_num_threads(1)
    known = json.loads(RESULTS.read_text()) if options.write else run(options.parts.split(","))
    if PAGE.exists():
        PAGE.write_text(write(PAGE.read_text(), known))


if __name__ == "__main__":
    main()
