"""Training with simulated clicks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mmadapt.errors import DataError
from mmadapt.tasks.segment.clicks import click_on_error, first_clicks, shared_clicks
from mmadapt.tasks.segment.model import decode, embed, sides


def dice_cross_entropy(logits: Tensor, truth: Tensor) -> Tensor:
    """Soft Dice plus binary cross-entropy, averaged over rows: logits and truth (B, …).

    Dice is 1 − (2·Σpt + ε) / (Σp² + Σt² + ε) with p = sigmoid(logits), ε = 1e-5.
    """
    if logits.shape != truth.shape:
        raise DataError(f"the logits are {tuple(logits.shape)}, the masks {tuple(truth.shape)}")
    t = _binary(truth).to(logits.dtype).flatten(1)
    z = logits.flatten(1)
    p = z.sigmoid()
    overlap, sizes = (p * t).sum(1), (p * p).sum(1) + (t * t).sum(1)
    soft_dice = 1 - (2 * overlap + 1e-5) / (sizes + 1e-5)
    return soft_dice.mean() + F.binary_cross_entropy_with_logits(z, t)


def _binary(mask: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return mask
    values = mask.unique()
    if not bool(((values == 0) | (values == 1)).all()):
        shown = ", ".join(f"{value:g}" for value in values[:6].tolist())
        raise DataError(
            f"a mask holds the values {shown}{' …' if len(values) > 6 else ''}, expected 0 and 1",
            "train one class at a time: mask == label",
        )
    return mask.bool()


class PromptedLoss:
    """A loss for `mmadapt.fit`: the image is encoded once and clicked `rounds` times.

    A batch is (pixels, masks): pixels (B, 3, side, side) from `Segmenter.prepare`, masks (B, side,
    side) of 0 and 1 in the same square. The first click is drawn on the object, later ones where
    the last answer is wrong, by a private generator of `seed`; an image without the object gets a
    click labelled 0. The loss is Dice plus cross-entropy, averaged over the rounds.

    Stacks of slices have one axis more: pixels (B, D, 3, side, side), masks (B, D, side, side). The
    first click, on the largest slice, is given to all slices of its volume, later ones to the slice
    in which they are; overlap is counted over whole volumes, and adapters are told the depth.
    """

    def __init__(self, rounds: int = 2, seed: int = 0) -> None:
        if rounds < 1:
            raise DataError(f"rounds is {rounds!r}, expected a whole number of at least 1")
        self.rounds = rounds
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, model: Any, batch: Any) -> Tensor:
        pixels, masks = batch
        side, _ = sides(model)
        rows = tuple(pixels.shape[:-3])
        if (
            len(rows) not in (1, 2)
            or pixels.shape[-3:] != (3, side, side)
            or masks.shape != (*rows, side, side)
        ):
            raise DataError(
                f"pixels are {tuple(pixels.shape)} and masks {tuple(masks.shape)}, expected "
                f"(B, 3, {side}, {side}) and (B, {side}, {side}), of stacks (B, D, 3, {side}, {side}) "
                f"and (B, D, {side}, {side})",
                "Segmenter.prepare makes pixels; resize masks with the nearest value, and pad alike",
            )
        truth = _binary(masks)
        if len(rows) == 2:
            embeddings = embed(model, pixels.flatten(0, 1), rows[1])
            points, labels = shared_clicks(truth, self.generator)
        else:
            embeddings = embed(model, pixels)
            points, labels = first_clicks(truth, self.generator)
        total = embeddings.new_zeros(())
        for place in range(self.rounds):
            low, _ = decode(model, embeddings, points.to(pixels), labels)
            logits = F.interpolate(low, (side, side), mode="bilinear", align_corners=False)
            total = total + dice_cross_entropy(logits.view(truth.shape), truth)
            if place + 1 < self.rounds:
                answer = logits.detach()[:, 0] > 0
                clicked = click_on_error(answer, truth.view(answer.shape), self.generator)
                points = torch.cat([points, clicked[0]], 1)
                labels = torch.cat([labels, clicked[1]], 1)
        return total / self.rounds
