"""Every few-shot method on the demo's task: 1, 4 and 16 shots, three seeds each.

    python benchmarks/few_shot_clip.py

Writes `few_shot_clip.json` beside itself and puts the table into the README. One CPU thread.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from machine import processor
from pages import fill

import mmadapt as mm
from mmadapt.demos import clip as demo
from mmadapt.tasks import few_shot

HERE = Path(__file__).resolve().parent


def machine() -> str:
    """What the seconds were measured on."""
    return f"{processor()}, 1 thread, torch {torch.__version__}"


def markdown(comparison: few_shot.Comparison, where: str) -> str:
    """One row a method, one column a number of shots."""
    shots = sorted({result.shots for result in comparison.results})
    head = [f"{k} shot{'s' * (k > 1)}" for k in shots]
    lines = [
        f"| method | trained | {' | '.join(head)} | source task, on | off |",
        f"|---|---|{'---|' * len(shots)}---|---|",
    ]
    for method in few_shot.METHODS:
        row = comparison.find(method, shots[-1]).row(comparison.original)
        cells = [
            f"{100 * found.accuracy:.1f} ± {100 * found.spread:.1f}"
            for found in (comparison.find(method, k) for k in shots)
        ]
        source = [row[-2], row[-1]]
        lines.append(f"| {method} | {row[4]} | {' | '.join([*cells, *source])} |")
    lines.append(
        f"\nTest accuracy in % on {comparison.test_images} images, mean ± standard deviation over seeds "
        f"{', '.join(map(str, comparison.seeds))}; the last two columns are the backbone's accuracy on "
        f"its own scenes after {shots[-1]} shots, with the adaptation on and off. {where}. "
        "`python benchmarks/few_shot_clip.py` prints it."
    )
    return "\n".join(lines)


def main() -> None:
    torch.set_num_threads(1)
    train, test = demo.task()
    comparison = few_shot.compare(
        mm.load(demo.BACKBONE),
        train,
        test,
        templates=demo.TEMPLATES,
        shots=(1, 4, 16),
        seeds=(1, 2, 3),
        source=demo.source(),
        augment=demo.variations,
        views=demo.VIEWS,
    )
    where = machine()
    result = {"machine": where, "backbone": demo.BACKBONE, **comparison.to_json()}
    (HERE / "few_shot_clip.json").write_text(json.dumps(result, indent=1) + "\n")
    readme = HERE.parent / "README.md"
    readme.write_text(fill(readme.read_text(), {"few-shot": markdown(comparison, where)}))


if __name__ == "__main__":
    main()
