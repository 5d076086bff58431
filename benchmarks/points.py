"""Any2Point on solids it has not seen: against probes, training from scratch and its own controls.

    python benchmarks/points.py            # what is missing; a few minutes on one thread
    python benchmarks/points.py --quick    # one seed, few steps, writes nothing: does it run?
    python benchmarks/points.py --write    # runs nothing, only writes the table

Writes `points.json` beside itself, row by row, and puts the table and a picture into docs/.

A small vision transformer learns drawings (flat figures, 24 × 24 pixels) and never sees a solid. Then
it is frozen, and clouds of points on ten kinds of solids are to be told apart. The proportions of
the solids in test are none of those in training, and those in validation none of either; there every
learning rate and penalty is chosen, with a seed of its own. Test is looked at once a row.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import processor
from pages import fill
from torch import Tensor
from torch.nn import functional as F

import mmadapt as mm
from mmadapt.ops.points import projected
from mmadapt.tasks.points import SOLIDS, Solids, cloud_figure, solids

HERE = Path(__file__).resolve().parent
RESULTS, PAGE = HERE / "points.json", HERE.parent / "docs" / "points.md"

SEEDS, CHOOSING_SEED = (0, 1, 2), 9
SIDE, PATCH = 24, 4
SETTINGS = {
    "points": 128,
    "each": {"train": 20, "validation": 25, "test": 30},
    "drawings": {"count": 3000, "steps": 400, "batch": 40},
    "steps": 90,
    "batch": 20,
    "rates": [3e-3, 1e-2],
    "penalties": [1e-4, 1e-3, 1e-2, 1e-1],
    "adapter": {"tokens": 16, "neighbours": 12, "neck": 16, "head_width": 64, "voxel": 0.4},
}

# -- drawings, which the backbone learns --------------------------------------------------------------

FIGURES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "disc": lambda x, y: x * x + y * y < 0.6,
    "ring": lambda x, y: (x * x + y * y - 0.5).abs() < 0.25,
    "square": lambda x, y: x.abs().maximum(y.abs()) < 0.7,
    "frame": lambda x, y: (x.abs().maximum(y.abs()) - 0.6).abs() < 0.18,
    "triangle": lambda x, y: (y < 0.7) & (y > 2 * x.abs() - 0.8),
    "cross": lambda x, y: (x.abs().minimum(y.abs()) < 0.25) & (x.abs().maximum(y.abs()) < 0.85),
    "bar": lambda x, y: (x.abs() < 0.9) & (y.abs() < 0.25),
    "two bars": lambda x, y: (x.abs() < 0.8) & ((y.abs() - 0.45).abs() < 0.18),
    "half disc": lambda x, y: (x * x + y * y < 0.7) & (y > 0),
    "diamond": lambda x, y: x.abs() + y.abs() < 0.85,
    "corner": lambda x, y: (x.abs().maximum(y.abs()) < 0.75) & ((x < -0.2) | (y > 0.2)),
    "waves": lambda x, y: (y - 0.4 * torch.sin(4 * x)).abs() < 0.2,
}


def drawings(count: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images (count, 3, SIDE, SIDE) of figures moved, scaled, turned and stretched, and their kinds."""
    axis = torch.linspace(-1.3, 1.3, SIDE)
    row, column = torch.meshgrid(axis, axis, indexing="ij")
    kinds = torch.randint(0, len(FIGURES), (count,), generator=draw)
    images = []
    for kind in kinds.tolist():
        u = torch.rand(6, generator=draw).tolist()
        angle, size, stretch = math.pi / 3 * (u[0] - 0.5), 0.7 + 0.4 * u[1], 0.8 + 0.4 * u[2]
        x, y = column - 0.4 * (u[3] - 0.5), row - 0.4 * (u[4] - 0.5)
        x, y = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
        inside = list(FIGURES.values())[kind](x / size / stretch, y / size * stretch)
        noise = 0.1 * torch.randn(SIDE, SIDE, generator=draw)
        images.append((0.5 + 0.5 * u[5]) * inside + noise)
    return torch.stack(images)[:, None].repeat(1, 3, 1, 1), kinds


def configuration() -> Any:
    from transformers import ViTConfig

    return ViTConfig(
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=192,
        image_size=SIDE,
        patch_size=PATCH,
        initializer_range=0.12,  # the usual 0.02 is for wide models
        num_labels=len(FIGURES),
    )


def bare_transformer(seed: int) -> Any:
    """One that has learnt nothing."""
    from transformers import ViTModel

    torch.manual_seed(300 + seed)
    return ViTModel(configuration(), add_pooling_layer=False).eval()


