"""What a spectrogram transformer takes: a log-mel filter bank, exactly as AST was trained with.

Kaldi's filter bank of 25 ms every 10 ms with a Hann window, padded with zeros to a fixed number of
frames, then (x − mean) / (2·std). So padding is not silence: with the published statistics padding
is +0.467 and digital silence −1.278. AST attends to padding; take `frames` near the clips' own
length (and `fit_positions`), or let `masked` batches tell the encoder which patches are padding.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmadapt.core.backbone import unwrap_model
from mmadapt.errors import DataError, MissingDependencyError
from mmadapt.tasks.audio.batch import Batch, check_clip, check_clips
from mmadapt.tasks.audio.clip import Audio

if TYPE_CHECKING:
    from torch import Tensor

WINDOW, HOP = 25.0, 10.0  # milliseconds


@dataclass(frozen=True)
class SpectrumFeatures:
    """How clips become spectrograms (frames, bins), and spectrograms the inputs of AST.

    `mean` and `std` are AudioSet's; `fitted` takes those of other recordings. With `masked` a batch
    holds an `attention_mask` (B, tokens), by which the encoder and adapters keep off patches that
    begin in padding, as AST was not trained; without it, as it was. Called with clips it gives `batch`.
    """

    frames: int = 1024
    bins: int = 128
    mean: float = -4.2677393
    std: float = 4.5689974
    rate: int = 16_000
    patch: int = 16
    strides: tuple[int, int] = (10, 10)
    masked: bool = False

    @classmethod
    def for_model(cls, m: Any, **changes: Any) -> SpectrumFeatures:
        """Those that an AST of transformers takes, by its config, or a `Backbone` by its `preprocess`.

        A config tells neither the rate nor the statistics; a published AST's are the defaults here.
        """
        own = getattr(m, "preprocess", None)
        if isinstance(own, cls):
            return dataclasses.replace(own, **changes)
        model = unwrap_model(m)
        config: Any = model.config
        if config.model_type != "audio-spectrogram-transformer":
            raise DataError(
                f"{type(model).__name__} takes no spectrograms of this kind",
                "WaveFeatures.for_model(model) is for encoders of raw waves",
            )
        return cls(
            config.max_length,
            config.num_mel_bins,
            patch=config.patch_size,
            strides=(config.frequency_stride, config.time_stride),
            **changes,
        )

    @classmethod
    def from_folder(cls, folder: Path) -> SpectrumFeatures:
        """Those of an AST saved by transformers: its config, and its feature extractor's where there is one."""
        model = json.loads((folder / "config.json").read_text())
        path = folder / "preprocessor_config.json"
        own = json.loads(path.read_text()) if path.is_file() else {}
        named = {"mean": "mean", "std": "std", "sampling_rate": "rate"}
        return cls(
            model["max_length"],
            model["num_mel_bins"],
            patch=model["patch_size"],
            strides=(model["frequency_stride"], model["time_stride"]),
            **{ours: own[theirs] for theirs, ours in named.items() if theirs in own},
        )

    def __call__(self, clips: Audio | Sequence[Audio]) -> Batch:
        return self.batch(clips)

    @property
    def window(self) -> int:
        """Samples that one frame sees: 25 ms."""
        return int(self.rate * WINDOW * 0.001)

    @property
    def hop(self) -> int:
        """Samples from one frame to the next: 10 ms."""
        return int(self.rate * HOP * 0.001)

    @property
    def seconds(self) -> float:
        """The longest sound that fits."""
        return (self.window + (self.frames - 1) * self.hop) / self.rate

    def spectrum(self, clip: Audio) -> Tensor:
        """The log-mel filter bank (T, bins), neither padded nor normalised.

        T = 1 + ⌊(N − window)/hop⌋, at 16 kHz 1 + ⌊(N − 400)/160⌋.
        """
        import torch

        check_clip(clip, self.rate, self.window)
        return _kaldi().fbank(
            torch.from_numpy(clip.samples)[None],
            htk_compat=True,
            sample_frequency=self.rate,
            use_energy=False,
            window_type="hanning",
            num_mel_bins=self.bins,
            dither=0.0,
            frame_length=WINDOW,
            frame_shift=HOP,
        )

    def batch(self, clips: Audio | Sequence[Audio]) -> Batch:
        """Normalised spectrograms (B, frames, bins) as `input_values`, whatever is beside a clip.

        A clip that is longer than `seconds` is refused, not cut.
        """
        import torch
        from torch.nn import functional as F

        checked = check_clips(clips, self.rate, self.window)
        spectra = [self.spectrum(clip) for clip in checked]
        for place, (clip, one) in enumerate(zip(checked, spectra, strict=True)):
            if len(one) > self.frames:
                raise DataError(
                    f"clip {place} is {clip.seconds:.2f} s long, {len(one)} frames, and the model takes "
                    f"{self.frames}, {self.seconds:.2f} s",
                    f"clip.cut(0, {self.seconds:.2f}) keeps its beginning; over_windows hears all of it",
                )
        whole = torch.stack([F.pad(one, (0, 0, 0, self.frames - len(one))) for one in spectra])
        lengths = torch.tensor([len(one) for one in spectra])
        inputs = {"input_values": (whole - self.mean) / (2 * self.std)}
        if self.masked:
            inputs["attention_mask"] = self.token_mask(lengths)
        return Batch(inputs, lengths)

    def token_mask(self, lengths: Tensor) -> Tensor:
        """Which tokens are no padding, int64 (B, 2 + bands · columns): patches that begin in the clip."""
        import torch

        bands, columns = self.grid
        begins = torch.arange(columns) * self.strides[1]
        heard = (begins < lengths[:, None]).long()
        special = torch.ones(len(lengths), 2, dtype=torch.long)
        return torch.cat([special, heard.repeat(1, bands)], 1)

    @property
    def grid(self) -> tuple[int, int]:
        """Bands of frequency, and columns of patches along time."""
        bands = (self.bins - self.patch) // self.strides[0] + 1
        return bands, (self.frames - self.patch) // self.strides[1] + 1

    def fitted(self, clips: Sequence[Audio]) -> SpectrumFeatures:
        """The same with the mean and deviation of these recordings, padding left out."""
        import torch

        total, squares, count = 0.0, 0.0, 0
        for clip in check_clips(clips, self.rate, self.window):
            values = self.spectrum(clip)[: self.frames].to(torch.float64)
            total, squares = total + float(values.sum()), squares + float(values.square().sum())
            count += values.numel()
        mean = total / count
        deviation = max(squares / count - mean**2, 0.0) ** 0.5
        if deviation < 1e-3:
            raise DataError(
                f"the spectrograms of these {len(clips)} clips are all {mean:.2f}, so they have no "
                "deviation to divide by",
                "digital silence is; leave silent clips out",
            )
        return dataclasses.replace(self, mean=mean, std=deviation)


def _kaldi() -> Any:
    try:
        from torchaudio.compliance import kaldi
    except ImportError as error:
        raise MissingDependencyError(
            "AST's features are computed by torchaudio", "pip install 'mmadapt[audio]'"
        ) from error
    return kaldi
