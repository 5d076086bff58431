"""Which instance of the template `bottleneck_forward` computes a shape, and what it takes.

A block keeps tiles of rows and a ring of weights in its shared memory; what fits there decides. None
of this has been timed.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

#: bytes of shared memory a block may have, from compute capability 9.0 on
SHARED = 227 * 1024
#: compute capabilities that are compiled for; sending to a cluster is slow without the `a`
ARCHITECTURES = {(9, 0): "sm_90a", (10, 0): "sm_100a"}
#: channels of a chunk of weights
CHUNK = 64
RESIDUALS = ("none", "same", "other")


class Instance(NamedTuple):
    """One instance: `warps` of 16 rows each, `buffers` of rows and `stages` of weights, in a block."""

    number: str  # "Bfloat16" or "Float16"
    channels: int
    width: int  # a multiple of 16
    warps: int
    buffers: int
    stages: int
    norm: bool
    activation: int
    residual: int
    cluster: int

    @property
    def expression(self) -> str:
        """Its name in C++."""
        values = (str(value).lower() for value in self[1:])
        return f"bottleneck_forward<{', '.join((self.number, *values))}>"

    @property
    def rows(self) -> int:
        """Rows of a tile."""
        return 16 * self.warps

    @property
    def threads(self) -> int:
        """Threads of a block; the last warp streams weights."""
        return 32 * (self.warps + 1)

    @property
    def shared(self) -> int:
        """Bytes of shared memory a block takes."""
        rows = self.buffers * self.rows * (self.channels + 8)
        stage = max(self.width * (CHUNK + 8), CHUNK * (self.width + 8))
        return 2 * (rows + self.stages * stage) + 8 * (2 * self.stages + self.buffers * self.warps)


class Arguments(ctypes.Structure):
    """The kernel's one argument, as in `forward.cuh`."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "residual", "down", "up")),
        *((name, ctypes.c_void_p) for name in ("slope", "shift", "bias", "gain")),
        *((name, ctypes.c_void_p) for name in ("y", "statistics")),
        *((name, ctypes.c_longlong) for name in ("stride_x", "stride_residual")),
        *((name, ctypes.c_float) for name in ("factor", "eps")),
        *((name, ctypes.c_int) for name in ("rows", "width")),
    ]


def padded(width: int) -> int:
    """The multiple of 16 that a bottleneck of this width is computed in."""
    return -(-width // 16) * 16


def instance_for(
    rows: int,
    channels: int,
    width: int,
    *,
    processors: int,
    number: str = "Bfloat16",
    norm: bool = False,
    activation: int = 0,
    residual: str = "same",
    cluster: int = 4,
) -> Instance | None:
    """The instance with the most rows, buffers and stages that fit, in that order; None if none does.

    Where tiles would be fewer than `processors`, they get smaller.
    """
    warps = 8 if channels <= 256 else 4
    while warps > 1 and rows < 16 * warps * processors:
        warps //= 2
    kind = (norm, activation, RESIDUALS.index(residual), cluster)
    while warps:
        for buffers in (2, 1):
            for stages in (4, 3, 2) if buffers == 1 else (4, 3):
                found = Instance(number, channels, padded(width), warps, buffers, stages, *kind)
                if found.shared <= SHARED:
                    return found
        warps //= 2
    return None


def fits(channels: int, width: int) -> bool:
    """Whether a block's shared memory holds the smallest tile, 16 rows, beside a ring of two stages."""
    return instance_for(1, channels, width, processors=1) is not None
