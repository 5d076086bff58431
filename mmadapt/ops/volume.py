"""Grids of tokens as windows, and stacks of slices as columns through their depth.

Letters: B volumes or images, D slices of a volume (the fastest of both in the batch), H and W rows
and columns of the grid, C channels.
"""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn import functional as F


def windows(grid: Tensor, height: int, width: int) -> Tensor:
    """Windows (B·n, height, width, C) of a grid (B, H, W, C), zeros where they stick out.

    Those of one image stand side by side, in reading order.
    """
    _, rows, columns, _ = grid.shape
    grid = F.pad(grid, (0, 0, 0, -columns % width, 0, -rows % height))
    split = grid.unflatten(1, (-1, height)).unflatten(3, (-1, width))  # (B, n, height, m, width, C)
    return split.transpose(2, 3).flatten(0, 2)


def from_windows(cut: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse: windows (B·n, height, width, C) → the grid (B, rows, columns, C) they were cut from."""
    height, width = cut.shape[1:3]
    down, across = -(-rows // height), -(-columns // width)
    split = cut.unflatten(0, (-1, down, across)).transpose(2, 3)  # (B, n, height, m, width, C)
    return split.flatten(3, 4).flatten(1, 2)[:, :rows, :columns]


def depth_grid(depth: int) -> tuple[int, int]:
    """The most nearly square rows × columns = depth, rows ≤ columns: 8 → (2, 4), 7 → (1, 7)."""
    rows = math.isqrt(depth)
    while depth % rows:
        rows -= 1
    return rows, depth // rows


def to_columns(slices: Tensor, rows: int, columns: int) -> Tensor:
    """For every position a grid of the slices through it: (B·D, H, W, C) → (B·H·W, rows, columns, C).

    rows · columns = D.
    """
    stacked = slices.unflatten(0, (-1, rows, columns))  # (B, rows, columns, H, W, C)
    return stacked.permute(0, 3, 4, 1, 2, 5).flatten(0, 2)


def to_slices(columns: Tensor, height: int, width: int) -> Tensor:
    """The inverse: (B·H·W, rows, columns, C) → (B·D, H, W, C)."""
    stacked = columns.unflatten(0, (-1, height, width))  # (B, H, W, rows, columns, C)
    return stacked.permute(0, 3, 4, 1, 2, 5).flatten(0, 2)


def through_depth(slices: Tensor, kernel: Tensor, bias: Tensor | None, depth: int) -> Tensor:
    """A convolution along the depth alone: slices (B·D, N, C), kernel (O, C, taps) with odd taps.

    Zeros stand before the first slice and behind the last; no volume sees another. (B·D, N, O)
    """
    volume = slices.unflatten(0, (-1, depth)).permute(0, 3, 1, 2)  # (B, C, D, N)
    volume = F.conv2d(volume, kernel.unsqueeze(-1), bias, padding=(kernel.shape[-1] // 2, 0))
    return volume.permute(0, 2, 3, 1).flatten(0, 1)
