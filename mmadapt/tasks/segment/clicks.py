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


def shared_clicks(truth: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One click for each volume, on its largest slice, given to all its slices.

    Masks bool (B, D, H, W) → points (B·D, 1, 2) as (x, y), labels (B·D, 1); a volume without the
    object gets a click anywhere, labelled 0.
    """
    largest = truth.sum((2, 3)).argmax(1)
    points, labels = first_clicks(truth[torch.arange(len(truth)), largest], generator)
    depth = truth.shape[1]
    return points.repeat_interleave(depth, 0), labels.repeat_interleave(depth, 0)


def boxes_around(
    truth: Tensor, generator: torch.Generator | None = None, amount: float = 0.05
) -> Tensor:
    """Boxes (B, 4) as (x1, y1, x2, y2) around masks bool (B, H, W), none of them empty.

    With a generator each side moves by N(0, amount²) of the box's extent, by twice the amount at
    most, and stays in the image.
    """
    corners = []
    for mask in truth.cpu():
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        corners.append([float(edge) for edge in (columns[0], rows[0], columns[-1], rows[-1])])
    boxes = torch.tensor(corners)
    if generator is not None:
        extent = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
        moved = torch.randn(boxes.shape, generator=generator) * amount
        boxes = boxes + moved.clamp(-2 * amount, 2 * amount) * extent
    limits = torch.tensor([truth.shape[2] - 1, truth.shape[1] - 1]).repeat(2)
    return boxes.clamp(min=torch.zeros(4), max=limits.float()).to(truth.device)


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
