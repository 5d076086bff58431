"""Any2Point on generated shapes: against a linear probe and training from scratch, three seeds.

    python benchmarks/points.py            # about ten minutes on one thread; writes points.json
    python benchmarks/points.py --quick    # one seed, few steps, writes nothing: does it run?

A small vision transformer first learns drawings (flat figures, 32 × 32 pixels); it never sees a solid.
Then it is frozen, and clouds of 256 points on the surfaces of ten kinds of solids are to be told
apart. Shapes are held out: the proportions of test solids lie outside of those of training solids.
Every cloud is turned at random about the vertical axis, cut (a tenth of it is missing) and noisy.

The linear probe sees the class tokens of six depth images of a cloud, averaged. From scratch the same
network as Any2Point's is trained in full from random weights. The last row tells what the frozen
weights are worth: Any2Point on a transformer that has learnt nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import processor
from torch import Tensor
from torch.nn import functional as F

import mmadapt as mm
from mmadapt.ops.points import projected

HERE = Path(__file__).resolve().parent
SEEDS = (0, 1, 2)
SIDE, PATCH, POINTS = 32, 4, 256
SHOTS, TESTS = 20, 50  # clouds of every kind
DRAWING_STEPS, STEPS, BATCH = 400, 300, 25

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
        u = torch.rand(7, generator=draw).tolist()
        angle, size, stretch = 2 * math.pi * u[0], 0.6 + 0.5 * u[1], 0.7 + 0.6 * u[2]
        x, y = column - 0.5 * (u[3] - 0.5), row - 0.5 * (u[4] - 0.5)
        x, y = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
        inside = list(FIGURES.values())[kind](x / size / stretch, y / size * stretch)
        noise = 0.2 * torch.randn(SIDE, SIDE, generator=draw)
        images.append((0.5 + 0.5 * u[5]) * inside + noise)
    return torch.stack(images)[:, None].repeat(1, 3, 1, 1), kinds


def configuration() -> Any:
    from transformers import ViTConfig

    return ViTConfig(
        hidden_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=192,
        image_size=SIDE,
        patch_size=PATCH,
        num_labels=len(FIGURES),
    )


def bare_transformer() -> Any:
    from transformers import ViTModel

    return ViTModel(configuration(), add_pooling_layer=False).eval()


def learn_drawings(seed: int, steps: int) -> tuple[Any, float]:
    """A transformer that tells drawings apart, bare, and its accuracy on new ones."""
    from transformers import ViTForImageClassification

    torch.manual_seed(seed)
    model: Any = ViTForImageClassification(configuration())
    draw = torch.Generator().manual_seed(100 + seed)
    images, kinds = drawings(4000, draw)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-3, total_steps=steps)
    for _ in range(steps):
        chosen = torch.randint(0, len(images), (64,), generator=draw)
        loss = F.cross_entropy(model(images[chosen]).logits, kinds[chosen])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    model.eval()
    images, kinds = drawings(500, draw)
    with torch.no_grad():
        right = (model(images).logits.argmax(1) == kinds).float().mean().item()
    bare = bare_transformer()
    bare.load_state_dict(model.vit.state_dict())
    return bare, right


# -- solids ------------------------------------------------------------------------------------------

Draw = Callable[[tuple[int, ...]], Tensor]


def _circle(angle: Tensor) -> tuple[Tensor, Tensor]:
    return angle.cos(), angle.sin()


def _ball(n: int, u: Draw, f: float) -> Tensor:
    z, angle = 2 * u((n,)) - 1, 2 * math.pi * u((n,))
    r = (1 - z * z).sqrt()
    return torch.stack([r * angle.cos(), r * angle.sin(), f * z], 1)


def _box(n: int, u: Draw, f: float) -> Tensor:
    points = 2 * u((n, 3)) - 1
    face = (3 * u((n,))).long().clamp(max=2)
    points[torch.arange(n), face] = points[torch.arange(n), face].sign()
    return points * torch.tensor([1.0, 1.0, f])


def _tube(n: int, u: Draw, f: float) -> Tensor:
    x, y = _circle(2 * math.pi * u((n,)))
    return torch.stack([x, y, f * (2 * u((n,)) - 1)], 1)


def _cylinder(n: int, u: Draw, f: float) -> Tensor:
    caps = _tube(n, u, f)
    cap = u((n,)) < 0.35
    caps[cap, :2] *= u((n,)).sqrt()[cap, None]
    caps[cap, 2] = f * (2 * (u((n,)) < 0.5).float() - 1)[cap]
    return caps


def _cone(n: int, u: Draw, f: float) -> Tensor:
    height = u((n,)).sqrt()
    x, y = _circle(2 * math.pi * u((n,)))
    return torch.stack([height * x, height * y, f * (1 - 2 * height)], 1)


def _pyramid(n: int, u: Draw, f: float) -> Tensor:
    height = u((n,)).sqrt()
    side = _box(n, u, 1.0)[:, :2]
    side = side / side.abs().amax(1, keepdim=True)
    return torch.cat([height[:, None] * side, f * (1 - 2 * height)[:, None]], 1)


def _torus(n: int, u: Draw, f: float) -> Tensor:
    one, other = 2 * math.pi * u((n,)), 2 * math.pi * u((n,))
    r = 1 + 0.35 * f * other.cos()
    return torch.stack([r * one.cos(), r * one.sin(), 0.35 * f * other.sin()], 1)


def _helix(n: int, u: Draw, f: float) -> Tensor:
    t = 2 * u((n,)) - 1
    x, y = _circle(4 * math.pi * t)
    return torch.stack([x, y, f * t], 1) + 0.06 * (u((n, 3)) - 0.5)


def _saddle(n: int, u: Draw, f: float) -> Tensor:
    x, y = (2 * u((n, 2)) - 1).T
    return torch.stack([x, y, 0.7 * f * (x * x - y * y)], 1)


def _crossed(n: int, u: Draw, f: float) -> Tensor:
    x, z = (2 * u((n, 2)) - 1).T
    flat, turned = (torch.stack(v, 1) for v in ((x, 0 * x, f * z), (0 * x, x, f * z)))
    return torch.where(u((n, 1)) < 0.5, flat, turned)


SOLIDS: dict[str, Callable[[int, Draw, float], Tensor]] = {
    "ball": _ball,
    "box": _box,
    "tube": _tube,
    "cylinder": _cylinder,
    "cone": _cone,
    "pyramid": _pyramid,
    "torus": _torus,
    "helix": _helix,
    "saddle": _saddle,
    "crossed plates": _crossed,
}


def clouds(each: int, held_out: bool, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Clouds (10·each, POINTS, 3) in the unit ball, and their kinds.

    A solid is as high as wide times a factor: 0.8 to 1.3 in training, 0.6 to 0.8 or 1.3 to 1.6 for the
    shapes held out.
    """

    def u(shape: tuple[int, ...]) -> Tensor:
        return torch.rand(shape, generator=draw)

    found, kinds = [], []
    for kind, solid in enumerate(SOLIDS.values()):
        for _ in range(each):
            one, side = u((2,)).tolist()
            factor = 0.8 + 0.5 * one
            if held_out:
                factor = 0.6 + 0.2 * one if side < 0.5 else 1.3 + 0.3 * one
            points = solid(2 * POINTS, u, factor)
            points = points + 0.03 * torch.randn(points.shape, generator=draw)
            angle = 2 * math.pi * u((1,)).item()
            x, y = points[:, 0].clone(), points[:, 1].clone()
            points[:, 0] = x * math.cos(angle) - y * math.sin(angle)
            points[:, 1] = x * math.sin(angle) + y * math.cos(angle)
            towards = F.normalize(
                torch.randn(3, generator=draw), dim=0
            )  # the tenth that is cut off
            kept = (points @ towards).argsort()[: int(1.8 * POINTS)]
            points = points[kept[torch.randperm(len(kept), generator=draw)[:POINTS]]]
            points = points - points.mean(0)
            found.append(points / points.norm(dim=1).max())
            kinds.append(kind)
    return torch.stack(found), torch.tensor(kinds)