def learn_drawings(count: int, steps: int, batch: int) -> tuple[Any, float]:
    """A transformer that tells drawings apart, bare, and its accuracy on new ones."""
    from transformers import ViTForImageClassification

    torch.manual_seed(0)
    model: Any = ViTForImageClassification(configuration())
    draw = torch.Generator().manual_seed(100)
    images, kinds = drawings(count, draw)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps)
    for _ in range(steps):
        chosen = torch.randint(0, len(images), (batch,), generator=draw)
        loss = F.cross_entropy(model(images[chosen]).logits, kinds[chosen])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    model.eval()
    images, kinds = drawings(600, draw)
    with torch.no_grad():
        right = accuracy(model(images).logits, kinds)
    bare = bare_transformer(0)
    bare.load_state_dict(model.vit.state_dict())
    return bare, right


# -- ways without training a network ------------------------------------------------------------------


def descriptors(clouds: Tensor) -> Tensor:
    """What one writes down by hand: histograms of distances, heights and radii, and three extents."""
    upper = torch.ones(2 * [clouds.shape[1]], dtype=torch.bool).triu(1)
    rows = []
    for cloud in clouds:
        spread = torch.linalg.eigvalsh(torch.cov(cloud.T)).sqrt()
        histograms = [
            torch.histc(values, 16, low, high) / len(values)
            for values, low, high in (
                (torch.cdist(cloud, cloud)[upper], 0.0, 2.0),
                (cloud.norm(dim=1), 0.0, 1.0),
                (cloud[:, 2], -1.0, 1.0),
                (cloud[:, :2].norm(dim=1), 0.0, 1.0),
            )
        ]
        rows.append(torch.cat([*histograms, spread]))
    return torch.stack(rows)


@torch.no_grad()
def virtual_images(model: Any, clouds: Tensor) -> Tensor:
    """Class tokens (B, C) of a frozen transformer for six virtual images of a cloud, averaged."""
    places = projected(clouds, -1.8, SIDE, SIDE).long().clamp(0, SIDE - 1)  # (B, 6, N, 2)
    images = torch.zeros(*places.shape[:2], SIDE * SIDE)
    images.scatter_(2, places[..., 1] * SIDE + places[..., 0], 1.0)
    images = F.max_pool2d(images.view(-1, 1, SIDE, SIDE), 3, 1, 1)  # points have an extent
    images = images.repeat(1, 3, 1, 1)
    tokens = [model(part).last_hidden_state[:, 0] for part in images.split(300)]
    return torch.cat(tokens).unflatten(0, (-1, 6)).mean(1)


@torch.no_grad()
def untrained(model: Any, clouds: Tensor) -> Tensor:
    """Class token and maximum of the tokens (B, 2·C) of Any2Point as it is before any training."""
    mm.attach(model, mm.Any2Point(**SETTINGS["adapter"]), seed=0)
    model.eval()
    tokens = torch.cat([model(part).last_hidden_state for part in clouds.split(100)])
    mm.detach(model)
    return torch.cat([tokens[:, 1:].amax(1), tokens[:, 0]], 1)


def probe(see: Callable[[Tensor], Tensor], data: dict[str, Solids]) -> tuple[float, int, Any]:
    """Logistic regression; its penalty is chosen on validation."""
    seen = {split: see(data[split].clouds) for split in data}
    mean, deviation = seen["train"].mean(0), seen["train"].std(0).clamp(min=1e-6)
    seen = {split: (values - mean) / deviation for split, values in seen.items()}
    found = []
    for penalty in SETTINGS["penalties"]:
        head = torch.nn.Linear(seen["train"].shape[1], len(SOLIDS))
        torch.nn.init.zeros_(head.weight)
        optimiser = torch.optim.LBFGS(head.parameters(), max_iter=300)

        def closure() -> Tensor:
            optimiser.zero_grad()  # noqa: B023
            loss = F.cross_entropy(head(seen["train"]), data["train"].labels)  # noqa: B023
            loss = loss + penalty * head.weight.square().sum()  # noqa: B023
            loss.backward()
            return loss

        optimiser.step(closure)  # type: ignore[arg-type]
        right = accuracy(head(seen["validation"]), data["validation"].labels)
        found.append((right, penalty, head))
    _, penalty, head = max(found, key=lambda one: one[0])
    trained = sum(p.numel() for p in head.parameters())
    return accuracy(head(seen["test"]), data["test"].labels), trained, penalty


