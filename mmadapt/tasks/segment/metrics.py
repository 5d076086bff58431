"""Overlap and surface distances, with a meaning where a mask is empty."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch

from mmadapt.errors import DataError, MissingDependencyError


def dice(prediction: Any, truth: Any) -> float:
    """2·|P ∩ T| / (|P| + |T|) of two binary masks of one shape; both empty: 1."""
    p, t = _masks(prediction, truth)
    size = int(p.sum()) + int(t.sum())
    return 2.0 * int((p & t).sum()) / size if size else 1.0


def hausdorff(
    prediction: Any,
    truth: Any,
    spacing: Sequence[float] | None = None,
    percentile: float = 95.0,
    far: float = math.inf,
) -> float:
    """The distance between two surfaces, at a percentile of all points' distances (HD95).

    Masks (H, W) or (D, H, W); `spacing` in mm for each axis, 1 without. Both empty: 0; one empty:
    `far`, for example the diagonal of the volume.
    """
    p, t = _masks(prediction, truth)
    if not p.any() or not t.any():
        return far if p.any() or t.any() else 0.0
    compute, lengths = _monai().compute_hausdorff_distance, _spacing(p, spacing)
    with _unheeded():
        found = compute(
            _rows(p), _rows(t), include_background=True, percentile=percentile, spacing=lengths
        )
    return float(found)


def surface_dice(
    prediction: Any, truth: Any, tolerance: float, spacing: Sequence[float] | None = None
) -> float:
    """The share of both surfaces within `tolerance` (mm) of the other one (NSD).

    Both empty: 1; one empty: 0.
    """
    p, t = _masks(prediction, truth)
    if not p.any() or not t.any():
        return float(not (p.any() or t.any()))
    compute, lengths = _monai().compute_surface_dice, _spacing(p, spacing)
    with _unheeded():
        found = compute(_rows(p), _rows(t), [tolerance], include_background=True, spacing=lengths)
    return float(found)


@dataclass(frozen=True)
class Summary:
    """One metric over many cases; `missed` counts those in which the object was not found at all."""

    mean: float
    median: float
    count: int
    missed: int


def summary(values: Sequence[float], miss: float = 0.0) -> Summary:
    """Mean, median, count and misses; a value equal to `miss` is one: 0 for overlaps, `far` for distances.

    Misses are part of mean and median, so that a mean of distances is infinite rather than perfect.
    Raises `DataError` for an empty list or values that are no numbers.
    """
    array = numpy.asarray(values, dtype=numpy.float64)
    if array.ndim != 1 or not len(array) or numpy.isnan(array).any():
        raise DataError(
            f"{array.size} values of shape {array.shape} cannot be summarised, or are not numbers",
            "give one number for every case",
        )
    missed = int((array == miss).sum())
    return Summary(float(array.mean()), float(numpy.median(array)), len(array), missed)


def _masks(prediction: Any, truth: Any) -> tuple[numpy.ndarray, numpy.ndarray]:
    found = []
    for name, mask in (("prediction", prediction), ("truth", truth)):
        array = numpy.asarray(mask.detach().cpu() if isinstance(mask, torch.Tensor) else mask)
        if array.dtype != bool and not numpy.isin(array, (0, 1)).all():
            raise DataError(
                f"the {name} holds values from {array.min():g} to {array.max():g}, expected a binary "
                "mask",
                "logits > 0 is one, labels == 2 another",
            )
        found.append(array.astype(bool))
    if found[0].shape != found[1].shape:
        raise DataError(f"the prediction is {found[0].shape}, the truth {found[1].shape}")
    return found[0], found[1]


def _rows(mask: numpy.ndarray) -> torch.Tensor:
    if mask.ndim not in (2, 3):
        raise DataError(f"a mask of shape {mask.shape} has no surface", "give (H, W) or (D, H, W)")
    return torch.from_numpy(mask)[None, None]


def _spacing(mask: numpy.ndarray, spacing: Sequence[float] | None) -> list[float]:
    values = [1.0] * mask.ndim if spacing is None else [float(value) for value in spacing]
    if len(values) != mask.ndim or not all(0 < value < math.inf for value in values):
        raise DataError(
            f"spacing is {spacing!r} for a mask {mask.shape}, expected {mask.ndim} lengths above 0"
        )
    return values


@contextlib.contextmanager
def _unheeded() -> Iterator[None]:
    """Without what one part of MONAI warns another part of; its callers cannot heed it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*always_return_as_numpy", FutureWarning)
        yield


def _monai() -> Any:
    try:
        from monai import metrics
    except ImportError as error:
        raise MissingDependencyError(
            f"distances between surfaces need MONAI, which cannot be imported: {error}",
            "pip install 'mmadapt[medical]'",
        ) from error
    return metrics
