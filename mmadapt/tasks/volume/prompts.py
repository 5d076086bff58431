"""Points, boxes and masks in a volume, and clicks drawn from masks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy

from mmadapt.errors import DataError, did_you_mean
from mmadapt.tasks.volume.grid import Grid


class Point(NamedTuple):
    """A voxel of the original image, as its array is indexed: [z, y, x]."""

    z: float
    y: float
    x: float


class Box(NamedTuple):
    """The voxels [z1:z2, y1:y2, x1:x2] of the original image; the last ones are not included."""

    z1: float
    y1: float
    x1: float
    z2: float
    y2: float
    x2: float


STRATEGIES = ("random", "centroid", "iterative")


def from_mask(
    mask: Any, n: int = 1, strategy: str = "random", seed: int = 0
) -> tuple[list[Point], list[int]]:
    """`n` clicks on the object of a mask (D, H, W), and their labels, all 1.

    "random": different voxels, each as likely; "centroid": in each of the `n` largest connected
    parts the voxel nearest to its centre; "iterative": the voxel deepest inside, then the deepest in
    what is farther from it than the surface was, and so on, ties drawn. The same `seed` draws the
    same. Raises `DataError` for an empty mask, one of several labels, or one too small for `n`.
    """
    array = check_mask(mask, "mask")
    draw = numpy.random.default_rng(seed)
    if strategy not in STRATEGIES:
        raise DataError(f"no strategy is named {strategy!r}", did_you_mean(strategy, STRATEGIES))
    if not array.any():
        raise DataError(
            "the mask is empty, so that no click falls on its object",
            "leave the case out, or give a click labelled 0 anywhere",
        )
    if n < 1 or int(array.sum()) < n:
        raise DataError(f"{n} clicks were asked for, the mask has {int(array.sum())} voxels")
    if strategy == "random":
        inside = numpy.argwhere(array)
        found = inside[draw.choice(len(inside), n, replace=False)]
    elif strategy == "centroid":
        found = _centroids(array, n)
    else:
        found = _deepest(array, n, draw)
    return [Point(*map(float, voxel)) for voxel in found], [1] * n


def next_click(prediction: Any, truth: Any, seed: int = 0) -> tuple[Point, int] | None:
    """Where a reader would click next: deep inside the largest error, label 1 where the object was
    missed and 0 beside it; None where nothing is wrong. Masks bool (D, H, W)."""
    own, true = check_mask(prediction, "prediction"), check_mask(truth, "truth")
    if own.shape != true.shape:
        raise DataError(f"the prediction is {own.shape}, the truth {true.shape}")
    parts = [(size, part, 1) for size, part in _parts(true & ~own)[:1]]
    parts += [(size, part, 0) for size, part in _parts(own & ~true)[:1]]
    if not parts:
        return None
    _, part, label = max(parts, key=lambda found: found[0])
    voxel = _deepest(part, 1, numpy.random.default_rng(seed))[0]
    return Point(*map(float, voxel)), label


def box_of(mask: Any, margin: int = 0) -> Box:
    """The smallest box around the object of a mask (D, H, W), `margin` voxels wider on each side."""
    array = check_mask(mask, "mask")
    if not array.any():
        raise DataError("the mask is empty, so that no box holds its object")
    voxels = numpy.argwhere(array)
    first = (voxels.min(0) - margin).clip(0)
    last = numpy.minimum(voxels.max(0) + 1 + margin, array.shape)
    return Box(*map(float, first), *map(float, last))


def check_points(points: Any, labels: Any, grid: Grid) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Points (N, 3) as (z, y, x) within the grid and labels (N,) of 0 and 1, or a `DataError`."""
    array = numpy.asarray(points, dtype=numpy.float64)
    if array.ndim == 1 and array.shape == (3,):
        array = array[None]
    if array.ndim != 2 or array.shape[1] != 3 or not len(array):
        raise DataError(f"the points are of shape {array.shape}, expected (N, 3), each (z, y, x)")
    for place, point in enumerate(array):
        beyond = numpy.maximum(-0.5 - point, point - numpy.array(grid.size) + 0.5)
        if not (beyond <= 0).all():  # a NaN fails too
            far = numpy.linalg.norm(beyond.clip(0) * grid.spacing)
            swapped = (point[::-1] >= -0.5).all() and (point[::-1] < numpy.array(grid.size)).all()
            raise DataError(
                f"point {place} has (z, y, x) = ({', '.join(f'{v:g}' for v in point)}), {far:.4g} mm "
                f"outside of an image of {grid.size} voxels (D, H, W)",
                "the order is (z, y, x)" + (", here it looks like (x, y, z)" if swapped else "")
                + ", in voxels of the original image",
            )  # fmt: skip
    if labels is None:
        raise DataError(f"{len(array)} points have no labels", "1 is the object, 0 beside it")
    kinds = numpy.atleast_1d(numpy.asarray(labels))
    if kinds.shape != (len(array),):
        raise DataError(f"the labels are of shape {kinds.shape}, expected ({len(array)},)")
    wrong = [value for value in kinds.tolist() if value not in (0, 1)]
    if wrong:
        raise DataError(f"label {wrong[0]!r} means nothing", "1 is the object, 0 beside it")
    return array, kinds.astype(numpy.int64)


