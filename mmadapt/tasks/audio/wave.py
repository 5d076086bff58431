"""What wav2vec 2.0 and its relatives take: the wave itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mmadapt.errors import DataError
from mmadapt.tasks.audio.batch import Batch, check_clips
from mmadapt.tasks.audio.clip import Audio


@dataclass(frozen=True)
class WaveFeatures:
    """How clips become a batch (B, N) for an encoder of raw waves.

    Every clip is brought to zero mean and unit variance over its own samples (`normalise`), then padded
    with zeros. With `masked`, the large models, an `attention_mask` tells padding. The base models norm
    their front end over time, padding included, and are called without a mask: there clips of
    different lengths are refused, since one would change what becomes of another, unless
    `unequal="pad"`.
    """

    kernels: tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2)
    strides: tuple[int, ...] = (5, 2, 2, 2, 2, 2, 2)
    masked: bool = True
    normalise: bool = True
    unequal: Literal["refuse", "pad"] = "refuse"
    rate: int = 16_000

    @classmethod
    def for_model(cls, model: Any, **changes: Any) -> WaveFeatures:
        """Those that a wav2vec 2.0, HuBERT, UniSpeech, data2vec or WavLM of transformers takes."""
        config = model.config
        if not hasattr(config, "conv_kernel"):
            raise DataError(
                f"{type(model).__name__} takes no raw waves",
                "SpectrumFeatures.for_model(model) is for spectrogram transformers",
            )
        layered = getattr(config, "feat_extract_norm", "layer") == "layer"
        options: dict[str, Any] = {"masked": layered, **_of_log_mel(config), **changes}
        return cls(tuple(config.conv_kernel), tuple(config.conv_stride), **options)

    def frames(self, samples: int) -> int:
        """How many frames the front end makes of so many samples; 0 where there are too few."""
        for kernel, stride in zip(self.kernels, self.strides, strict=True):
            if samples < kernel:
                return 0
            samples = (samples - kernel) // stride + 1
        return samples

    @property
    def least(self) -> int:
        """The fewest samples that make a frame."""
        samples = 1
        for kernel, stride in zip(reversed(self.kernels), reversed(self.strides), strict=True):
            samples = (samples - 1) * stride + kernel
        return samples

    def batch(self, clips: Sequence[Audio]) -> Batch:
        """Waves (B, N) as `input_values`, with the `attention_mask` where the model takes one."""
        import torch

        checked = check_clips(clips, self.rate, self.least)
        lengths = torch.tensor([len(clip) for clip in checked])
        if not self.masked and self.unequal == "refuse" and len(lengths.unique()) > 1:
            raise DataError(
                f"the clips have {int(lengths.min())} to {int(lengths.max())} samples, and this model's "
                "front end norms over padding, so a clip would depend on those beside it",
                'cut them to one length, or batch one by one, or WaveFeatures.for_model(model, unequal="pad")',
            )
        whole = torch.zeros(len(checked), int(lengths.max()))
        for row, clip in zip(whole, checked, strict=True):
            wave = torch.from_numpy(clip.samples)
            if self.normalise:
                wave = (wave - wave.mean()) / (wave.var(correction=0) + 1e-7).sqrt()
            row[: len(wave)] = wave
        inputs = {"input_values": whole}
        if self.masked:
            inputs["attention_mask"] = (torch.arange(whole.shape[1]) < lengths[:, None]).long()
        return Batch(inputs, lengths)


def _of_log_mel(config: Any) -> dict[str, Any]:
    """What differs for a model that hears a log-mel spectrogram: its rate, and the level is its own affair."""
    settings = getattr(config, "log_mel", None)
    return {"rate": settings["rate"], "normalise": False} if settings else {}