# -- ways to tell solids apart -------------------------------------------------------------------------


def depth_images(points: Tensor) -> Tensor:
    """Six images (B, 6, 3, SIDE, SIDE) of clouds, bright where a point is."""
    places = projected(points, -1.8, SIDE, SIDE).long().clamp(0, SIDE - 1)  # (B, 6, N, 2)
    cells = places[..., 1] * SIDE + places[..., 0]
    images = torch.zeros(*cells.shape[:2], SIDE * SIDE)
    images.scatter_(2, cells, 1.0)
    images = F.max_pool2d(images.view(-1, 1, SIDE, SIDE), 3, 1, 1)  # points have an extent
    return images.view(*cells.shape[:2], 1, SIDE, SIDE).repeat(1, 1, 3, 1, 1)


@torch.no_grad()
def features(model: Any, points: Tensor) -> Tensor:
    """Class tokens (B, C) of six depth images, averaged."""
    images = depth_images(points).flatten(0, 1)
    tokens = [model(part).last_hidden_state[:, 0] for part in images.split(300)]
    return torch.cat(tokens).unflatten(0, (-1, 6)).mean(1)


def linear_probe(model: Any, train: Any, test: Any, seed: int) -> tuple[float, int]:
    seen, new = features(model, train[0]), features(model, test[0])
    mean, deviation = seen.mean(0), seen.std(0)
    seen, new = (seen - mean) / deviation, (new - mean) / deviation
    torch.manual_seed(seed)
    head = torch.nn.Linear(seen.shape[1], len(SOLIDS))
    optimiser = torch.optim.LBFGS(head.parameters(), max_iter=200)

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = F.cross_entropy(head(seen), train[1]) + 1e-3 * head.weight.square().sum()
        loss.backward()
        return loss

    optimiser.step(closure)  # type: ignore[arg-type]
    return accuracy(head(new), test[1]), sum(p.numel() for p in head.parameters())


