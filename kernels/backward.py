"""The backward pass in two launches: the gradient to x, then those to the weights.

Nothing r-wide was kept: `input_kernel` computes u again with forward's own arithmetic, so that a
relu's mask is the same, and leaves a = du·rstd and h, (T, WIDTH) each. LayerNorm's two means are dot
products of that width: mean(dx̂) = du·slope / C and mean(dx̂∘x̂) = du·(u − shift) / C.

`weight_kernel` sums aᵀx, hᵀdy, dy and the columns of a over a fixed part of the rows; the parts are
added in a fixed order afterwards. There is no atomic addition: the same bits every time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activations import activate, slope
from .forward import multiply


@triton.jit
def input_kernel(
    dy,  # (T, C_OUT)
    x,  # (T, C_IN)
    statistics,  # (T, 2) float32
    down,  # (N, WIDTH, C_IN)
    slopes,  # (N, WIDTH) float32
    shift,  # (N, WIDTH) float32
    up,  # (N, C_OUT, WIDTH)
    gain,  # (N,) float32
    dx,  # (T, C_IN)
    a,  # (T, WIDTH), in the order of the tiles
    h,  # (T, WIDTH)
    order,
    tiles,
    rows,
    stride_dy,
    stride_x,
    stride_dx,
    factor,
    C_IN: tl.constexpr,
    C_OUT: tl.constexpr,
    C_MOST: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
    NORM: tl.constexpr,
    SHIFT: tl.constexpr,
    GAIN: tl.constexpr,
    SAME: tl.constexpr,
    MIXED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile = tl.program_id(0)
    if MIXED:
        adapter = tl.load(tiles + 3 * tile + 2).to(tl.int64)
        if adapter < -1:
            return
        place = tl.load(tiles + 3 * tile) + tl.arange(0, BLOCK_T)
        here = place < tl.load(tiles + 3 * tile + 1)
        row = tl.load(order + place, mask=here, other=0).to(tl.int64)
        if adapter < 0:
            for c in range(0, C_IN, BLOCK_C):
                channel = c + tl.arange(0, BLOCK_C)
                valid = here[:, None] & (channel < C_IN)[None, :]
                if SAME:
                    passed = tl.load(dy + row[:, None] * stride_dy + channel[None, :], mask=valid)
                    passed = passed.to(dx.dtype.element_ty)
                else:
                    passed = tl.zeros([BLOCK_T, BLOCK_C], dx.dtype.element_ty)
                tl.store(dx + row[:, None] * stride_dx + channel[None, :], passed, mask=valid)
            return
        down += adapter * WIDTH * C_IN
        up += adapter * WIDTH * C_OUT
        slopes += adapter * WIDTH
        shift += adapter * WIDTH
        gain += adapter
    else:
        place = tile * BLOCK_T + tl.arange(0, BLOCK_T)
        here = place < rows
        row = place.to(tl.int64)
    place = place.to(tl.int64)
    unit = tl.arange(0, BLOCK_H)
    used = unit < WIDTH
    if GAIN:
        factor = factor * tl.load(gain)

    u = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
    dh = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
    for c in range(0, C_MOST, BLOCK_C):
        channel = c + tl.arange(0, BLOCK_C)
        entering = channel < C_IN
        leaving = channel < C_OUT
        chunk = tl.load(
            x + row[:, None] * stride_x + channel[None, :],
            mask=here[:, None] & entering[None, :],
            other=0.0,
        )
        narrow = tl.load(
            down + unit[:, None] * C_IN + channel[None, :],
            mask=used[:, None] & entering[None, :],
            other=0.0,
        )
        u = multiply(chunk.to(narrow.dtype), tl.trans(narrow), u, PRECISION)
        change = tl.load(
            dy + row[:, None] * stride_dy + channel[None, :],
            mask=here[:, None] & leaving[None, :],
            other=0.0,
        )
        wide = tl.load(
            up + channel[:, None] * WIDTH + unit[None, :],
            mask=leaving[:, None] & used[None, :],
            other=0.0,
        )
        dh = multiply(change.to(wide.dtype), wide, dh, PRECISION)
    if NORM:
        mean = tl.load(statistics + 2 * row, mask=here, other=0.0)
        rstd = tl.load(statistics + 2 * row + 1, mask=here, other=0.0)
        sums = tl.load(slopes + unit, mask=used, other=0.0)
        u = rstd[:, None] * (u - mean[:, None] * sums[None, :])
    centred = u
    if SHIFT:
        u += tl.load(shift + unit, mask=used, other=0.0)[None, :]
    held = here[:, None] & used[None, :]
    du = tl.where(held, factor * dh * slope(u, ACTIVATION), 0.0)
    kept = tl.where(held, activate(u, ACTIVATION), 0.0)
    if NORM:
        scaled = du * rstd[:, None]
    else:
        scaled = du
    at = place[:, None] * WIDTH + unit[None, :]
    tl.store(a + at, scaled.to(a.dtype.element_ty), mask=held)
    tl.store(h + at, kept.to(h.dtype.element_ty), mask=held)

    rounded = du.to(down.dtype.element_ty)
    if NORM:
        exact = rounded.to(tl.float32)
        first = tl.sum(exact * sums[None, :], 1) / C_IN
        second = tl.sum(exact * tl.where(used[None, :], centred, 0.0), 1) / C_IN
    for c in range(0, C_IN, BLOCK_C):
        channel = c + tl.arange(0, BLOCK_C)
        inside = channel < C_IN
        valid = here[:, None] & inside[None, :]
        matrix = tl.load(
            down + unit[:, None] * C_IN + channel[None, :],
            mask=used[:, None] & inside[None, :],
            other=0.0,
        )
        change = multiply(rounded, matrix, tl.zeros([BLOCK_T, BLOCK_C], tl.float32), PRECISION)
        if NORM:
            chunk = tl.load(x + row[:, None] * stride_x + channel[None, :], mask=valid, other=0.0)
            unitary = (chunk.to(tl.float32) - mean[:, None]) * rstd[:, None]
            change = rstd[:, None] * (change - first[:, None] - unitary * second[:, None])
        if SAME:
            passed = tl.load(
                dy + row[:, None] * stride_dy + channel[None, :], mask=valid, other=0.0
            )
            change += passed.to(tl.float32)
        tl.store(
            dx + row[:, None] * stride_dx + channel[None, :],
            change.to(dx.dtype.element_ty),
            mask=valid,
        )


@triton.jit
def weight_kernel(
    dy,  # (T, C_OUT)
    x,  # (T, C_IN)
    statistics,  # (T, 2) float32
    a,  # (T, WIDTH)
    h,  # (T, WIDTH)
    down_parts,  # (N, parts, C_IN, WIDTH) float32
    up_parts,  # (N, parts, C_OUT, WIDTH) float32
    dy_parts,  # (N, parts, C_OUT) float32
    column_parts,  # (N, parts, 2, WIDTH) float32: sums of a / rstd and of a · mean
    order,  # (T,) int32
    first,  # (N + 1,) int32: where each adapter's places begin
    rows,
    parts,
    stride_dy,
    stride_x,
    C_IN: tl.constexpr,
    C_OUT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
    NORM: tl.constexpr,
    MIXED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    chunk_number = tl.program_id(0)
    part = tl.program_id(1)
    adapter = part // parts
    channel = chunk_number * BLOCK_C + tl.arange(0, BLOCK_C)
    entering = channel < C_IN
    leaving = channel < C_OUT
    unit = tl.arange(0, BLOCK_H)
    used = unit < WIDTH
    if MIXED:
        begin = tl.load(first + adapter)
        end = tl.load(first + adapter + 1)
    else:
        begin = 0
        end = rows
    own = tl.cdiv(tl.cdiv(end - begin, BLOCK_T), parts) * BLOCK_T  # whole blocks of rows
    begin += (part % parts) * own
    end = tl.minimum(end, begin + own)
    # channels in front: the larger side is the one the tensor cores want to be 64 at least
    of_down = tl.zeros([BLOCK_C, BLOCK_H], tl.float32)
    of_up = tl.zeros([BLOCK_C, BLOCK_H], tl.float32)
    of_dy = tl.zeros([BLOCK_C], tl.float32)
    of_du = tl.zeros([BLOCK_H], tl.float32)
    of_mean = tl.zeros([BLOCK_H], tl.float32)
    for start in range(begin, end, BLOCK_T):
        place = start + tl.arange(0, BLOCK_T)
        here = place < end
        if MIXED:
            row = tl.load(order + place, mask=here, other=0).to(tl.int64)
        else:
            row = place.to(tl.int64)
        at = place.to(tl.int64)[:, None] * WIDTH + unit[None, :]
        valid = here[:, None] & used[None, :]
        scaled = tl.load(a + at, mask=valid, other=0.0)
        kept = tl.load(h + at, mask=valid, other=0.0)
        seen = tl.load(
            x + row[:, None] * stride_x + channel[None, :],
            mask=here[:, None] & entering[None, :],
            other=0.0,
        )
        change = tl.load(
            dy + row[:, None] * stride_dy + channel[None, :],
            mask=here[:, None] & leaving[None, :],
            other=0.0,
        )
        of_down = multiply(tl.trans(seen.to(scaled.dtype)), scaled, of_down, PRECISION)
        of_up = multiply(tl.trans(change.to(kept.dtype)), kept, of_up, PRECISION)
        of_dy += tl.sum(change.to(tl.float32), 0)
        wide = scaled.to(tl.float32)
        if NORM:
            mean = tl.load(statistics + 2 * row, mask=here, other=0.0)
            rstd = tl.load(statistics + 2 * row + 1, mask=here, other=1.0)
            of_du += tl.sum(wide / rstd[:, None], 0)
            of_mean += tl.sum(wide * mean[:, None], 0)
        else:
            of_du += tl.sum(wide, 0)
    index = part.to(tl.int64)
    tile = channel[:, None] * WIDTH + unit[None, :]
    tl.store(
        down_parts + index * C_IN * WIDTH + tile, of_down, mask=entering[:, None] & used[None, :]
    )
    tl.store(up_parts + index * C_OUT * WIDTH + tile, of_up, mask=leaving[:, None] & used[None, :])
    tl.store(dy_parts + index * C_OUT + channel, of_dy, mask=leaving)
    if chunk_number == 0:
        tl.store(column_parts + index * 2 * WIDTH + unit, of_du, mask=used)
        tl.store(column_parts + index * 2 * WIDTH + WIDTH + unit, of_mean, mask=used)
