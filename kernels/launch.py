"""Launching the kernels: the same two functions, with the same arguments, as `mmadapt.ops.plain`."""

from __future__ import annotations

import os
import weakref
from typing import Any

import torch
from torch import Tensor

from .backward import input_kernel, weight_kernel
from .forward import forward_kernel
from .settings import NUMBERS, forward_tiles, input_tiles, parts, units, weight_tiles
from .table import RowOrder

#: whether Triton computes on the CPU, for tests
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")

_last: tuple[Any, ...] = ()


def forward(residual: Tensor | None, x: Tensor, folded: Any, spec: Any, ids: Tensor | None) -> Any:
    """y, and mean and 1 / deviation of x's rows (T, 2) or, without a norm, nothing (0,)."""
    rows, channels_in = x.shape
    _, width, _ = folded.down.shape
    channels_out = folded.up.shape[1]
    added = x if spec.same else residual
    y = x.new_empty(rows, channels_out, dtype=x.dtype if added is None else added.dtype)
    statistics = x.new_empty((rows, 2) if spec.norm else (0,), dtype=torch.float32)
    wide = folded.down.dtype == torch.float32
    sizes = forward_tiles(rows, width, wide)
    order = tiles = x
    count = _ceil(rows, sizes.rows)
    if ids is not None:
        placed = row_order(ids, rows // len(ids), len(folded.down))
        order, tiles = placed.order, placed.tiles(sizes.rows)
        count = len(tiles)
    compute: Any = forward_kernel
    compute[(count,)](
        x if added is None else added,
        x,
        folded.down,
        _or(folded.slope, x),
        _or(folded.shift, x),
        folded.up,
        _or(folded.bias, x),
        _or(folded.gain, x),
        y,
        statistics,
        order,
        tiles,
        rows,
        0 if added is None else added.stride(0),
        x.stride(0),
        y.stride(0),
        float(spec.factor),
        float(spec.eps),
        C_IN=channels_in,
        C_OUT=channels_out,
        WIDTH=width,
        BLOCK_T=sizes.rows,
        BLOCK_C=sizes.channels,
        BLOCK_H=units(width),
        NORM=spec.norm,
        SHIFT=folded.shift is not None,
        BIAS=folded.bias is not None,
        GAIN=folded.gain is not None,
        RESIDUAL=added is not None,
        KEEP=spec.norm,
        MIXED=ids is not None,
        ACTIVATION=NUMBERS[spec.activation],
        PRECISION=_precision(wide),
        num_warps=sizes.warps,
        num_stages=sizes.stages,
    )
    return y, statistics


def backward(
    dy: Tensor,
    x: Tensor,
    statistics: Tensor,
    folded: Any,
    spec: Any,
    ids: Tensor | None,
    weights: bool,
) -> Any:
    """dx and, with `weights`, the sums that the weights' gradients are made of."""
    rows, channels_in = x.shape
    adapters, width, _ = folded.down.shape
    channels_out = folded.up.shape[1]
    wide = folded.down.dtype == torch.float32
    sizes = input_tiles(rows, width, wide)
    order = tiles = first = x
    count = _ceil(rows, sizes.rows)
    if ids is not None:
        placed = row_order(ids, rows // len(ids), adapters)
        order, first, tiles = placed.order, placed.first, placed.tiles(sizes.rows)
        count = len(tiles)
    dx = x.new_empty(rows, channels_in)
    a = x.new_empty(rows, width, dtype=folded.down.dtype)
    h = torch.empty_like(a)
    shared: dict[str, Any] = dict(
        C_IN=channels_in,
        C_OUT=channels_out,
        WIDTH=width,
        BLOCK_H=units(width),
        NORM=spec.norm,
        MIXED=ids is not None,
        PRECISION=_precision(wide),
    )
    to_input: Any = input_kernel
    to_input[(count,)](
        dy,
        x,
        statistics,
        folded.down,
        _or(folded.slope, x),
        _or(folded.shift, x),
        folded.up,
        _or(folded.gain, x),
        dx,
        a,
        h,
        order,
        tiles,
        rows,
        dy.stride(0),
        x.stride(0),
        dx.stride(0),
        float(spec.factor),
        **shared,
        C_MOST=max(channels_in, channels_out),
        BLOCK_T=sizes.rows,
        BLOCK_C=sizes.channels,
        SHIFT=folded.shift is not None,
        GAIN=folded.gain is not None,
        SAME=spec.same,
        ACTIVATION=NUMBERS[spec.activation],
        num_warps=sizes.warps,
        num_stages=sizes.stages,
    )
    if not weights:
        return dx, None
    sizes = weight_tiles(width, wide)
    chunks = _ceil(max(channels_in, channels_out), sizes.channels)
    split = parts(rows, chunks, adapters, sizes.rows)
    empty: dict[str, Any] = dict(dtype=torch.float32, device=x.device)
    of_down = torch.empty(adapters, split, channels_in, width, **empty)
    of_up = torch.empty(adapters, split, channels_out, width, **empty)
    of_dy = torch.empty(adapters, split, channels_out, **empty)
    columns = torch.empty(adapters, split, 2, width, **empty)
    to_weights: Any = weight_kernel
    to_weights[(chunks, adapters * split)](
        dy,
        x,
        statistics,
        a,
        h,
        of_down,
        of_up,
        of_dy,
        columns,
        order,
        first,
        rows,
        split,
        dy.stride(0),
        x.stride(0),
        **shared,
        BLOCK_T=sizes.rows,
        BLOCK_C=sizes.channels,
        num_warps=sizes.warps,
        num_stages=sizes.stages,
    )
    du, shift = columns.sum(1).unbind(1)
    by_down = of_down.sum(1).mT
    if spec.norm:
        by_down = by_down - shift[..., None]
    return dx, (by_down, of_up.sum(1), of_dy.sum(1), du)


def row_order(ids: Tensor, length: int, adapters: int) -> RowOrder:
    """The order of a batch's rows; all layers of one pass ask for the same one."""
    global _last
    if ids.is_cuda and torch.cuda.is_current_stream_capturing():
        return RowOrder(ids, length, adapters)  # the graph has to make it from the ids it will meet
    key = (ids._version, length, adapters)
    if not _last or _last[0]() is not ids or _last[1] != key:
        _last = (weakref.ref(ids), key, RowOrder(ids, length, adapters))
    return _last[2]


def _ceil(number: int, block: int) -> int:
    return -(-number // block)


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    return other if tensor is None else tensor


def _precision(wide: bool) -> str:
    """How float32 operands are multiplied: as torch was told to multiply matrices."""
    return "tf32" if wide and torch.backends.cuda.matmul.allow_tf32 else "ieee"