def any2point(
    model: Any, train: Any, test: Any, seed: int, steps: int, whole: bool = False
) -> tuple[float, int]:
    """Any2Point on a frozen transformer, or with `whole` everything trained."""
    attachment = mm.attach(
        model,
        mm.Any2Point(len(SOLIDS), tokens=32, neighbours=16, neck=16, head_width=64, voxel=0.3),
        seed=seed,
    )
    if whole:
        model.requires_grad_(True)
    trained = [p for p in model.parameters() if p.requires_grad]
    draw = torch.Generator().manual_seed(200 + seed)
    torch.manual_seed(seed)  # dropout
    optimiser = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps)
    with mm.train_mode(model):
        for _ in range(steps):
            chosen = torch.randperm(len(train[0]), generator=draw)[:BATCH]
            scale = 0.9 + 0.1 * torch.rand(BATCH, 1, 1, generator=draw)
            logits = model(pixel_values=train[0][chosen] * scale)
            loss = F.cross_entropy(logits, train[1][chosen], label_smoothing=0.1)
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 10.0)
            optimiser.step()
            schedule.step()
    model.eval()
    with torch.no_grad():
        logits = torch.cat([model(pixel_values=part) for part in test[0].split(100)])
    assert attachment.num_parameters
    return accuracy(logits, test[1]), sum(p.numel() for p in trained)


def accuracy(logits: Tensor, kinds: Tensor) -> float:
    return (logits.argmax(1) == kinds).float().mean().item()


def told_apart(seed: int, drawing_steps: int, steps: int) -> tuple[float, dict[str, Any]]:
    """Accuracy of the backbone on its drawings, and of every way on held-out solids with its size."""
    draw = torch.Generator().manual_seed(seed)
    train, test = clouds(SHOTS, False, draw), clouds(TESTS, True, draw)

    def random_weights() -> Any:
        torch.manual_seed(300 + seed)
        return bare_transformer()

    backbone, right = learn_drawings(seed, drawing_steps)
    ways = {
        "linear probe": lambda: linear_probe(backbone, train, test, seed),
        "from scratch": lambda: any2point(random_weights(), train, test, seed, steps, True),
        "Any2Point": lambda: any2point(backbone, train, test, seed, steps),
        "Any2Point, random backbone": lambda: any2point(random_weights(), train, test, seed, steps),
    }
    found = {}
    for name, tell in ways.items():
        found[name] = tell()
        print(f"seed {seed}: {name} {100 * found[name][0]:.1f} %", flush=True)
    return right, found


def run(seeds: tuple[int, ...], drawing_steps: int, steps: int) -> dict[str, Any]:
    """Accuracies on held-out shapes, seed by seed."""
    results = [told_apart(seed, drawing_steps, steps) for seed in seeds]
    methods = {}
    for name in results[0][1]:
        accuracies = [found[name][0] for _, found in results]
        methods[name] = {
            "accuracy": accuracies,
            "mean": statistics.mean(accuracies),
            "deviation": statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0,
            "trained": results[0][1][name][1],
        }
    return {"drawings": [right for right, _ in results], "methods": methods}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    if quick:
        run(SEEDS[:1], 3, 3)
        return
    results = {
        "machine": f"{processor()}, 1 thread, torch {torch.__version__}",
        "clouds": {"points": POINTS, "train": SHOTS * len(SOLIDS), "test": TESTS * len(SOLIDS)},
        "steps": {"drawings": DRAWING_STEPS, "clouds": STEPS, "batch": BATCH},
        "seeds": list(SEEDS),
        **run(SEEDS, DRAWING_STEPS, STEPS),
    }
    (HERE / "points.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
