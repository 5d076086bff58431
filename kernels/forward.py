"""The forward pass in one launch: norm, both projections, activation, scale and residual.

A program has BLOCK_T rows. It reads x once for u = LN(x)·downᵀ and the row's mean and variance
together, since u = rstd·(x·downᵀ − mean·slope) + shift for `down` with the norm's weight in it, and
writes y = residual + gain·(act(u)·upᵀ + bias). Moments are merged chunk by chunk (Chan et al. 1983).
With MIXED a tile table says which rows a program has and which adapter they picked.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activations import activate


@triton.jit
def multiply(a, b, total, PRECISION: tl.constexpr):
    """total + a·b, in float32."""
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def merged(chunk, valid, columns, count, mean, spread):
    """Mean and summed squared deviations of rows, with one more chunk of `columns` in them."""
    own = tl.sum(tl.where(valid, chunk, 0.0), 1) / columns
    apart = tl.where(valid, chunk - own[:, None], 0.0)
    step = own - mean
    whole = count + columns
    mean = mean + step * (columns / whole)
    spread = spread + tl.sum(apart * apart, 1) + step * step * (count * (columns / whole))
    return whole, mean, spread


@triton.jit
def forward_kernel(
    residual,  # (T, C_OUT)
    x,  # (T, C_IN)
    down,  # (N, WIDTH, C_IN)
    slopes,  # (N, WIDTH) float32: sums of down's rows
    shift,  # (N, WIDTH) float32
    up,  # (N, C_OUT, WIDTH)
    bias,  # (N, C_OUT) float32
    gain,  # (N,) float32
    y,  # (T, C_OUT)
    statistics,  # (T, 2) float32: mean and 1 / deviation
    order,  # (T,) int32: rows by adapter
    tiles,  # (tiles, 3) int32: first place, last + 1, adapter
    rows,
    stride_residual,
    stride_x,
    stride_y,
    factor,
    eps,
    C_IN: tl.constexpr,
    C_OUT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
    NORM: tl.constexpr,
    SHIFT: tl.constexpr,
    BIAS: tl.constexpr,
    GAIN: tl.constexpr,
    RESIDUAL: tl.constexpr,
    KEEP: tl.constexpr,
    MIXED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile = tl.program_id(0)
    if MIXED:
        adapter = tl.load(tiles + 3 * tile + 2).to(tl.int64)
        if adapter < -1:  # the table has room for more tiles than there are
            return
        place = tl.load(tiles + 3 * tile) + tl.arange(0, BLOCK_T)
        here = place < tl.load(tiles + 3 * tile + 1)
        row = tl.load(order + place, mask=here, other=0).to(tl.int64)
        if adapter < 0:  # no adapter: the same bits
            for c in range(0, C_OUT, BLOCK_C):
                channel = c + tl.arange(0, BLOCK_C)
                valid = here[:, None] & (channel < C_OUT)[None, :]
                if RESIDUAL:
                    same = tl.load(
                        residual + row[:, None] * stride_residual + channel[None, :], mask=valid
                    )
                else:
                    same = tl.zeros([BLOCK_T, BLOCK_C], y.dtype.element_ty)
                tl.store(y + row[:, None] * stride_y + channel[None, :], same, mask=valid)
            return
        down += adapter * WIDTH * C_IN
        up += adapter * WIDTH * C_OUT
        slopes += adapter * WIDTH
        shift += adapter * WIDTH
        bias += adapter * C_OUT
        gain += adapter
    else:
        place = tile * BLOCK_T + tl.arange(0, BLOCK_T)
        here = place < rows
        row = place.to(tl.int64)
    unit = tl.arange(0, BLOCK_H)
    used = unit < WIDTH
    if GAIN:
        factor = factor * tl.load(gain)

    u = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
    count = 0.0
    mean = tl.zeros([BLOCK_T], tl.float32)
    spread = tl.zeros([BLOCK_T], tl.float32)
    for c in range(0, C_IN, BLOCK_C):
        channel = c + tl.arange(0, BLOCK_C)
        inside = channel < C_IN
        valid = here[:, None] & inside[None, :]
        chunk = tl.load(x + row[:, None] * stride_x + channel[None, :], mask=valid, other=0.0)
        matrix = tl.load(
            down + unit[:, None] * C_IN + channel[None, :],
            mask=used[:, None] & inside[None, :],
            other=0.0,
        )
        if NORM:
            columns = tl.minimum(BLOCK_C, C_IN - c) * 1.0
            count, mean, spread = merged(chunk.to(tl.float32), valid, columns, count, mean, spread)
        u = multiply(chunk.to(matrix.dtype), tl.trans(matrix), u, PRECISION)
    if NORM:
        rstd = 1.0 / tl.sqrt(spread / C_IN + eps)
        sums = tl.load(slopes + unit, mask=used, other=0.0)
        u = rstd[:, None] * (u - mean[:, None] * sums[None, :])
        if KEEP:
            tl.store(statistics + 2 * row, mean, mask=here)
            tl.store(statistics + 2 * row + 1, rstd, mask=here)
    if SHIFT:
        u += tl.load(shift + unit, mask=used, other=0.0)[None, :]
    h = tl.where(used[None, :], activate(u, ACTIVATION), 0.0).to(up.dtype.element_ty)

    for c in range(0, C_OUT, BLOCK_C):
        channel = c + tl.arange(0, BLOCK_C)
        inside = channel < C_OUT
        valid = here[:, None] & inside[None, :]
        matrix = tl.load(
            up + channel[:, None] * WIDTH + unit[None, :],
            mask=inside[:, None] & used[None, :],
            other=0.0,
        )
        change = multiply(h, tl.trans(matrix), tl.zeros([BLOCK_T, BLOCK_C], tl.float32), PRECISION)
        if BIAS:
            change += tl.load(bias + channel, mask=inside, other=0.0)[None, :]
        change = change * factor
        if RESIDUAL:
            before = tl.load(
                residual + row[:, None] * stride_residual + channel[None, :], mask=valid, other=0.0
            )
            change += before.to(tl.float32)
        tl.store(
            y + row[:, None] * stride_y + channel[None, :],
            change.to(y.dtype.element_ty),
            mask=valid,
        )
