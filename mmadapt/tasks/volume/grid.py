"""Where voxels lie in the body, and values moved from one grid to another."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from mmadapt.errors import DataError

#: the two ends of each axis of the body, the negative one first
ENDS = ("LR", "PA", "IS")


@dataclass(frozen=True, eq=False)
class Grid:
    """Size (D, H, W) in voxels, and the affine (4, 4) from (x, y, z, 1) to millimetres.

    Arrays are indexed [z, y, x]; the affine takes the same voxel as (x, y, z, 1), as nibabel's does,
    and leads to right, anterior, superior (RAS+). Raises `DataError` for an affine that is singular,
    sheared or not finite.
    """

    size: tuple[int, int, int]
    affine: numpy.ndarray

    def __post_init__(self) -> None:
        affine = numpy.array(self.affine, dtype=numpy.float64)
        affine.setflags(write=False)
        object.__setattr__(self, "affine", affine)
        object.__setattr__(self, "size", tuple(int(n) for n in self.size))
        if len(self.size) != 3 or min(self.size) < 1:
            raise DataError(f"a grid of {self.size} voxels holds nothing, expected (D, H, W)")
        _check_affine(affine)

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Millimetres between voxels along (z, y, x)."""
        lengths = numpy.linalg.norm(self.affine[:3, :3], axis=0)
        z, y, x = (float(length) for length in lengths[::-1])
        return z, y, x

    @property
    def orientation(self) -> str:
        """Where x, y and z lead, three letters in nibabel's order: "RAS", "LPS", …"""
        axes = nearest_axes(self.affine)
        return "".join(
            ENDS[axis][int(self.affine[axis, column] > 0)] for column, axis in enumerate(axes)
        )

    @property
    def diagonal(self) -> float:
        """The largest distance within the grid, in millimetres."""
        return math.hypot(*(n * s for n, s in zip(self.size, self.spacing, strict=True)))

    def to_mm(self, points: Any) -> numpy.ndarray:
        """Voxels (N, 3) as (z, y, x) to millimetres (N, 3) as (right, anterior, superior)."""
        xyz = numpy.asarray(points, dtype=numpy.float64).reshape(-1, 3)[:, ::-1]
        return xyz @ self.affine[:3, :3].T + self.affine[:3, 3]

    def to_voxel(self, mm: Any) -> numpy.ndarray:
        """Millimetres (N, 3) to voxels (N, 3) as (z, y, x), fractions kept."""
        inverse = numpy.linalg.inv(self.affine)
        xyz = numpy.asarray(mm, dtype=numpy.float64) @ inverse[:3, :3].T + inverse[:3, 3]
        return xyz[:, ::-1]

    def shifted(self, start: Sequence[int], size: Sequence[int]) -> Grid:
        """The grid of voxels (z, y, x) from `start` on, of another size."""
        affine = self.affine.copy()
        affine[:3, 3] = self.to_mm(start)[0]
        return Grid(tuple(size), affine)  # type: ignore[arg-type]

    def difference(self, other: Grid) -> str:
        """In words how two grids differ by more than 1e-3 mm or a voxel; empty where they do not."""
        if self.size != other.size:
            return f"{self.size} and {other.size} voxels"
        corners = numpy.array(list(itertools.product(*((0, n - 1) for n in self.size))))
        apart = float(numpy.linalg.norm(self.to_mm(corners) - other.to_mm(corners), axis=1).max())
        return f"corners up to {apart:.3g} mm apart" if apart > 1e-3 else ""

    def __str__(self) -> str:
        size = "×".join(map(str, self.size))
        spacing = "×".join(f"{s:.4g}" for s in self.spacing)
        return f"{size} voxels (z, y, x) of {spacing} mm, {self.orientation}"


def nearest_axes(affine: numpy.ndarray) -> tuple[int, int, int]:
    """For x, y and z the axis of the body (0 left to right, 1, 2) that each follows most."""
    cosines = numpy.abs(affine[:3, :3] / numpy.linalg.norm(affine[:3, :3], axis=0))
    return max(
        itertools.permutations(range(3)),
        key=lambda axes: math.prod(float(cosines[axis, i]) for i, axis in enumerate(axes)),
    )  # type: ignore[return-value]


def oriented_affine(grid: Grid, codes: str) -> Grid:
    """The same voxels, axes swapped and turned so that x, y and z lead where `codes` says."""
    axes = [next((i for i, ends in enumerate(ENDS) if c in ends), None) for c in codes.upper()]
    if len(axes) != 3 or set(axes) != {0, 1, 2}:
        raise DataError(
            f"{codes!r} names no orientation",
            "three letters for x, y and z, one of L R, one of P A, one of I S: 'RAS', 'LPS', 'SAR'",
        )
    own = nearest_axes(grid.affine)
    size_xyz, affine = grid.size[::-1], numpy.eye(4)
    origin, sizes = grid.affine[:3, 3].copy(), []
    for place, (axis, code) in enumerate(zip(axes, codes.upper(), strict=True)):
        column = own.index(axis)  # type: ignore[arg-type]
        step = grid.affine[:3, column]
        forward = (step[axis] > 0) == (code == ENDS[axis][1])  # type: ignore[index]
        affine[:3, place] = step if forward else -step
        sizes.append(size_xyz[column])
        if not forward:
            origin += step * (size_xyz[column] - 1)
    affine[:3, 3] = origin
    return Grid(tuple(sizes[::-1]), affine)