def nearest(data: dict[str, Solids]) -> tuple[float, int, Any]:
    """The kind of the nearest training cloud by their descriptors."""
    train, test = descriptors(data["train"].clouds), descriptors(data["test"].clouds)
    mean, deviation = train.mean(0), train.std(0).clamp(min=1e-6)
    chosen = torch.cdist((test - mean) / deviation, (train - mean) / deviation).argmin(1)
    right = data["train"].labels[chosen] == data["test"].labels
    return right.float().mean().item(), 0, None


# -- ways that train a network ------------------------------------------------------------------------


def learn(
    model: Any, train: Solids, test: Solids, seed: int, rate: float, steps: int, how: str
) -> tuple[float, int]:
    """Accuracy on `test` and trained parameters of Any2Point at a learning rate.

    `how`: "adapter", or "whole": the backbone is trained too, or "alone": its blocks do nothing, so
    that the tokenizer and the head remain.
    """
    if how == "alone":
        for name, parameter in model.named_parameters():
            if ".o_proj." in name or ".fc2." in name:
                torch.nn.init.zeros_(parameter)
    nothing = {"scale": 0.0, "share": 0.0} if how == "alone" else {}
    adapter = mm.Any2Point(len(SOLIDS), **SETTINGS["adapter"], **nothing)
    attachment = mm.attach(model, adapter, seed=seed)
    trained = list(model.requires_grad_(True).parameters() if how == "whole" else attachment.parameters())  # fmt: skip
    draw = torch.Generator().manual_seed(200 + seed)
    torch.manual_seed(seed)  # dropout
    optimiser = torch.optim.AdamW(trained, lr=rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps)
    with mm.train_mode(model):
        for _ in range(steps):
            chosen = torch.randperm(len(train.labels), generator=draw)[: SETTINGS["batch"]]
            logits = model(pixel_values=varied(train.clouds[chosen], draw))
            loss = F.cross_entropy(logits, train.labels[chosen], label_smoothing=0.1)
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 10.0)
            optimiser.step()
            schedule.step()
    model.eval()
    with torch.no_grad():
        logits = torch.cat([model(pixel_values=part) for part in test.clouds.split(100)])
    used = [p for p in trained if p.grad is not None and p.grad.any()]
    return accuracy(logits, test.labels), sum(p.numel() for p in used)


def varied(clouds: Tensor, draw: torch.Generator) -> Tensor:
    """The same clouds, each turned about the vertical axis and scaled by 0.9 to 1.1."""
    angle = 2 * math.pi * torch.rand(len(clouds), generator=draw)
    size = 0.9 + 0.2 * torch.rand(len(clouds), 1, 1, generator=draw)
    x, y, z = clouds.unbind(-1)
    cosine, sine = angle.cos()[:, None], angle.sin()[:, None]
    return size * torch.stack([cosine * x - sine * y, sine * x + cosine * y, z], -1)


def accuracy(logits: Tensor, kinds: Tensor) -> float:
    return (logits.argmax(1) == kinds).float().mean().item()


#: name in the table -> how it is trained, and whether on the backbone that learnt drawings
TRAINED = {
    "tokenizer and head alone": ("alone", False),
    "from scratch, everything trained": ("whole", False),
    "Any2Point, random frozen backbone": ("adapter", False),
    "Any2Point, trained frozen backbone": ("adapter", True),
}
PROBES = (
    "nearest neighbour on descriptors",
    "logistic regression on descriptors",
    "linear probe, untrained Any2Point",
    "linear probe, six virtual images",
)


def data_of(seed: int) -> dict[str, Solids]:
    return {
        split: solids(each, split, SETTINGS["points"], seed=1000 * place + seed)
        for place, (split, each) in enumerate(SETTINGS["each"].items())
    }


def measure(method: str, seed: int, rate: float | None, backbone: Any, steps: int) -> dict:
    """One row: test accuracy at a rate, or for the choosing seed validation accuracy."""
    data, begin = data_of(seed), time.process_time()
    split = "validation" if seed == CHOOSING_SEED else "test"
    if method in TRAINED:
        how, knows = TRAINED[method]
        model = backbone if knows else bare_transformer(seed)
        assert rate is not None
        right, trained = learn(model, data["train"], data[split], seed, rate, steps, how)
        if knows:
            mm.detach(model)
        setting: Any = rate
    elif method == "nearest neighbour on descriptors":
        right, trained, setting = nearest(data)
    else:
        see = {
            "logistic regression on descriptors": descriptors,
            "linear probe, untrained Any2Point": lambda clouds: untrained(backbone, clouds),
            "linear probe, six virtual images": lambda clouds: virtual_images(backbone, clouds),
        }[method]
        right, trained, setting = probe(see, data)
    return {
        "method": method,
        "seed": seed,
        "split": split,
        "setting": setting,
        "accuracy": right,
        "trained": trained,
        "seconds": round(time.process_time() - begin, 1),
    }


