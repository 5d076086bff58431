"""What adapting a SAM gains on stacks of slices or single images, and what it costs the old task."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmadapt.adapter import Adapter, Bottleneck, ConvDepth, Convpass, LoRA, MedSA, Unlock
from mmadapt.core.attach import attach, disabled
from mmadapt.core.attachment import Attachment
from mmadapt.core.backbone import Backbone, unwrap_model
from mmadapt.errors import MissingDependencyError
from mmadapt.tasks.segment.clicks import boxes_around, first_clicks
from mmadapt.tasks.segment.loss import PromptedLoss
from mmadapt.tasks.segment.metrics import dice, hausdorff
from mmadapt.tasks.segment.model import decoder_sites
from mmadapt.tasks.segment.organs import SPACING, fixed_ellipsoid
from mmadapt.tasks.segment.scenes import scenes
from mmadapt.tasks.segment.segmenter import Segmenter
from mmadapt.train.fit import fit
from mmadapt.train.history import History

ADAPTER_RATE, DECODER_RATE, WHOLE_RATE = 3e-3, 1e-3, 5e-4
_MLPS = Bottleneck(16, at=("vision.layers[*].mlp", "decoder.layers[*].mlp"))
_DECODER_MLPS = Bottleneck(16, at=("decoder.layers[*].mlp",))


@dataclass(frozen=True)
class Method:
    """What is trained, None for the whole model, and the peak learning rate."""

    adapters: tuple[Adapter, ...] | None
    rate: float = ADAPTER_RATE
    at: Callable[[Any], tuple[str, ...]] = lambda m: ()
    #: whether slices see their neighbours
    depth: bool = False


#: the widths of the two controls give as many parameters as ConvDepth has, within 2 %
METHODS: dict[str, Method] = {
    "decoder only": Method((Unlock(),), DECODER_RATE, decoder_sites),
    "LoRA": Method((LoRA(8),)),
    "Bottleneck": Method((_MLPS,)),
    "MedSA, slice by slice": Method((MedSA(),)),
    "MedSA, with depth": Method((MedSA(depth=True),), depth=True),
    "Convpass (control)": Method(
        (Convpass(24, dropout=0.0, at=("vision.layers[*].mlp",)), _DECODER_MLPS)
    ),
    "ConvDepth of one slice (control)": Method((ConvDepth(38, kernel=1), _DECODER_MLPS)),
    "ConvDepth": Method((ConvDepth(32), _DECODER_MLPS), depth=True),
    "full fine-tuning": Method(None, WHOLE_RATE),
}


@dataclass(frozen=True)
class Cases:
    """Stacks, uint8 (N, D, H, W), or images, (N, H, W); masks, bool alike; a click (x, y) for each."""

    slices: np.ndarray
    masks: np.ndarray
    clicks: np.ndarray

    def __len__(self) -> int:
        return len(self.slices)

    @property
    def spacing(self) -> tuple[float, ...]:
        """Of the axes of one case, in mm."""
        return SPACING[-(self.slices.ndim - 1) :]

    @property
    def diagonal(self) -> float:
        """Of one case, in mm: the distance of an object that was not found."""
        shape = self.slices.shape[1:]
        return math.dist(
            [0] * len(shape), [a * b for a, b in zip(shape, self.spacing, strict=True)]
        )


@dataclass
class Result:
    """What one method reached with one seed; overlaps in [0, 1], distances in mm."""

    method: str
    parameters: int
    seed: int = 0
    dice: list[float] = field(default_factory=list)
    #: empty without MONAI
    distances: list[float] = field(default_factory=list)
    seconds: float = 0.0
    #: mean IoU on the scenes it was pretrained on by prompt, with the adaptation on and off
    source_on: dict[str, float] = field(default_factory=dict)
    source_off: dict[str, float] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        return float(np.mean(self.dice))

    @property
    def distance(self) -> float | None:
        return float(np.mean(self.distances)) if self.distances else None

    @property
    def missed(self) -> int:
        """Cases in which nothing of the object was found."""
        return sum(value == 0 for value in self.dice)


def training_tensors(m: Any, cases: Cases, flips: bool = True) -> tuple[Tensor, Tensor]:
    """Pixels and masks for `PromptedLoss`, each case also mirrored: left to right, top to bottom, both."""
    segmenter = Segmenter(m)
    shape = cases.slices.shape
    flat = cases.slices.reshape(-1, *shape[-2:])
    pixels = torch.stack([segmenter.prepare(own, grey=True) for own in flat])
    pixels = pixels.view(*shape[:-2], *pixels.shape[1:])
    masks = torch.from_numpy(cases.masks)
    if not flips:
        return pixels, masks
    ways = [(), (-1,), (-2,), (-1, -2)]
    return torch.cat([pixels.flip(way) for way in ways]), torch.cat(
        [masks.flip(way) for way in ways]
    )


def adapt(
    m: Any,
    method: Method,
    data: tuple[Tensor, Tensor],
    *,
    name: str,
    seed: int,
    steps: int,
    batch: int,
) -> tuple[Attachment | None, History, float]:
    """Attach and train, with one click per case; the last is CPU seconds."""
    attachment, started = None, time.process_time()
    if method.adapters is None:
        unwrap_model(m).requires_grad_(True)
    else:
        attachment = attach(m, list(method.adapters), name=name, at=method.at(m) or None, seed=seed)
    history = fit(
        m,
        data,
        loss=PromptedLoss(rounds=1, seed=seed),
        steps=steps,
        batch_size=batch,
        lr=method.rate,
        seed=seed,
        progress=False,
    )
    return attachment, history, time.process_time() - started


def predictions(m: Any, cases: Cases) -> list[np.ndarray]:
    """Masks of every case, each asked for with its click, bool (D, H, W) or (H, W)."""
    segmenter, found = Segmenter(m), []
    for own, click in zip(cases.slices, cases.clicks, strict=True):
        encoded = (segmenter.encode_stack if own.ndim == 3 else segmenter.encode)(own, grey=True)
        found.append(segmenter.predict(encoded, points=[click], labels=[1]).best.numpy())
    return found


def score(found: list[np.ndarray], cases: Cases) -> tuple[list[float], list[float]]:
    """Dice and HD95 of every case; no distances without MONAI."""
    pairs = list(zip(found, cases.masks, strict=True))
    overlaps = [dice(*pair) for pair in pairs]
    try:
        far = cases.diagonal
        return overlaps, [hausdorff(*pair, spacing=cases.spacing, far=far) for pair in pairs]
    except MissingDependencyError:
        return overlaps, []


def source_overlap(m: Any, count: int = 128, seed: int = 7_000_000) -> dict[str, float]:
    """Mean IoU on new scenes such as `tiny/sam` was trained on, asked for by a box and by a click."""
    segmenter, generator = Segmenter(m), torch.Generator().manual_seed(seed)
    found: dict[str, list[float]] = {"box": [], "point": []}
    for image, masks in zip(*scenes(count, seed=seed), strict=True):
        truth = torch.from_numpy(masks[masks.any((1, 2))])
        if not len(truth):
            continue
        encoded = segmenter.encode(image)
        boxes, (points, _) = boxes_around(truth, generator), first_clicks(truth, generator)
        for mask, box, point in zip(truth, boxes.tolist(), points, strict=True):
            for name, prompt in (
                ("box", {"box": box}),
                ("point", {"points": point, "labels": [1]}),
            ):
                answer = segmenter.predict(encoded, **prompt).best
                found[name].append(float((answer & mask).sum() / (answer | mask).sum()))
    return {name: float(np.mean(values)) for name, values in found.items()}


def finish(
    m: Any, name: str, history: History, seconds: float, seed: int, test: Cases, scenes: int = 128
) -> Result:
    """Measure an adapted model on new cases and on the scenes it knows, with the adaptation on and off."""
    result = Result(
        name, history.parameters or 0, seed, *score(predictions(m, test), test), seconds
    )
    result.source_on = source_overlap(m, scenes)
    if METHODS[name].adapters is not None:
        with disabled(m):
            result.source_off = source_overlap(m, scenes)
    return result


def run_frozen(m: Backbone, test: Cases, *, scenes: int = 128) -> Result:
    """The backbone as it is."""
    result = Result("frozen", 0, 0, *score(predictions(m, test), test))
    result.source_on = result.source_off = source_overlap(m, scenes)
    return result


def run_ellipsoid(train: Cases, test: Cases) -> Result:
    """One ellipsoid, or disc, around every click, of the size that is best on the training cases."""

    def guesses(cases: Cases, size: tuple[float, float]) -> list[np.ndarray]:
        return [fixed_ellipsoid(click, cases.slices.shape[1:], *size) for click in cases.clicks]

    flat = train.slices.ndim == 3
    sizes = itertools.product(np.arange(6, 21, 1.0), [1.0] if flat else np.arange(2, 7.5, 0.5))
    best = max(sizes, key=lambda size: np.mean(score_dice(guesses(train, size), train)))
    return Result("best fixed ellipsoid", 1 if flat else 2, 0, *score(guesses(test, best), test))


def score_dice(found: list[np.ndarray], cases: Cases) -> list[float]:
    """Dice alone, which is quick."""
    return [dice(*pair) for pair in zip(found, cases.masks, strict=True)]
