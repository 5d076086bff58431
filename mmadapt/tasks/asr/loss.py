"""Connectionist temporal classification as `mm.fit` takes it.

Graves et al. 2006, Connectionist Temporal Classification: Labelling Unsegmented Sequence Data with
Recurrent Neural Networks, ICML
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mmadapt.errors import CheckError, DataError

if TYPE_CHECKING:
    from torch import Tensor

_MADE_BY = "Recogniser.batches(clips, texts) makes batches of the right kind"


def frames_needed(labels: Tensor) -> Tensor:
    """The fewest frames that can carry each row of labels (B, U), padded with numbers below 0.

    A frame for every token, and a blank between two that are equal.
    """
    written = labels >= 0
    twice = (labels[:, 1:] == labels[:, :-1]) & written[:, 1:]
    return written.sum(1) + twice.sum(1)


class CTCLoss:
    """−log p(labels) over the number of labels, the mean of a batch's clips.

    A batch holds what the model is called with, `labels` (B, U) padded with −100, and `frames` (B,),
    the valid frames of each clip. A clip with fewer frames than its labels need would make the loss
    infinite: it is left out, counted in `left_out` of `pairs`, and the first one is warned of.
    """

    def __init__(self, blank: int = 0) -> None:
        self.blank = blank
        self.pairs = 0
        self.left_out = 0

    def __call__(self, model: Any, batch: Any) -> Tensor:
        from torch.nn import functional as F

        if not isinstance(batch, Mapping):
            raise DataError(f"the batch is a {type(batch).__name__}, expected a mapping", _MADE_BY)
        for name in ("labels", "frames"):
            if name not in batch:
                raise DataError(
                    f"the batch lacks {name!r}; it holds {', '.join(batch)}",
                    _MADE_BY,
                )
        labels, frames = batch["labels"], batch["frames"]
        inputs = {k: v for k, v in batch.items() if k not in ("labels", "frames")}
        logits = model(**inputs).logits
        if int(frames.max()) > logits.shape[1]:
            raise CheckError(
                f"the batch counts up to {int(frames.max())} frames, and the model gave {logits.shape[1]}",
                "`frames` counts frames, not samples: WaveFeatures.frames(samples)",
            )
        if bool((labels == self.blank).any()) or int(labels.max()) >= logits.shape[2]:
            raise DataError(
                f"labels run from {int(labels[labels >= 0].min())} to {int(labels.max())}; the model "
                f"writes 0 to {logits.shape[2] - 1}, of which {self.blank} is the blank",
                "take the model's own vocabulary",
            )
        needed = frames_needed(labels)
        fits = frames >= needed
        self._count(frames, needed, fits)
        if not bool(fits.any()):
            return logits.sum() * 0
        kept = labels[fits]
        loss = F.ctc_loss(
            logits[fits].float().log_softmax(-1).transpose(0, 1),
            kept.clamp(min=0),
            frames[fits],
            (kept >= 0).sum(1),
            blank=self.blank,
            reduction="mean",
        )
        return loss

    def _count(self, frames: Tensor, needed: Tensor, fits: Tensor) -> None:
        self.pairs += len(fits)
        bad = (~fits).nonzero()[:, 0].tolist()
        if bad and not self.left_out:
            warnings.warn(
                f"row {bad[0]} of a batch has {int(frames[bad[0]])} frames and labels that need "
                f"{int(needed[bad[0]])}: it is left out, as all such rows are; CTCLoss.left_out counts them",
                stacklevel=3,
            )
        self.left_out += len(bad)