def chosen_rate(rows: list[dict], method: str) -> float:
    """The learning rate that did best on validation."""
    own = [r for r in rows if r["method"] == method and r["split"] == "validation"]
    return max(own, key=lambda row: row["accuracy"])["setting"]


def run() -> dict[str, Any]:
    """Do what is still missing, and write the file after every row."""
    known = {
        "machine": f"{processor()}, 1 thread, torch {torch.__version__}",
        "settings": SETTINGS,
        "drawings": None,
        "rows": [],
    }
    if RESULTS.exists():
        known = json.loads(RESULTS.read_text())
        if known["settings"] != SETTINGS:
            raise SystemExit(f"{RESULTS} is of other settings; delete it to start over")
    backbone, known["drawings"] = learn_drawings(**SETTINGS["drawings"])
    print(f"drawings told apart: {known['drawings']:.3f}", flush=True)

    def add(method: str, seed: int, rate: float | None) -> None:
        for row in known["rows"]:
            if (row["method"], row["seed"]) == (method, seed) and rate in (None, row["setting"]):
                return
        row = measure(method, seed, rate, backbone, SETTINGS["steps"])
        known["rows"].append(row)
        RESULTS.write_text(json.dumps(known, indent=1) + "\n")
        print(f"{row['split']} {method} {seed} {row['setting']} {row['accuracy']:.3f}", flush=True)

    for method in TRAINED:
        for rate in SETTINGS["rates"]:
            add(method, CHOOSING_SEED, rate)
    for seed in SEEDS:
        for method in (*PROBES, *TRAINED):
            add(method, seed, chosen_rate(known["rows"], method) if method in TRAINED else None)
    return known


def finished(known: dict[str, Any]) -> list[int]:
    """The seeds with which every method was run."""
    done = {(row["method"], row["seed"]) for row in known["rows"] if row["split"] == "test"}
    return [s for s in SEEDS if all((method, s) in done for method in (*PROBES, *TRAINED))]


def table(known: dict[str, Any]) -> str:
    """Markdown, a row a method."""
    seeds = finished(known)
    if not seeds:
        return "Not run yet; `python benchmarks/points.py` does."
    lines = ["| | trained | test accuracy % | seed by seed | CPU s |", "|---|---|---|---|---|"]
    rows = [row for row in known["rows"] if row["split"] == "test" and row["seed"] in seeds]
    for method in (*PROBES, *TRAINED):
        own = [row for row in rows if row["method"] == method]
        values = [100 * row["accuracy"] for row in own]
        spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        cells = [
            f"**{method}**" if method.endswith("trained frozen backbone") else method,
            f"{own[0]['trained']:,}" if own[0]["trained"] else "–",
            f"{statistics.mean(values):.1f}{spread}",
            ", ".join(f"{value:.1f}" for value in values),
            f"{statistics.mean(row['seconds'] for row in own):.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    each, kinds = known["settings"]["each"], len(SOLIDS)
    lines.append(
        f"\n{each['train'] * kinds} clouds of {known['settings']['points']} points to train on, "
        f"{each['test'] * kinds} of other proportions to test on, {kinds} kinds; chance is "
        f"{100 / kinds:.0f} %. {known['settings']['steps']} steps of {known['settings']['batch']}. "
        f"{'Seeds' if len(seeds) > 1 else 'One seed,'} {', '.join(map(str, seeds))}"
        f"{', ± is their standard deviation' if len(seeds) > 1 else ''}. The backbone tells "
        f"{100 * known['drawings']:.1f} % of new drawings apart. {known['machine']}. "
        "`python benchmarks/points.py` writes it."
    )
    return "\n".join(lines)


def write(document: str, known: dict[str, Any]) -> str:
    """The document with the table between its markers."""
    return fill(document, {"solids": table(known)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--write", action="store_true", help="run nothing, only write the table")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.quick:
        backbone, _ = learn_drawings(100, 3, 20)
        for method in (*PROBES, *TRAINED):
            print(measure(method, 0, 1e-3, backbone, 3))
        return
    known = json.loads(RESULTS.read_text()) if options.write else run()
    PAGE.write_text(write(PAGE.read_text(), known))
    cone = solids(1, "train", seed=0).clouds[list(SOLIDS).index("cone")]
    cloud_figure(cone).savefig(PAGE.with_suffix(".png"), dpi=80)


if __name__ == "__main__":
    main()
