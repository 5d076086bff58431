"""Frames that a CTC model heard something in.

Letters: B clips, T frames, C channels, K symbols, one of which is the blank; L groups of frames.
"""

from __future__ import annotations

import torch
from torch import Tensor


def heard_frames(
    logits: Tensor,  # (B, T, K)
    blank: int,
    threshold: float = 0.95,
    mask: Tensor | None = None,  # bool (B, T), False for padding
) -> Tensor:
    """Which frames to keep, bool (B, T): those whose likeliest symbol is none or p(blank) < threshold.

    Of a clip with none of them, the frame with the least blank is kept, so that silence is one frame.
    """
    likely = logits.float().softmax(-1)
    blanks = likely[..., blank]
    kept = (logits.argmax(-1) != blank) | (blanks < threshold)
    if mask is not None:
        kept = kept & mask
        blanks = blanks.masked_fill(~mask, torch.inf)
    least = torch.zeros_like(kept).scatter(1, blanks.argmin(1, keepdim=True), True)
    return kept | (least & ~kept.any(1, keepdim=True))


def gather_frames(
    frames: Tensor,  # (B, T, C)
    kept: Tensor,  # bool (B, T)
    symbols: Tensor | None = None,  # (B, T)
) -> tuple[Tensor, Tensor]:
    """The kept frames, side by side (B, L, C), and which of them there are, bool (B, L).

    With `symbols` neighbours of one symbol become their mean; a dropped frame parts them.
    """
    begins = kept
    if symbols is not None:
        same = kept[:, 1:] & kept[:, :-1] & (symbols[:, 1:] == symbols[:, :-1])
        begins = torch.cat([kept[:, :1], kept[:, 1:] & ~same], 1)
    group = begins.long().cumsum(1) - 1
    length = int(group.max()) + 1
    group = torch.where(kept, group, length)  # the others into a slot that is cut off
    place = group[..., None].expand_as(frames)
    total = frames.new_zeros(len(frames), length + 1, frames.shape[-1])
    total = total.scatter_add(1, place, torch.where(kept[..., None], frames, 0.0))
    count = torch.zeros_like(total[..., 0]).scatter_add(1, group, kept.to(frames.dtype))
    return total[:, :length] / count[:, :length, None].clamp(min=1), count[:, :length] > 0


def stack_frames(frames: Tensor, mask: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Every `size` frames side by side as one (B, ⌈T/size⌉, size·C), and its mask; padding is zero."""
    frames = torch.where(mask[..., None], frames, 0.0)
    missing = -frames.shape[1] % size
    frames = torch.nn.functional.pad(frames, (0, 0, 0, missing))
    mask = torch.nn.functional.pad(mask, (0, missing))
    return frames.unflatten(1, (-1, size)).flatten(2), mask.unflatten(1, (-1, size)).any(-1)
