"""What layers do along time: convolutions of frames, and of a spectrogram's patches band by band.

Letters: B clips, T tokens, C channels, O output channels, R rows of the grid (bands of frequency; 1
where tokens are frames in a row).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def along_time(
    z: Tensor,  # (B, T, C), T = first + R · columns
    kernel: Tensor,  # (O, C / groups, taps)
    bias: Tensor | None,  # (O,)
    mask: Tensor | None = None,  # bool (B, T), False for padding
    first: int = 0,
    rows: int = 1,
    causal: bool = False,
) -> Tensor:
    """A convolution along each row of the grid behind `first` other tokens, (B, T, O).

    Zeros stand around every row and in the place of padding. The other tokens are rows of one. With
    `causal` a frame sees itself and those before it; else taps are odd and as many stand behind it.
    """
    if mask is not None:
        z = torch.where(mask[..., None], z, z.new_zeros(()))
    groups, taps = z.shape[-1] // kernel.shape[1], kernel.shape[2]
    own = taps - 1 if causal else taps // 2
    frames = z[:, first:].unflatten(1, (rows, -1)).flatten(0, 1).mT  # (B·R, C, columns)
    frames = F.pad(frames, (own, taps - 1 - own))
    seen = F.conv1d(frames, kernel, bias, groups=groups).mT
    seen = seen.unflatten(0, (-1, rows)).flatten(1, 2)
    if not first:
        return seen
    alone = F.conv1d(z[:, :first].mT, kernel[..., own : own + 1], bias, groups=groups).mT
    return torch.cat([alone, seen], 1)


def soft_dispatch(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax over the tokens of logits (B, T, slots), none of which takes anything from padding."""
    if mask is not None:
        logits = logits.masked_fill(~mask[..., None], torch.finfo(logits.dtype).min)
    return logits.softmax(1)
