"""Clouds of points: centres and neighbours, and where they fall on an image.

Letters: B clouds, N points, M centres, k neighbours, T tokens, C channels, V views.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def farthest_points(points: Tensor, count: int) -> Tensor:
    """Indices (B, count) of points (B, N, 3), each the farthest from those before; the first is 0.

    Nothing is drawn, and of points equally far the one that stands first is taken, so that a cloud has
    the same centres every time; one stored in another order may have others.
    """
    points = points.detach()
    batch = torch.arange(len(points), device=points.device)
    chosen = torch.zeros(len(points), dtype=torch.long, device=points.device)
    indices = [chosen]
    nearest = (points - points[:, :1]).square().sum(-1)
    for _ in range(count - 1):
        chosen = nearest.argmax(-1)
        indices.append(chosen)
        nearest = nearest.minimum((points - points[batch, chosen, None]).square().sum(-1))
    return torch.stack(indices, 1)


def neighbours(centres: Tensor, points: Tensor, count: int) -> Tensor:
    """Indices (B, M, count) of the points (B, N, 3) nearest to each centre (B, M, 3), itself included."""
    apart = (centres.detach()[:, :, None] - points.detach()[:, None]).square().sum(-1)
    return apart.topk(count, largest=False).indices


def pick(values: Tensor, indices: Tensor) -> Tensor:
    """values (B, N, C) at indices (B, …): (B, …, C)."""
    flat = indices.flatten(1)[..., None].expand(-1, -1, values.shape[-1])
    return values.gather(1, flat).view(*indices.shape, values.shape[-1])


def waves(places: Tensor, width: int, alpha: float = 1000.0, beta: float = 100.0) -> Tensor:
    """Places (…, 3) as sines and cosines (…, width) of β·xyz / α^(i/F), i from 0 to F − 1."""
    count = math.ceil(width / 6)
    steps = alpha ** (torch.arange(count, device=places.device, dtype=places.dtype) / count)
    angles = beta * places[..., None] / steps  # (…, 3, F)
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(-3)[..., :width]


def views(dtype: torch.dtype = torch.float32) -> Tensor:
    """Six rotations (6, 3, 3): about x by quarters of a turn, and about y by one to each side.

    The images of those about y are turned by a quarter, too.
    """
    quarter = math.pi / 2
    about_x = [_rotation(0, turn * quarter) for turn in range(4)]
    turned = _rotation(2, quarter)
    about_y = [_rotation(1, sign * quarter) @ turned for sign in (1, -1)]
    return torch.stack([*about_x, *about_y]).to(dtype)


def _rotation(axis: int, angle: float) -> Tensor:
    one, other = (axis + 1) % 3, (axis + 2) % 3
    matrix = torch.eye(3, dtype=torch.float64)
    matrix[one, one] = matrix[other, other] = math.cos(angle)
    matrix[one, other], matrix[other, one] = -math.sin(angle), math.sin(angle)
    return matrix.round(decimals=12)


def projected(points: Tensor, shift: float, height: float, width: float) -> Tensor:
    """Where points (B, T, 3) fall on the images of six views, (B, 6, T, 2) as (column, row) in pixels.

    A pinhole looks along z from `shift` on it; what falls beside the image comes in on its other side.
    """
    rotated = torch.einsum("btc,vcd->bvtd", points, views(points.dtype).to(points.device))
    depth = rotated[..., 2] - shift
    column = (rotated[..., 0] / depth + 1) * (width / 2)
    row = (rotated[..., 1] / depth + 1) * (height / 2)
    return torch.stack([column % width, row % height], -1)


def positions_at(table: Tensor, places: Tensor, height: float, width: float) -> Tensor:
    """A grid's positions (h, w, C) at pixels (B, V, T, 2), bilinear, zeros beyond: (B, V, T, C)."""
    scale = places.new_tensor([width - 1, height - 1])
    grid = 2 * places / scale - 1
    maps = table.movedim(-1, 0)[None].to(places.dtype).expand(len(places), -1, -1, -1)
    found = F.grid_sample(maps, grid, mode="bilinear", align_corners=True)  # (B, C, V, T)
    return found.permute(0, 2, 3, 1)


def along_line(points: Tensor, direction: tuple[float, float, float], rows: int) -> Tensor:
    """Where points (B, T, 3) fall on a line in six views, (B, 6, T) from 0 to rows − 1.

    A view's line reaches from the first of the cloud's own points along `direction` to the last.
    """
    way = torch.tensor(direction, dtype=torch.float64)
    ways = (views(torch.float64) @ (way / way.norm())).to(points)  # (6, 3)
    far = points @ ways.T  # (B, T, 6)
    low, high = far.amin(1, keepdim=True), far.amax(1, keepdim=True)
    return ((far - low) / (high - low).clamp(min=1e-6) * (rows - 1)).transpose(1, 2)


def rows_at(table: Tensor, places: Tensor) -> Tensor:
    """Rows of a table (L, C) at places (…) from 0 to L − 1, linear between two of them: (…, C)."""
    low = places.detach().floor().clamp(0, max(len(table) - 2, 0)).long()
    share = (places - low)[..., None]
    table = table.to(places.dtype)
    return table[low] * (1 - share) + table[(low + 1).clamp(max=len(table) - 1)] * share


def together(cells: Tensor) -> Tensor:
    """Which tokens share a cell: bool (…, T, T) of whole numbers (…, T, axes)."""
    return (cells[..., :, None, :] == cells[..., None, :, :]).all(-1)


def first_of(same: Tensor) -> Tensor:
    """The first token that shares a token's cell (…, T), of bool (…, T, T)."""
    return same.int().argmax(-1)


def region_mean(x: Tensor, first: Tensor) -> Tensor:
    """Means (B, T, C) over regions, each at its first token; zeros elsewhere."""
    where = first[..., None].expand_as(x)
    return torch.zeros_like(x).scatter_reduce(1, where, x, "mean", include_self=False)


def region_max(x: Tensor, first: Tensor) -> Tensor:
    """Maxima (B, T, C) over regions, each at its first token; zeros elsewhere."""
    where = first[..., None].expand_as(x)
    return torch.zeros_like(x).scatter_reduce(1, where, x, "amax", include_self=False)
