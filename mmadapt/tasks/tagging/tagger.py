"""From clips of any length to probabilities of their tags."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmadapt.adapter import Head
from mmadapt.core.attach import active, attachments
from mmadapt.core.backbone import Backbone, unwrap_model
from mmadapt.core.bank import bank_of
from mmadapt.errors import DataError
from mmadapt.tasks.audio.batch import alike
from mmadapt.tasks.audio.clip import Audio
from mmadapt.tasks.audio.spectrum import SpectrumFeatures
from mmadapt.tasks.audio.wave import WaveFeatures
from mmadapt.tasks.audio.windows import over_windows
from mmadapt.tasks.tagging.data import Tagged
from mmadapt.tasks.tagging.loss import logits_of
from mmadapt.tasks.tagging.tags import Tags
from mmadapt.train.flags import eval_mode

Features = SpectrumFeatures | WaveFeatures
#: seconds of one window, for encoders that take waves of any length
WINDOW = 10.0


def features_for(m: Any) -> Features:
    """What turns clips into inputs of this model: a backbone's own, else those its config asks for."""
    own = m.preprocess if isinstance(m, Backbone) else None
    if isinstance(own, (SpectrumFeatures, WaveFeatures)):
        return own
    config = getattr(unwrap_model(m), "config", None)
    if hasattr(config, "conv_kernel"):
        return WaveFeatures.for_model(unwrap_model(m))
    if getattr(config, "model_type", "") == "audio-spectrogram-transformer":
        return SpectrumFeatures.for_model(m)
    raise DataError(
        f"{type(unwrap_model(m)).__name__} takes neither spectrograms nor waves that are known here",
        "pass features=, an audio.SpectrumFeatures or audio.WaveFeatures",
    )


def tensors(m: Any, data: Tagged, features: Features | None = None) -> dict[str, Tensor]:
    """All clips as one dictionary of tensors, for `mm.fit` and `TaggingLoss`: inputs, lengths, labels."""
    batch = (features or features_for(m)).batch(data.clips)
    labels = torch.from_numpy(data.labels)
    return {**batch.inputs, "lengths": batch.lengths, "labels": labels}


class Tagger:
    """A model that says what is in a clip; adapters that are active take part.

    `names` are the classes of the model's logits: by default those of a `Head` that is active, else
    the config's. `several`: whether a clip may have several tags, so that every class has a
    probability of its own; else they sum to one. Clips that are longer than `seconds`, what the model
    takes, are heard in windows every `hop` seconds, half of them by default, and windows averaged.

        tagger = tagging.Tagger(mm.load("tiny/ast"))
        tagger.tag(clip)
    """

    def __init__(
        self,
        m: Any,
        names: Sequence[str] | None = None,
        several: bool = False,
        features: Features | None = None,
        seconds: float | None = None,
        hop: float | None = None,
        batch_size: int = 64,
    ) -> None:
        self.model = unwrap_model(m)
        self.features = features or features_for(m)
        self.names = tuple(names) if names is not None else names_of(self.model)
        self.several = several
        self.seconds = seconds or getattr(self.features, "seconds", WINDOW)
        self.hop = hop or self.seconds / 2
        self.batch_size = batch_size

    def probabilities(self, clips: Sequence[Audio]) -> Tensor:
        """Of every clip and class, float32 (N, K), on the CPU."""
        if isinstance(clips, Audio):
            clips = [clips]
        if not len(clips):
            raise DataError("there are no clips")
        short = [place for place, clip in enumerate(clips) if not self._long(clip)]
        found: dict[int, Tensor] = {}
        # padding would be heard
        equal = isinstance(self.features, WaveFeatures) and not self.features.masked
        with eval_mode(self.model):
            for part in alike(clips, self.batch_size, equal, short):
                found.update(zip(part, self._once([clips[i] for i in part]), strict=True))
            for place, clip in enumerate(clips):
                if place not in found:
                    found[place] = self._windows(clip)[0]
        return torch.stack([found[place] for place in range(len(clips))])

    def tag(self, clip: Audio) -> Tags:
        """What is in one clip, and where in it, as a value that can be heard and seen."""
        with eval_mode(self.model):
            whole, starts, each = self._windows(clip)
        length = min(self.seconds, clip.seconds)
        return Tags(clip, self.names, whole.numpy(), tuple(starts), length, each.numpy())

    def _long(self, clip: Audio) -> bool:
        """Whether it holds more than one window; a fraction of a frame more does not count."""
        return len(clip) - round(self.seconds * clip.rate) >= clip.rate // 100

    def _windows(self, clip: Audio) -> tuple[Tensor, list[float], Tensor]:
        if not self._long(clip):
            alone = self._once([clip])
            return alone[0], [0.0], alone
        return over_windows(clip, self._once, self.seconds, self.hop, self.batch_size)

    def _once(self, clips: list[Audio]) -> Tensor:
        """Probabilities of clips that fit, each in one piece."""
        device = next(self.model.parameters()).device
        inputs = {key: part.to(device) for key, part in self.features.batch(clips).inputs.items()}
        logits = logits_of(self.model(**inputs)).float().cpu()
        if logits.shape[-1] != len(self.names):
            raise DataError(
                f"the model gives {tuple(logits.shape)}, and there are {len(self.names)} names",
                "names= one a class, in the order of the logits",
            )
        return logits.sigmoid() if self.several else logits.softmax(-1)

    def __repr__(self) -> str:
        kind = "tags" if self.several else "classes"
        return (
            f"Tagger({type(self.model).__name__}, {len(self.names)} {kind}, windows of "
            f"{self.seconds:.2f} s every {self.hop:.2f} s)"
        )


def names_of(model: Any) -> tuple[str, ...]:
    """The classes of a model's logits: those of an active `Head`, else those in its config."""
    bank = bank_of(model)
    if bank is not None and bank.acting:
        for name in active(model).names:
            found = attachments(model)[name].adapter
            for one in found if isinstance(found, tuple) else (found,):
                if isinstance(one, Head):
                    return tuple(one.names or map(str, range(one.classes or 0)))
    named = getattr(getattr(model, "config", None), "id2label", None) or {}
    if not named or not hasattr(model, "classifier"):
        raise DataError(
            f"{type(model).__name__} names no classes", "names= one a class, or a Head with names"
        )
    return tuple(named[place] for place in sorted(named))
