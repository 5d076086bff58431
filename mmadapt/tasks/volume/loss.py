"""Training SAMs for volumes with simulated clicks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mmadapt.errors import DataError
from mmadapt.tasks.segment.loss import dice_cross_entropy
from mmadapt.tasks.volume.clicked import foreground, normalised, parts_of, three_d_sam_of


class VolumeLoss:
    """A loss for `mmadapt.fit` on a SAM with `ThreeDSAM`: Dice plus cross-entropy, over `rounds`.

    A batch is (values, masks): values (B, 1, D, H, W) from 0 to 1, as `Volume.window` gives, masks
    (B, D, H, W) of 0 and 1. On every object `clicks` voxels are drawn, `beside` it as many others, by a
    private generator of `seed`; the authors had 10, and 20 anywhere. Further rounds add a click where
    the answer is wrong; the volume is encoded once for all. A volume without the object gets its
    clicks anywhere, labelled 0. Without prompts the volume alone is given, and masks may hold the
    numbers of several classes: their cross-entropy and the mean of their soft Dice.

        mm.attach(sam, mm.ThreeDSAM(zoom=2))
        mm.fit(sam, (values, masks), loss=volume.VolumeLoss(), batch_size=1)
    """

    def __init__(self, clicks: int = 1, beside: int = 0, rounds: int = 1, seed: int = 0) -> None:
        for name, value, least in (
            ("clicks", clicks, 1),
            ("beside", beside, 0),
            ("rounds", rounds, 1),
        ):
            if type(value) is not int or value < least:
                raise DataError(f"{name} is {value!r}, expected a whole number of at least {least}")
        self.clicks, self.beside, self.rounds = clicks, beside, rounds
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, model: Any, batch: Any) -> Tensor:
        values, masks = batch
        if values.ndim != 5 or values.shape[1] != 1 or masks.shape != values[:, 0].shape:
            raise DataError(
                f"values are {tuple(values.shape)} and masks {tuple(masks.shape)}, expected "
                "(B, 1, D, H, W) and (B, D, H, W)",
                "values[:, None] adds the channel; cut or resample all volumes to one size",
            )
        adapter, pixels = three_d_sam_of(model), normalised(model, values)
        if not adapter.prompts:
            return class_loss(model(pixels), masks)
        parts = parts_of(model)
        features = parts.encoder(pixels)
        truth = masks.bool() if masks.dtype == torch.bool else masks
        points, labels = self._first(truth == 1)
        total = values.new_zeros(())
        for place in range(self.rounds):
            seen = parts.prompts(features[-1], points.to(pixels), labels, values.shape[2:])
            logits = foreground(parts.decoder([*features[:-1], seen], pixels))[:, 0]
            total = total + dice_cross_entropy(logits, truth)
            if place + 1 < self.rounds:
                wrong = (logits.detach() > 0) != (truth == 1)
                more = [self._draw(own, 1) for own in wrong]
                kinds = [self._kind(at, own == 1, bad) for at, own, bad in zip(more, truth, wrong, strict=True)]  # fmt: skip
                points = torch.cat([points, torch.stack(more)], 1)
                labels = torch.cat([labels, torch.stack(kinds)], 1)
        return total / self.rounds

    def _first(self, truth: Tensor) -> tuple[Tensor, Tensor]:
        """Points (B, N, 3) as (z, y, x) and labels (B, N)."""
        points, labels = [], []
        for own in truth:
            on = bool(own.any())
            at = [self._draw(own if on else ~own, self.clicks)]
            if self.beside:
                at.append(self._draw(~own if not own.all() else own, self.beside))
            found = torch.cat(at)
            points.append(found)
            labels.append(own[tuple(found.long().T)].long())
        return torch.stack(points), torch.stack(labels)

    def _draw(self, where: Tensor, count: int) -> Tensor:
        """Voxels (count, 3) of a mask, of the whole volume where it is empty."""
        voxels = where.nonzero() if bool(where.any()) else torch.ones_like(where).nonzero()
        chosen = torch.randint(len(voxels), (count,), generator=self.generator)
        return voxels[chosen.to(voxels.device)].float()

    def _kind(self, at: Tensor, own: Tensor, wrong: Tensor) -> Tensor:
        """The label of a click on an error, −1 where there is none."""
        if not bool(wrong.any()):
            return torch.full((1,), -1, device=own.device)
        return own[tuple(at.long().T)].long()


def class_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Cross-entropy plus mean soft Dice of all classes but the first; logits (B, K, D, H, W).

    Masks (B, D, H, W) of 0 and 1, or of whole numbers below K; a single channel means one object.
    """
    classes = logits.shape[1]
    if classes <= 2:
        return dice_cross_entropy(foreground(logits)[:, 0], masks)
    if masks.is_floating_point() or int(masks.max()) >= classes or int(masks.min()) < 0:
        raise DataError(
            f"masks are {masks.dtype} from {float(masks.min()):g} to {float(masks.max()):g}, expected "
            f"whole numbers from 0 to {classes - 1}",
            f"ThreeDSAM(classes={int(masks.max()) + 1}) tells so many apart",
        )
    true = F.one_hot(masks.long(), classes).movedim(-1, 1)[:, 1:].to(logits.dtype).flatten(2)
    p = logits.softmax(1)[:, 1:].flatten(2)
    overlap, sizes = (p * true).sum(2), (p * p).sum(2) + (true * true).sum(2)
    soft_dice = 1 - (2 * overlap + 1e-5) / (sizes + 1e-5)
    return soft_dice.mean() + F.cross_entropy(logits, masks.long())
