"""Image embeddings: computed once, cached, replayed through adapters that sit behind them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmadapt.core.attach import disabled
from mmadapt.core.backbone import Backbone, unwrap
from mmadapt.core.bank import bank_of
from mmadapt.core.dispatch import OutHook
from mmadapt.errors import DataError
from mmadapt.methods.pooled import TipAdapterLayer
from mmadapt.ops.reference import cache_votes
from mmadapt.tasks.few_shot.classifier import as_backbone
from mmadapt.tasks.few_shot.score import score
from mmadapt.train.cache import cached, data_digest, require_frozen, weights_digest

if TYPE_CHECKING:
    from mmadapt.core.attachment import Attachment

POOLED = "vision.pooled"


def pixels(m: Backbone, images: Any) -> Tensor:
    """Preprocessed images (N, 3, S, S) on the model's device."""
    backbone = as_backbone(m)
    assert backbone.preprocess is not None
    return backbone.preprocess(images).to(next(backbone.model.parameters()).device)


def embed_pixels(m: Backbone, batch: Tensor) -> Tensor:
    """Image embeddings (B, D) with whatever is active, not normalised."""
    model, anatomy, _ = unwrap(m)
    return anatomy.encode["image"](model, batch)


@torch.no_grad()
def embed(m: Backbone, images: Any, batch_size: int = 256) -> Tensor:
    """Image embeddings (N, D) with whatever is active, not normalised; nothing is cached."""
    model, _, _ = unwrap(as_backbone(m))
    was_training = model.training
    model.eval()
    try:
        parts = [
            embed_pixels(m, pixels(m, images[start : start + batch_size]))
            for start in range(0, len(images), batch_size)
        ]
    finally:
        model.train(was_training)
    if not parts:
        raise DataError("no image was given")
    return torch.cat(parts)


def features(m: Backbone, images: Any, folder: Path | None = None) -> Tensor:
    """The frozen backbone's image embeddings (N, D), not normalised, kept on disk.

    The file's name is a digest of weights, preprocessing and images. Adapters at `vision.pooled`
    see these embeddings and may be active; raises `AttachError` when one is active before that, or
    when a backbone tensor trains, since the cache would go stale at once.
    """
    backbone = as_backbone(m)
    require_frozen(backbone, "vision", POOLED)
    model, _, _ = unwrap(backbone)
    parts = ("pooled-1", weights_digest(model), repr(backbone.preprocess), data_digest(images))
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def make() -> Tensor:
        if bank_of(model) is None:
            return embed(backbone, images).cpu()
        with disabled(backbone):
            return embed(backbone, images).cpu()

    return cached(key, make, folder).to(next(model.parameters()).device)


def adapted(m: Backbone, frozen: Tensor) -> Tensor:
    """Frozen embeddings (N, D) after the active adapters at `vision.pooled`; differentiable."""
    model, _, _ = unwrap(m)
    bank = bank_of(model)
    hook = bank.hooks.get(f"{POOLED}:out") if bank is not None else None
    return hook.replay(frozen, frozen) if isinstance(hook, OutHook) else frozen


@torch.no_grad()
def remember(attachment: Attachment, frozen: Tensor, labels: Tensor) -> None:
    """Fill a `TipAdapter`'s cache with the embeddings (N, D) and labels (N,) of the shots.

    Keys are unit length. N may be at most the adapter's `entries`; slots left over stay empty.
    """
    layers = _caches(attachment)
    count = len(labels)
    if frozen.ndim != 2 or len(frozen) != count or count == 0:
        raise DataError(
            f"embeddings {tuple(frozen.shape)} and {count} labels, expected (N, D) and N"
        )
    length = frozen.float().norm(dim=-1)
    if not bool(torch.isfinite(length).all()) or float(length.min()) == 0.0:
        raise DataError("embeddings hold NaN, infinity or a zero vector; a cosine has no meaning")
    for layer in layers:
        keys, slots = layer.keys, layer.labels
        if count > len(slots) or frozen.shape[1] != keys.shape[1]:
            raise DataError(
                f"{count} embeddings of {frozen.shape[1]} numbers do not fit a cache of {len(slots)} "
                f"entries of {keys.shape[1]}",
                f"attach mmadapt.TipAdapter(entries={count})",
            )
        if int(labels.min()) < 0 or int(labels.max()) >= layer.classes:
            raise DataError(
                f"labels run from {int(labels.min())} to {int(labels.max())}, the classifier has "
                f"{layer.classes} classes"
            )
        slots.fill_(-1)
        keys.zero_()
        slots[:count] = labels.to(slots)
        keys[:count] = torch.nn.functional.normalize(frozen.to(keys), dim=-1)


@torch.no_grad()
def search(
    classifier: Any,
    attachment: Attachment,
    frozen: Tensor,
    labels: Tensor,
    residuals: Sequence[float] = (0.0, *(10 ** (step / 8 - 1) for step in range(25))),
    sharpnesses: Sequence[float] = tuple(10 ** (step / 10 - 0.5) for step in range(21)),
) -> tuple[float, float, float]:
    """Choose a `TipAdapter`'s residual (α) and sharpness (β) on validation embeddings; sets both.

    Returns (residual, sharpness, validation accuracy). By default residuals run from 0.1 to 100 with
    0, which is zero-shot, and sharpnesses from 0.3 to 32; among equals the first wins. Give it held-out images: never the test
    set, and never the shots in the cache, each of which is its own nearest key.
    """
    layer, slots = _caches(attachment)[0], _caches(attachment)[0].labels
    _refuse_cached(layer.keys[slots >= 0], frozen)
    with disabled(classifier):
        base = classifier(frozen)
    best = (-1.0, 0.0, 1.0)
    for sharpness in sharpnesses:
        votes = cache_votes(frozen, layer.keys, slots, layer.classes, sharpness)
        for residual in residuals:
            accuracy = score(base + residual * votes, labels).accuracy
            if accuracy > best[0]:
                best = (accuracy, residual, sharpness)
    accuracy, residual, sharpness = best
    layer.residual.fill_(residual)
    layer.sharpness.fill_(sharpness)
    return residual, sharpness, accuracy


def _caches(attachment: Attachment) -> list[TipAdapterLayer]:
    layers = [layer for layer in attachment.layers.values() if isinstance(layer, TipAdapterLayer)]
    if not layers:
        raise DataError(
            f"attachment {attachment.name!r} has no cache",
            "attach mmadapt.TipAdapter(entries=…) to a ZeroShotClassifier",
        )
    return layers


def _refuse_cached(keys: Tensor, frozen: Tensor) -> None:
    unit = torch.nn.functional.normalize(frozen.to(keys.dtype), dim=-1)
    if len(keys) and float((unit @ keys.T).amax(dim=1).min()) > 1 - 1e-6:
        raise DataError(
            "every validation image is in the cache already, so a search would prefer the sharpest",
            "draw validation images that are not among the shots: few_shot.sample does",
        )
