"""Tile sizes of the kernels, by what is computed and where.

They compile without spilling registers (`kernels/compile_ahead.py` shows it); none has been timed.
"""

from __future__ import annotations

from typing import NamedTuple


class Tiles(NamedTuple):
    """Rows and channels a program takes at a time, its warps, and stages of its loops' pipeline."""

    rows: int
    channels: int
    warps: int
    stages: int


#: the kernels' number for each of the reference's activations
NUMBERS = {
    "identity": 0,
    "relu": 1,
    "gelu": 2,
    "gelu_new": 3,
    "silu": 4,
    "quick_gelu": 5,
    "tanh": 6,
}
#: the widest bottleneck that the kernels' registers hold
WIDEST = 128
#: streaming multiprocessors assumed where the device cannot be asked
PROCESSORS = 132


def units(width: int) -> int:
    """The power of two, 16 at least, that a bottleneck of this width is computed in."""
    return max(16, 1 << (width - 1).bit_length())


def forward_tiles(rows: int, width: int, wide: bool) -> Tiles:
    """Of the forward pass; `wide` for float32 operands."""
    if wide:
        return Tiles(32, 32, 4, 2)
    if rows <= 16 * PROCESSORS:
        return Tiles(16, 128, 4, 3)
    if width <= 16:
        return Tiles(64, 128, 4, 3)
    if rows <= 128 * PROCESSORS:
        return Tiles(64, 64, 4, 3)
    return Tiles(128, 64, 8, 3)


def input_tiles(rows: int, width: int, wide: bool) -> Tiles:
    """Of the gradient to x."""
    if wide:
        return Tiles(32, 32, 8, 2)
    if rows <= 16 * PROCESSORS:
        return Tiles(16, 64, 4, 3)
    return Tiles(64, 64, 8, 3) if width <= 64 else Tiles(32, 32, 8, 2)


def weight_tiles(width: int, wide: bool) -> Tiles:
    """Of the gradients to the weights; channels in front of the width."""
    if wide:
        return Tiles(32, 32, 8, 2)
    return Tiles(64, 64, 8, 3) if width <= 64 else Tiles(32, 64, 8, 2)


def parts(rows: int, chunks: int, adapters: int, block: int) -> int:
    """Into how many parts the sum over rows is split: two programs a processor, a block a part."""
    most = max(1, 2 * PROCESSORS // (chunks * adapters))
    return min(most, max(1, -(-rows // (adapters * block))))
