"""Simulated clicks."""

from __future__ import annotations

import torch
from torch import Tensor


def first_clicks(truth: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One click on each object: masks bool (B, H, W) → points (B, 1, 2) as (x, y), labels (B, 1).

    An image without the object gets a click anywhere, labelled 0.
    """
    return _draw(truth, torch.ones_like(truth), torch.zeros_like(truth), generator)


def click_on_error(
    prediction: Tensor, truth: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """One click where each prediction is wrong: label 1 where it misses the object, 0 beside it.

    Masks bool (B, H, W); a prediction without an error gets the label −1, no click.
    """
    missed, beside = truth & ~prediction, prediction & ~truth
    points, labels = _draw(missed | beside, missed, None, generator)
    return points, labels


def _draw(
    where: Tensor, on: Tensor, otherwise: Tensor | None, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    points, labels = [], []
    for place, own in enumerate(where.cpu()):
        candidates = own.nonzero()
        label = 1
        if not len(candidates):
            label = 0 if otherwise is not None else -1
            candidates = torch.ones_like(own).nonzero()
        row, column = candidates[
            int(torch.randint(len(candidates), (1,), generator=generator))
        ].tolist()
        if label == 1:
            label = int(on[place, row, column])
        points.append([[float(column), float(row)]])
        labels.append([label])
    return (
        torch.tensor(points, device=where.device),
        torch.tensor(labels, device=where.device),
    )
