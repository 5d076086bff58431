"""The parts of a SAM for volumes: a window is encoded once and clicked many times.

Gong et al. 2023, 3DSAM-adapter, arXiv:2306.13465
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

from mmadapt.adapter import ThreeDSAM
from mmadapt.core.backbone import unwrap
from mmadapt.core.bank import bank_of
from mmadapt.errors import BackboneError, DataError
from mmadapt.tasks.segment.inputs import acting, acting_state, input_of
from mmadapt.tasks.segment.segmenter import DEVIATION, MEAN

#: encoded windows that are kept for the next click
KEPT = 8


def three_d_sam_of(m: Any) -> ThreeDSAM:
    """The `ThreeDSAM` that acts in a model, or a `BackboneError`."""
    model, _, _ = unwrap(m)
    bank = bank_of(model)
    for name in acting(model):
        for adapter in bank.records[name].adapters:  # type: ignore[union-attr]
            if isinstance(adapter, ThreeDSAM):
                return adapter
    raise BackboneError(
        f"no ThreeDSAM acts in this {type(model).__name__}, so that it takes no volumes",
        "mmadapt.attach(sam, mmadapt.ThreeDSAM(…)); a SAM of slices goes to SliceSegmenter",
    )


def normalised(m: Any, values: Tensor) -> Tensor:
    """Values from 0 to 1 with the mean and deviation SAM was trained with, of grey."""
    if not torch.compiler.is_compiling():
        low, high = float(values.min()), float(values.max())
        if not (low >= 0 and high <= 1):  # a NaN fails too
            raise DataError(
                f"the volume holds values from {low:g} to {high:g}, expected 0 to 1",
                'bring a range of values there first: volume.window("ct abdomen"), "mr", or two '
                "numbers",
            )
    if input_of(m).normalise == "0-1":
        return values
    return (255 * values - sum(MEAN) / 3) / (sum(DEVIATION) / 3)


def parts_of(m: Any) -> Any:
    """Image encoder, prompt encoder and mask decoder of a SAM."""
    model, anatomy, _ = unwrap(m)
    return anatomy.roles(model)["model"].parts(model)  # type: ignore[misc]


def foreground(logits: Tensor) -> Tensor:
    """Logits (B, 1, D, H, W) of the object, of those (B, 1 or 2, D, H, W) of two classes or one."""
    if logits.shape[1] == 1:
        return logits
    if logits.shape[1] == 2:
        return logits[:, 1:] - logits[:, :1]
    raise DataError(
        f"the model tells {logits.shape[1]} classes apart, and a click means one object",
        "attach ThreeDSAM(classes=2), or one with prompts=False for predict_whole",
    )


class ClickedVolumes:
    """A network for `predict_at`: windows (1, 1, d, h, w) of 0 to 1, clicks and labels to logits.

    Each window is encoded once; the `KEPT` last ones are remembered until other adapters act, or are
    trained.
    """

    def __init__(self, m: Any) -> None:
        self.model, _, _ = unwrap(m)
        if not three_d_sam_of(self.model).prompts:
            raise DataError(
                "this adapter was made without prompts, so that it takes no clicks",
                "VolumeSegmenter.whole() segments all of the volume; or attach one with prompts=True",
            )
        self._kept: OrderedDict[bytes, list[Tensor]] = OrderedDict()
        self._by = acting_state(self.model)

    def parameters(self) -> Any:
        return self.model.parameters()

    @torch.no_grad()
    def __call__(self, window: Tensor, points: Tensor, labels: Tensor) -> Tensor:
        three_d_sam_of(self.model)
        pixels, parts = normalised(self.model, window), parts_of(self.model)
        features = self._encode(window, pixels, parts)
        seen = parts.prompts(features[-1], points, labels, window.shape[2:])
        return foreground(parts.decoder([*features[:-1], seen], pixels))

    def forget(self) -> None:
        """Encode anew what comes."""
        self._kept.clear()

    def _encode(self, window: Tensor, pixels: Tensor, parts: Any) -> list[Tensor]:
        now = acting_state(self.model)
        if now != self._by:
            self._kept.clear()
            self._by = now
        values = window.detach().float().cpu().contiguous().numpy()
        key = hashlib.sha256(values.tobytes() + str(values.shape).encode()).digest()
        if key not in self._kept:
            self._kept[key] = parts.encoder(pixels)
        self._kept.move_to_end(key)
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        return self._kept[key]
