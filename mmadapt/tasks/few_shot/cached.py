"""Tip-Adapter and CLIP-Adapter over embeddings computed once, where another setting costs milliseconds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mmadapt.errors import DataError
from mmadapt.methods.pooled import ClipAdapterLayer
from mmadapt.ops.reference import clip_adapter, votes

if TYPE_CHECKING:
    from mmadapt.core.attachment import Attachment
    from mmadapt.tasks.few_shot.classifier import ZeroShotClassifier


class CachedShots:
    """Logits of test embeddings (M, D) for any number of shots out of embeddings (N, D), any α, β, ratio.

    The embeddings are the frozen backbone's, as `features` gives them; labels count the classifier's
    classes. Which images are the first k shots of a class is drawn by `seed`, once, so that four shots
    hold the first two. `adapter` is an attachment of `mm.ClipAdapter`, trained or not, whose ratio can
    be changed. What is kept and returned is on the CPU. Raises `DataError` for what does not fit.
    """

    def __init__(
        self,
        classifier: ZeroShotClassifier,
        features: Tensor,
        labels: Any,
        test_features: Tensor,
        test_labels: Any,
        adapter: Attachment | None = None,
        seed: int = 0,
    ) -> None:
        self.names, self._head = classifier.names, classifier.head
        width = self._head.weight.shape[1]
        self._keys, owners = _checked("shots", features, labels, width, len(self.names))
        self._test, self.truth = _checked(
            "test", test_features, test_labels, width, len(self.names)
        )
        counts = owners.bincount(minlength=len(self.names))
        if int(counts.min()) == 0:
            missing = [self.names[k] for k in (counts == 0).nonzero().flatten().tolist()]
            raise DataError(
                f"there is no shot of {', '.join(missing[:6])}", "give one of every class"
            )
        #: shots that every class has
        self.most = int(counts.min())
        draw = torch.randperm(len(owners), generator=torch.Generator().manual_seed(seed))
        turn = torch.empty_like(owners)
        for label in range(len(self.names)):
            own = draw[owners[draw] == label]
            turn[own] = torch.arange(len(own))
        kept = (turn < self.most).nonzero().flatten()
        self._labels, self._turn = owners[kept], turn[kept]
        self._cosines = F.normalize(self._test, dim=-1) @ F.normalize(self._keys[kept], dim=-1).T
        self._change = None if adapter is None else _change(adapter, self._test)
        #: logits of the class names alone
        self.zero_shot = self._base(0.0)

    @property
    def has_ratio(self) -> bool:
        """Whether there is a CLIP-Adapter whose ratio can be changed."""
        return self._change is not None

    @torch.no_grad()
    def logits(self, shots: int, residual: float, sharpness: float, ratio: float = 0.0) -> Tensor:
        """Logits (M, K): those of the (adapted) embeddings, plus `residual` times what the shots vote.

        No `shots`, or a `residual` of 0, is the class names alone; a `ratio` of 0 leaves CLIP-Adapter out.
        """
        if not 0 <= shots <= self.most or isinstance(shots, bool):
            raise DataError(f"shots is {shots!r}, expected 0 to {self.most}, which every class has")
        if ratio and not self.has_ratio:
            raise DataError("there is no CLIP-Adapter to mix in", "pass adapter=attachment")
        base = self._base(ratio) if ratio else self.zero_shot
        if not shots or not residual:
            return base
        chosen = self._turn < shots
        voted = votes(self._cosines[:, chosen], self._labels[chosen], len(self.names), sharpness)
        return base + residual * voted

    @torch.no_grad()
    def _base(self, ratio: float) -> Tensor:
        mixed = self._test if self._change is None else self._test + ratio * self._change
        return self._head(mixed.to(self._head.weight.device)).float().cpu()


def _checked(
    word: str, features: Any, labels: Any, width: int, classes: int
) -> tuple[Tensor, Tensor]:
    owners = torch.as_tensor(labels).long().cpu()
    if not isinstance(features, Tensor) or features.ndim != 2 or features.shape[1] != width:
        shape = tuple(getattr(features, "shape", ())) or type(features).__name__
        raise DataError(
            f"{word} features are {shape}, expected a tensor (N, {width})",
            "few_shot.features(backbone, images) gives them",
        )
    if owners.shape != (len(features),) or not len(features):
        raise DataError(f"{word} labels are {tuple(owners.shape)} for {len(features)} embeddings")
    if int(owners.min()) < 0 or int(owners.max()) >= classes:
        raise DataError(
            f"{word} labels run from {int(owners.min())} to {int(owners.max())}, the classifier has "
            f"{classes} classes"
        )
    values = features.detach().float().cpu()
    if not bool(torch.isfinite(values).all()):
        raise DataError(f"{word} features hold values that are not finite")
    return values, owners


@torch.no_grad()
def _change(adapter: Attachment, features: Tensor) -> Tensor:
    """What CLIP-Adapter adds to embeddings at a ratio of 1."""
    layers = [layer for layer in adapter.layers.values() if isinstance(layer, ClipAdapterLayer)]
    if len(layers) != 1:
        raise DataError(
            f"attachment {adapter.name!r} holds {len(layers)} CLIP-Adapters, expected one",
            "mm.attach(backbone, mm.ClipAdapter()) makes one",
        )
    first, second = layers[0].first.float().cpu(), layers[0].second.float().cpu()
    return clip_adapter(features, first, second, 1.0)
