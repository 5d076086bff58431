"""Clouds as Any2Point takes them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmadapt.errors import DataError


def unit_clouds(points: Any) -> Tensor:
    """Clouds (B, N, 3) or one (N, 3), each moved to its mean and divided by its largest distance from it.

    Anything `torch.as_tensor` takes, in any unit; floats keep their type, whole numbers become
    float32. Raises `DataError` for other shapes, for values that are no numbers and for clouds whose
    points all coincide.
    """
    clouds = torch.as_tensor(points)
    if clouds.ndim not in (2, 3) or clouds.shape[-1] != 3 or not clouds.shape[-2]:
        raise DataError(
            f"the points are {tuple(clouds.shape)}, expected (N, 3) or (B, N, 3)",
            "only x, y and z are read: points[..., :3] leaves colours and normals out",
        )
    clouds = clouds if clouds.is_floating_point() else clouds.float()
    strange = ~clouds.isfinite()
    if strange.any():
        first = tuple(strange.nonzero()[0].tolist())
        raise DataError(
            f"{int(strange.sum())} coordinates are NaN or infinite, the first at {first}",
            "leave those points out: points[points.isfinite().all(-1)]",
        )
    centred = clouds - clouds.mean(-2, keepdim=True)
    farthest = centred.norm(dim=-1).amax(-1)
    if not (farthest > 0).all():
        raise DataError(
            "all points of a cloud coincide, so it has no size to divide by", "leave it out"
        )
    return centred / farthest[..., None, None]
