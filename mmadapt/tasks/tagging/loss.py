"""What is minimised when tags are learned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mmadapt.errors import DataError
from mmadapt.tasks.audio.augment import SpecAugment
from mmadapt.tasks.audio.batch import Batch


class TaggingLoss:
    """A loss for `mm.fit` over what `tagging.tensors` gives: one class a clip, or several tags.

    Labels (B,) of whole numbers are learned by cross-entropy, labels (B, K) of yes and no by binary
    cross-entropy, the mean over clips and classes. `augment` masks spectrograms anew in every step, from
    a generator of `seed`; `weight` (K,) counts classes unequally.
    """

    def __init__(
        self, augment: SpecAugment | None = None, weight: Tensor | None = None, seed: int = 0
    ) -> None:
        self.augment = augment
        self.weight = weight
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        if "labels" not in batch:
            raise DataError(
                f"the batch has no labels, but {', '.join(map(str, batch)) or 'nothing'}",
                "tagging.tensors(m, data) makes batches of a Tagged",
            )
        inputs = {key: part for key, part in batch.items() if key not in ("labels", "lengths")}
        if self.augment is not None:
            inputs = self.augment(Batch(inputs, batch["lengths"]), self.generator).inputs
        return self.of(logits_of(model(**inputs)), batch["labels"])

    def of(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of logits (B, K)."""
        several = labels.ndim == 2
        if logits.ndim != 2 or labels.shape != (logits.shape if several else logits.shape[:1]):
            raise DataError(
                f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)}, expected (B, K), and "
                "(B,) or (B, K)",
                "a Head of as many classes: mm.attach(m, mm.Head(names=data.names))",
            )
        weight = None if self.weight is None else self.weight.to(logits)
        if several:
            return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), weight)
        if int(labels.max()) >= logits.shape[1]:
            raise DataError(
                f"a label is {int(labels.max())}, and the model has {logits.shape[1]} logits",
                "a Head of as many classes: mm.attach(m, mm.Head(names=data.names))",
            )
        return F.cross_entropy(logits, labels, weight)


def logits_of(output: Any) -> Tensor:
    """The logits in a model's output, or the output itself where it is a tensor."""
    found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if found is None:
        raise DataError(
            f"the model returned a {type(output).__name__} without logits",
            "take the class with a classifier, or tagging.PooledEncoder(model) with a Head",
        )
    return found
