"""A volume: values on a grid in the body, and how they came there from the original."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from mmadapt.core.figure import img, png
from mmadapt.errors import DataError
from mmadapt.tasks.segment.intensity import check_finite, intensity_range
from mmadapt.tasks.volume.grid import Grid, oriented_affine, regrid
from mmadapt.tasks.volume.stored import Stored


@dataclass(frozen=True, eq=False)
class Step:
    """One thing done to a volume: its name, the grid before it, and of a window its range or name."""

    name: str
    before: Grid
    window: str | tuple[float, float] | None = None


@dataclass(frozen=True, eq=False)
class Volume:
    """Values float32 (C, D, H, W), indexed [channel, z, y, x], and where they lie.

    The affine (4, 4) takes (x, y, z, 1) to millimetres (right, anterior, superior), as nibabel's
    does. Nothing is changed in place: each step gives another volume that remembers the original
    grid, so that `back` takes a mask there. An array (D, H, W) gets a channel; other types and byte
    orders become float32. NaN and infinite values are refused.
    """

    array: Any
    affine: numpy.ndarray
    history: tuple[Step, ...] = ()
    name: str = "volume"

    def __post_init__(self) -> None:
        object.__setattr__(self, "array", _as_values(self.array))
        grid = Grid(self.array.shape[1:], self.affine)
        object.__setattr__(self, "affine", grid.affine)
        object.__setattr__(self, "_grid", grid)

    @property
    def grid(self) -> Grid:
        """Where the voxels lie now."""
        return self._grid  # type: ignore[attr-defined]

    @property
    def original(self) -> Grid:
        """Where they lay in the file: what prompts are named in, and masks are saved on."""
        return self.history[0].before if self.history else self.grid

    @property
    def size(self) -> tuple[int, int, int]:
        """(D, H, W)."""
        return self.grid.size

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Millimetres between voxels along (z, y, x)."""
        return self.grid.spacing

    @property
    def orientation(self) -> str:
        """Where x, y and z lead, in nibabel's letters: "RAS", "LPS", …"""
        return self.grid.orientation

    def window(self, low: float | str, high: float | None = None) -> Volume:
        """Values from `low` to `high`, or of a named window, brought to 0–1 and the rest cut off.

        Names are those of `segment.WINDOWS` and `segment.PERCENTILES`.
        """
        if isinstance(self.array, Stored):
            values = self.array.windowed(low, high)
        else:
            bottom, top = intensity_range(self.array, low, high)
            values = ((self.array - bottom) * (1 / (top - bottom))).clip(0, 1)
        named = low if isinstance(low, str) else (float(low), float(high))  # type: ignore[arg-type]
        name = low if isinstance(low, str) else f"{low:g} to {high:g}"
        step = Step(f"window {name}", self.grid, named)
        return Volume(values, self.affine, (*self.history, step), self.name)

    def resample(self, spacing: float | Sequence[float]) -> Volume:
        """The same extent at another spacing in millimetres, one number or (z, y, x), linearly.

        Fine detail is not smoothed before it is thinned out.
        """
        wanted = numpy.broadcast_to(numpy.asarray(spacing, dtype=numpy.float64), 3)
        if not (numpy.isfinite(wanted).all() and wanted.min() > 0):
            raise DataError(f"spacing is {spacing!r}, expected millimetres above 0, or (z, y, x)")
        scale = wanted / self.spacing
        size = [max(1, round(n / s)) for n, s in zip(self.size, scale, strict=True)]
        affine = self.affine.copy()
        affine[:3, :3] *= scale[::-1]
        affine[:3, 3] = self.grid.to_mm((scale - 1) / 2)[0]  # the outer corner stays
        name = "×".join(f"{s:.4g}" for s in wanted)
        return self._onto(f"resample {name} mm", Grid(tuple(size), affine))  # type: ignore[arg-type]

    def oriented(self, codes: str = "RAS") -> Volume:
        """Axes swapped and turned so that x, y and z lead where three letters say."""
        return self._onto(f"oriented {codes}", oriented_affine(self.grid, codes))

    def onto(self, grid: Grid) -> Volume:
        """Resampled, linearly, at the voxels of another image; 0 outside of this one."""
        return self._onto("onto another grid", grid)

    def crop(self, box: Sequence[int]) -> Volume:
        """The voxels [z1:z2, y1:y2, x1:x2] of this volume, box (z1, y1, x1, z2, y2, x2)."""
        first, last = [int(v) for v in box[:3]], [int(v) for v in box[3:]]
        inside = all(0 <= a < b <= n for a, b, n in zip(first, last, self.size, strict=False))
        if len(box) != 6 or not inside:
            raise DataError(
                f"the box {tuple(box)} is not within a volume of {self.size} voxels, or is empty",
                "give (z1, y1, x1, z2, y2, x2), the last of each axis not included",
            )
        (z1, y1, x1), (z2, y2, x2) = first, last
        size = [b - a for a, b in zip(first, last, strict=True)]
        values = self.array[:, z1:z2, y1:y2, x1:x2]
        return self._then(f"crop {tuple(box)}", values, self.grid.shifted(first, size).affine)

    def pad(self, size: Sequence[int], value: float | None = None) -> Volume:
        """At least `size` voxels (D, H, W), new ones after the last; `value`, else the smallest."""
        values = self._loaded("pad")
        more = [max(0, int(n) - have) for n, have in zip(size, self.size, strict=True)]
        if not any(more):
            return self
        fill = float(values.min()) if value is None else value
        padded = numpy.pad(values, [(0, 0), *((0, n) for n in more)], constant_values=fill)
        return self._then(f"pad {tuple(size)}", padded, self.affine)

    def back(self, values: Any) -> numpy.ndarray:
        """Values (…, D, H, W) on this grid, on the original one: labels nearest, floats linearly.

        Voxels that this grid does not cover get 0.
        """
        return self._between(values, self.grid, self.original, "this volume")

    def forth(self, values: Any) -> numpy.ndarray:
        """Values (…, D, H, W) on the original grid, on this one: labels nearest, floats linearly."""
        return self._between(values, self.original, self.grid, "the original image")

    def _between(self, values: Any, source: Grid, target: Grid, name: str) -> numpy.ndarray:
        array = numpy.asarray(values.detach().cpu() if hasattr(values, "detach") else values)
        if array.ndim < 3 or array.shape[-3:] != source.size:
            raise DataError(
                f"the values are {array.shape}, {name} has {source.size} voxels (z, y, x)",
                "back() takes from this grid to the original one, forth() the other way",
            )
        return regrid(array, source, target, linear=array.dtype.kind == "f")

    def _onto(self, name: str, grid: Grid) -> Volume:
        values = self._loaded(name)
        return self._then(name, regrid(values, self.grid, grid, linear=True), grid.affine)

    def _then(self, name: str, array: Any, affine: numpy.ndarray) -> Volume:
        return Volume(array, affine, (*self.history, Step(name, self.grid)), self.name)

    def _loaded(self, verb: str) -> numpy.ndarray:
        if isinstance(self.array, Stored):
            raise DataError(
                f"{self.name} stays in its file, so that it cannot be changed as a whole ({verb})",
                "crop it first, read it whole, or predict in windows",
            )
        return self.array

    def __repr__(self) -> str:
        values = self.array if isinstance(self.array, numpy.ndarray) else None
        shown = "in its file" if values is None else f"{values.min():g} to {values.max():g}"
        steps = "".join(f", {step.name}" for step in self.history)
        return f"Volume({self.name}: {len(self.array)}×{self.grid}, {shown}{steps})"

    def figure(self, at: Any = None, **options: Any) -> Any:
        """Three planes through one voxel, as a matplotlib figure: see `planes_figure`."""
        from mmadapt.tasks.volume.figure import planes_figure

        return planes_figure(self, at, **options)

    def _repr_html_(self) -> str:
        said = f"<code>{html.escape(repr(self))}</code>"
        if isinstance(
            self.array, Stored
        ):  # compressed files take seconds for a plane across slices
            return (
                f"<div>{said}</div><div><small>.figure() reads and draws three planes</small></div>"
            )
        return f"<div>{said}</div>" + img(png(self.figure(), 70), f"three planes of {self.name}")


def _as_values(array: Any) -> Any:
    if isinstance(array, Stored):
        return array
    if hasattr(array, "detach"):
        array = array.detach().cpu()
    values = numpy.asarray(array)
    if values.dtype.kind not in "buif":
        raise DataError(
            f"the values are of type {values.dtype}, expected numbers",
            "a coloured voxel is no number: choose a channel",
        )
    if values.ndim == 3:
        values = values[None]
    if values.ndim != 4 or 0 in values.shape:
        raise DataError(
            f"the values are {values.shape}, expected (C, D, H, W) or (D, H, W)",
            "of a series over time take one time",
        )
    check_finite(values)
    return numpy.ascontiguousarray(values, dtype=numpy.float32)