def check_box(box: Any, grid: Grid) -> Box:
    """A box within the grid that holds at least part of a voxel, or a `DataError`."""
    values = numpy.asarray(box, dtype=numpy.float64)
    if values.shape != (6,):
        raise DataError(f"the box is of shape {values.shape}, expected (z1, y1, x1, z2, y2, x2)")
    first, last = values[:3], values[3:]
    if not ((first >= 0) & (first < last) & (last <= grid.size)).all():
        raise DataError(
            f"the box {tuple(values.tolist())} is not within {grid.size} voxels, or is reversed or "
            "empty",
            "(z1, y1, x1, z2, y2, x2) with the smaller corner first, in voxels of the original image",
        )
    return Box(*values.tolist())


def moved_points(points: numpy.ndarray, source: Grid, target: Grid) -> numpy.ndarray:
    """Voxels (N, 3) of one grid in those of another, fractions kept."""
    return target.to_voxel(source.to_mm(points))


def moved_box(box: Box, source: Grid, target: Grid) -> Box:
    """A box of one grid in another: the smallest around its corners, cut off at the edges."""
    ends = numpy.array([box[:3], box[3:]]) - 0.5  # from voxels to the faces between them
    corners = numpy.array(
        [[ends[i, 0], ends[j, 1], ends[k, 2]] for i, j, k in numpy.ndindex(2, 2, 2)]
    )
    found = moved_points(corners, source, target) + 0.5
    low, high = found.min(0).clip(0), numpy.minimum(found.max(0), target.size)
    return Box(*low.tolist(), *high.tolist())


def check_mask(mask: Any, name: str) -> numpy.ndarray:
    """A mask as bool (D, H, W); a `DataError` names the labels of one that has several."""
    array = numpy.asarray(mask.detach().cpu() if hasattr(mask, "detach") else mask)
    if array.ndim != 3:
        raise DataError(f"the {name} is {array.shape}, expected (D, H, W)")
    if array.dtype != bool and not numpy.isin(array, (0, 1)).all():
        values = numpy.unique(array)
        shown = ", ".join(f"{value:g}" for value in values[:8]) + (" …" if len(values) > 8 else "")
        raise DataError(
            f"the {name} holds the values {shown}, expected one object",
            f"choose one: {name} == {values[-1]:g}",
        )
    return array.astype(bool)


def _parts(mask: numpy.ndarray) -> list[tuple[int, numpy.ndarray]]:
    """Connected parts of a mask, the largest first, with their sizes."""
    from scipy.ndimage import label

    marked, _ = label(mask)  # type: ignore[misc]
    sizes = numpy.bincount(marked.ravel())[1:]
    order = numpy.argsort(-sizes, kind="stable")
    return [(int(sizes[i]), marked == i + 1) for i in order[:64]]


def _centroids(mask: numpy.ndarray, n: int) -> Iterable[numpy.ndarray]:
    parts = _parts(mask)
    if len(parts) < n:
        raise DataError(
            f"{n} centres were asked for, the mask has {len(parts)} connected parts",
            "strategy='iterative' spreads several clicks over one part",
        )
    for _, part in parts[:n]:
        voxels = numpy.argwhere(part)
        yield voxels[((voxels - voxels.mean(0)) ** 2).sum(1).argmin()]


def _deepest(mask: numpy.ndarray, n: int, draw: numpy.random.Generator) -> list[numpy.ndarray]:
    from scipy.ndimage import distance_transform_edt

    voxels = numpy.argwhere(mask)
    depth: Any = distance_transform_edt(numpy.pad(mask, 1))
    depth = depth[1:-1, 1:-1, 1:-1][mask]
    found = []
    for _ in range(n):
        best = voxels[draw.choice(numpy.flatnonzero(depth >= depth.max() - 1e-9))]
        found.append(best)
        away = numpy.linalg.norm(voxels - best, axis=1)
        depth = numpy.minimum(depth, away)
    return found
