"""Metrics for each structure of a volume, and over many volumes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy

from mmadapt.core.table import Table
from mmadapt.errors import DataError
from mmadapt.tasks.segment.metrics import dice, hausdorff, summary, surface_dice
from mmadapt.tasks.volume.grid import Grid


@dataclass(frozen=True)
class Score:
    """One structure in one volume: overlap, distances in mm, sizes in millilitres."""

    structure: str
    dice: float
    hausdorff: float
    surface_dice: float
    predicted_ml: float
    true_ml: float


def score_structures(
    prediction: Any,
    truth: Any,
    grid: Grid,
    names: Mapping[int, str] | None = None,
    tolerance: float = 2.0,
    far: float | None = None,
) -> list[Score]:
    """Dice, HD95 and surface Dice within `tolerance` mm of every label, of labels (D, H, W).

    Structures are those of `names`, or every label above 0 that either of the two has. One that only
    one of them has is missed: Dice 0, surface Dice 0, distance `far`, infinite unless given.
    """
    found = [_labels(values, name, grid) for values, name in ((prediction, "prediction"), (truth, "truth"))]  # fmt: skip
    present = sorted({int(v) for values in found for v in numpy.unique(values)} - {0})
    unknown = [label for label in present if names is not None and label not in names]
    if unknown:
        raise DataError(
            f"labels {unknown} have no name, named are {dict(names or {})}",
            "name every label, or set those that do not count to 0 in both",
        )
    millilitres = math.prod(grid.spacing) / 1000
    scores = []
    for label, name in (names or {label: str(label) for label in present}).items():
        own, true = found[0] == label, found[1] == label
        scores.append(
            Score(
                name,
                dice(own, true),
                hausdorff(own, true, grid.spacing, far=math.inf if far is None else far),
                surface_dice(own, true, tolerance, grid.spacing),
                float(own.sum()) * millilitres,
                float(true.sum()) * millilitres,
            )
        )
    return scores


def score_table(cases: Iterable[list[Score]]) -> Table:
    """One row a structure over all cases: mean Dice, median HD95, mean surface Dice, and misses."""
    groups: dict[str, list[Score]] = {}
    for scores in cases:
        for score in scores:
            groups.setdefault(score.structure, []).append(score)
    table = Table(
        ("structure", "cases", "missed", "Dice", "median HD95 mm", "surface Dice"),
        title="metrics per structure",
        notes=["missed: no voxel in common; such cases count in every mean"],
    )
    for name, own in groups.items():
        overlap = summary([score.dice for score in own])
        distance = float(numpy.median([score.hausdorff for score in own]))
        surface = summary([score.surface_dice for score in own])
        table.rows.append((name, len(own), overlap.missed, overlap.mean, distance, surface.mean))
    return table


def _labels(values: Any, name: str, grid: Grid) -> numpy.ndarray:
    array = numpy.asarray(values.detach().cpu() if hasattr(values, "detach") else values)
    if array.dtype.kind not in "bui" or array.shape != grid.size:
        raise DataError(
            f"the {name} is {array.dtype} {array.shape}, expected whole numbers of {grid.size}",
            "compare on the grid the truth was drawn on: volume.back(mask) and volume.original",
        )
    return array
