"""wav2vec 2.0 that hears a log-mel spectrogram: the front end of small models, without parameters.

A learned front end takes most of the training of a small model. This one stands in its place in
transformers' `Wav2Vec2ForCTC`, whose class, names and frame counts stay as they are. The configuration
says `log_mel`: {"rate", "low", "floor"}; bins, window and hop are its one `conv_dim`, `conv_kernel` and
`conv_stride`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


class LogMel(nn.Module):
    """Waves (B, N) as log-mel spectra (B, bins, T), T = (N − window) // hop + 1, nothing added at the ends."""

    shape: Tensor
    bank: Tensor

    def __init__(
        self, rate: int, bins: int, window: int, hop: int, low: float, floor: float
    ) -> None:
        super().__init__()
        self.window, self.hop, self.floor = window, hop, floor
        self._requires_grad = False  # which wav2vec 2.0 asks of its front end
        self.register_buffer("shape", torch.hann_window(window), persistent=False)
        self.register_buffer("bank", mel_bank(rate, bins, window, low), persistent=False)

    def forward(self, waves: Tensor) -> Tensor:
        frames = waves.float().unfold(-1, self.window, self.hop)
        power = torch.fft.rfft(frames * self.shape, 2 * self.window).abs().square()
        return (power @ self.bank + self.floor).log().transpose(1, 2).to(waves.dtype)

    def _freeze_parameters(self) -> None:
        """There are none."""


def mel_bank(rate: int, bins: int, window: int, low: float) -> Tensor:
    """Triangles (window + 1, bins) evenly spaced on the mel scale from `low` Hz up; a full-scale sine gives 1 to 3.

    mel = 2595·log10(1 + f/700). Frequencies are those of a window followed by as many zeros, so that
    the narrow triangles at the bottom are not empty.
    """
    top = 2595 * math.log10(1 + rate / 2 / 700)
    bottom = 2595 * math.log10(1 + low / 700)
    mels = torch.linspace(bottom, top, bins + 2, dtype=torch.float64)
    corners = 700 * (10 ** (mels / 2595) - 1)
    frequencies = torch.linspace(0, rate / 2, window + 1, dtype=torch.float64)
    rising = (frequencies[:, None] - corners[:-2]) / (corners[1:-1] - corners[:-2])
    falling = (corners[2:] - frequencies[:, None]) / (corners[2:] - corners[1:-1])
    triangles = torch.minimum(rising, falling).clamp(min=0)
    return (triangles * (4 / window) ** 2).float()


def build(config: Any) -> nn.Module:
    """An untrained `Wav2Vec2ForCTC` with this front end."""
    from transformers import Wav2Vec2ForCTC

    model: Any = Wav2Vec2ForCTC(config)
    settings = config.log_mel
    model.wav2vec2.feature_extractor = LogMel(
        settings["rate"],
        config.conv_dim[0],
        config.conv_kernel[0],
        config.conv_stride[0],
        settings["low"],
        settings["floor"],
    )
    return model
