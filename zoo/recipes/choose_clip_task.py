"""Measure which task of real images suits the demo of `tiny/clip`, and keep the numbers.

    python zoo/recipes/choose_clip_task.py

Wanted: real image content, where raw pixels fail, so that what is reached is the backbone's doing,
and where adapting clearly beats zero-shot and the linear probe. Writes `choose_clip_task.json`
beside itself. One CPU thread.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import torch

import mmadapt as mm
from mmadapt.demos import clip as demo
from mmadapt.tasks import few_shot
from mmadapt.tasks.scenes import exposed, handwriting, photograph_crops, to_bytes

MATERIALS = {
    "brick": "brick.png", "grass": "grass.png", "gravel": "gravel.png", "coins": "coins.png",
    "text": "page.png", "fur": "chelsea.png", "tissue": "ihc.png", "moon": "moon.png",
    "motorcycle": "motorcycle_left.png", "stars": "hubble_deep_field.jpg",
}  # photographs inside the scikit-image wheel  # fmt: skip
METHODS = (
    "zero-shot", "raw pixels + LR", "linear probe", "LoRA (MLP)", "Bottleneck", "full fine-tuning",
)  # fmt: skip


def materials(split: str, n: int, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Crops of photographs; the label says which material they show."""
    generator = torch.Generator().manual_seed(seed)
    names = tuple(MATERIALS.values())
    order = torch.randperm(n, generator=generator)
    pictures = photograph_crops(split, n, generator, names=names)[order]
    return to_bytes(exposed(pictures, generator)), (order % len(names)).numpy()


def plain_digits(split: str, n: int, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's digits as they are, white on black, enlarged to 32 pixels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    half = np.arange(897) if split == "train" else np.arange(897, len(data.target))
    rows = np.random.default_rng(seed).permutation(half)[:n]
    ink = torch.tensor(data.images[rows], dtype=torch.float32)[:, None] / 16
    large = torch.nn.functional.interpolate(ink, size=(32, 32), mode="bicubic").clamp(0, 1)
    return to_bytes(large.expand(-1, 3, -1, -1)), data.target[rows]


CANDIDATES = {
    "handwriting on photographs": (partial(handwriting, background="photographs"), demo.NAMES),
    "handwriting on scenes": (partial(handwriting, background="scenes"), demo.NAMES),
    "materials": (materials, tuple(MATERIALS)),
    "plain digits": (plain_digits, demo.NAMES),
}


def main() -> None:
    torch.set_num_threads(1)
    clip = mm.load(demo.BACKBONE)
    found = {}
    for name, (images, names) in CANDIDATES.items():
        print(f"\n{name}")
        comparison = few_shot.compare(
            clip,
            few_shot.labelled(*images("train", 900, seed=700), names),
            few_shot.labelled(*images("test", 900, seed=5), names),
            templates=demo.TEMPLATES,
            shots=(4, 16),
            seeds=(1, 2),
            methods=METHODS,
            augment=demo.variations,
            views=demo.VIEWS,
        )
        found[name] = comparison.to_json()
    path = Path(__file__).with_suffix(".json")
    path.write_text(json.dumps({"backbone": demo.BACKBONE, "tasks": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