def regrid(
    values: numpy.ndarray, source: Grid, target: Grid, linear: bool, outside: float = 0
) -> numpy.ndarray:
    """Values (…, D, H, W) on the grid `source` as they are at the voxels of `target`.

    `linear` between voxels, else the nearest one's; `outside` is given to voxels beyond the source.
    Swapped, turned, cropped and padded grids are exact.
    """
    matrix = numpy.linalg.inv(source.affine) @ target.affine
    turn, offset = matrix[2::-1, 2::-1], matrix[2::-1, 3]  # between (z, y, x)
    partner = numpy.abs(turn).argmax(1)
    rest = turn.copy()
    rest[range(3), partner] = 0
    if sorted(partner) != [0, 1, 2] or numpy.abs(rest * target.size).sum(1).max() > 1e-3:
        return _turned(values, target.size, turn, offset, linear, outside)
    for axis, other in enumerate(partner):
        at = turn[axis, other] * numpy.arange(target.size[other]) + offset[axis]
        values = _along(values, values.ndim - 3 + axis, at, linear, outside)
    lead = values.ndim - 3
    order = [lead + int(numpy.flatnonzero(partner == axis)[0]) for axis in range(3)]
    return numpy.ascontiguousarray(values.transpose(*range(lead), *order))


def _along(
    values: numpy.ndarray, axis: int, at: numpy.ndarray, linear: bool, outside: float
) -> numpy.ndarray:
    """Values at fractional places along one axis."""
    last = values.shape[axis] - 1
    whole = numpy.rint(at)
    at = numpy.where(numpy.abs(at - whole) < 1e-3, whole, at)
    beyond = (at < -0.5) | (at > last + 0.5)
    at = at.clip(0, last)
    low = numpy.floor(at if linear else at + 0.5).astype(int).clip(0, last)
    found = values.take(low, axis)
    share = at - low
    if linear and share.any():
        shape = [-1 if i == axis else 1 for i in range(values.ndim)]
        high = values.take(numpy.minimum(low + 1, last), axis)
        found = found + (high - found) * share.astype(values.dtype).reshape(shape)
    if beyond.any():
        found[(*[slice(None)] * axis, beyond)] = outside
    return found


def _turned(
    values: numpy.ndarray,
    size: tuple[int, int, int],
    turn: numpy.ndarray,
    offset: numpy.ndarray,
    linear: bool,
    outside: float,
) -> numpy.ndarray:
    """Where axes do not run in parallel: one plane of the target at a time."""
    from scipy.ndimage import map_coordinates

    flat = values.reshape(-1, *values.shape[-3:])
    last = numpy.array(flat.shape[1:])[:, None] - 1
    found = numpy.empty((len(flat), *size), values.dtype)
    plane = numpy.indices(size[1:]).reshape(2, -1)
    for z in range(size[0]):
        at = turn @ numpy.vstack([numpy.full((1, plane.shape[1]), z), plane]) + offset[:, None]
        beyond = ((at < -0.5) | (at > last + 0.5)).any(0)
        at = at.clip(0, last)
        if not linear:
            at = numpy.floor(at + 0.5).clip(0, last)
        for channel, own in enumerate(flat):
            row = map_coordinates(own, at, order=int(linear), mode="nearest")
            row[beyond] = outside
            found[channel, z] = row.reshape(size[1:])
    return found.reshape(*values.shape[:-3], *size)


def _check_affine(affine: numpy.ndarray) -> None:
    if affine.shape != (4, 4) or not numpy.isfinite(affine).all():
        raise DataError(
            f"the affine is {affine.shape} with {numpy.isnan(affine).sum()} NaN, expected finite (4, 4)"
        )
    steps = affine[:3, :3]
    lengths = numpy.linalg.norm(steps, axis=0)
    shown = ", ".join(f"{length:g}" for length in lengths)
    if not numpy.array_equal(affine[3], (0, 0, 0, 1)) or lengths.min() <= 1e-6:
        raise DataError(
            f"the affine is singular: spacing (x, y, z) of {shown} mm, last row {affine[3].tolist()}",
            "spacing must be above 0 along every axis, and the last row 0 0 0 1: repair the header",
        )
    cosines = (steps / lengths).T @ (steps / lengths)
    shear = float(numpy.abs(cosines - numpy.eye(3)).max())
    if shear > 1e-3:
        angle = math.degrees(math.acos(min(1.0, shear)))
        raise DataError(
            f"the affine is sheared: two axes stand at {angle:.1f}° instead of 90°",
            "resample the image to a right-angled grid first (nibabel.processing.conform, or the "
            "scanner's tilt correction)",
        )
