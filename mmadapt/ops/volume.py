"""Grids of tokens as windows, and stacks of slices as columns through their depth.

Letters: B volumes or images, D slices of a volume (the fastest of both in the batch), H and W rows
and columns of the grid, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
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


# -- cubes of a volume ------------------------------------------------------------------------------
# A volume of tokens is (B, D, H, W, C), a size three numbers in that order.


def cubes(volume: Tensor, size: Sequence[int]) -> Tensor:
    """Cubes (B·n, d·h·w, C) of a volume (B, D, H, W, C) whose axes they divide, in reading order."""
    d, h, w = size
    split = volume.unflatten(3, (-1, w)).unflatten(2, (-1, h)).unflatten(1, (-1, d))
    return split.permute(0, 1, 3, 5, 2, 4, 6, 7).flatten(4, 6).flatten(0, 3)


def from_cubes(tokens: Tensor, size: Sequence[int], volume: Sequence[int]) -> Tensor:
    """The inverse: (B·n, d·h·w, C) → (B, D, H, W, C), with (D, H, W) = `volume`."""
    count = [whole // side for whole, side in zip(volume, size, strict=True)]
    split = tokens.unflatten(1, tuple(size)).unflatten(0, (-1, *count))
    return split.permute(0, 1, 4, 2, 5, 3, 6, 7).flatten(5, 6).flatten(3, 4).flatten(1, 2)


def cubes_apart(
    volume: Sequence[int], size: Sequence[int], shift: Sequence[int], device: torch.device
) -> Tensor | None:
    """Which tokens of a cube must not see each other: bool (n, N, N), or None where all may.

    Of a volume (D, H, W), padded up to whole cubes and rolled back by `shift`: what the roll brought
    together from two ends stays apart, and so does padding from everything.
    """
    if not any(shift) and not any(n % side for n, side in zip(volume, size, strict=True)):
        return None
    regions = torch.zeros(1, 1, 1, dtype=torch.long, device=device)
    for axis, (length, side, by) in enumerate(zip(volume, size, shift, strict=True)):
        padded = length + -length % side
        place = torch.arange(padded, device=device)
        region = (
            (place >= padded - side).long() + (place >= padded - by).long() if by else 0 * place
        )
        region = torch.where((place + by) % padded < length, region, 3)
        regions = 4 * regions + region.view([-1 if each == axis else 1 for each in range(3)])
    own = cubes(regions[None, ..., None], size)  # (n, N, 1)
    return own != own.transpose(1, 2)


def distances(table: Tensor, side: int) -> Tensor:
    """Rows of a table of relative positions (L, C) for every pair of `side` places (side, side, C).

    Tables for another number of places are linearly interpolated.
    """
    if table.shape[0] != 2 * side - 1:
        table = F.interpolate(table.T[None], 2 * side - 1, mode="linear")[0].T
    place = torch.arange(side, device=table.device)
    return table[place[:, None] - place[None] + side - 1]


def cube_attention(
    q: Tensor,  # (B·n, heads, N, c), a cube's N = d·h·w tokens
    k: Tensor,
    v: Tensor,
    size: Sequence[int],
    tables: Sequence[Tensor | None],  # (L, c), one an axis
    apart: Tensor | None,  # (n, N, N)
) -> Tensor:
    """softmax(q·kᵀ/√c + q·(R_d + R_h + R_w))·v, shaped as q; tokens that are apart weigh nothing."""
    grid = q.unflatten(2, tuple(size))  # (…, d, h, w, c)
    bias = q.new_zeros(())
    axes = ("bnxyzc,xkc->bnxyzk", "bnxyzc,ykc->bnxyzk", "bnxyzc,zkc->bnxyzk")
    for axis, (table, sum_over) in enumerate(zip(tables, axes, strict=True)):
        if table is not None:
            near = torch.einsum(sum_over, grid, distances(table, size[axis]).to(q.dtype))
            bias = bias + near[(..., *(slice(None) if a == axis else None for a in range(3)))]
    if bias.ndim:
        bias = bias.expand(*grid.shape[:-1], *size).flatten(5).flatten(2, 4)
    if apart is not None:
        far = torch.zeros_like(apart, dtype=q.dtype).masked_fill(apart, -torch.inf)
        bias = bias + far.repeat(q.shape[0] // apart.shape[0], 1, 1)[:, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias if bias.ndim else None)


# -- places in a volume -------------------------------------------------------------------------------


def places_of(points: Tensor, size: Sequence[int]) -> Tensor:
    """Voxels (…, 3), (z, y, x) of a volume (D, H, W), as −1 to 1 from border to border of it."""
    return (points + 0.5) * (2 / points.new_tensor(list(size))) - 1


def grid_places(size: Sequence[int], like: Tensor) -> Tensor:
    """The places of a volume's own voxels (D·H·W, 3)."""
    axes = [torch.arange(n, device=like.device, dtype=like.dtype) for n in size]
    return places_of(torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 2), size)


def sample(
    volume: Tensor, places: Tensor, padding: Literal["border", "zeros"] = "border"
) -> Tensor:
    """Values of a volume (B, C, D, H, W) at places (B, N, 3) between its voxels: (B, N, C).

    Within half a voxel of the border "border" gives the outermost value, "zeros" less of it.
    """
    grid = places.flip(-1)[:, :, None, None].to(volume.dtype)  # torch counts (x, y, z)
    found = F.grid_sample(volume, grid, padding_mode=padding, align_corners=False)
    return found.flatten(2).transpose(1, 2)


def resized_positions(positions: Tensor, height: int, width: int) -> Tensor:
    """Positions (1, H, W, C) of a grid for another one: means of whole blocks, else bicubic."""
    rows, columns = positions.shape[1:3]
    if (rows, columns) == (height, width):
        return positions
    maps = positions.movedim(-1, 1)
    if rows % height == 0 and columns % width == 0:
        maps = F.avg_pool2d(maps, (rows // height, columns // width))
    else:
        maps = F.interpolate(maps, (height, width), mode="bicubic", antialias=True)
    return maps.movedim(1, -1)
