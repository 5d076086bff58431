"""Three planes through a volume, with letters, millimetres and masks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy

from mmadapt.core.figure import TINTS, drawn, new_figure
from mmadapt.errors import DataError
from mmadapt.tasks.volume.planes import PLANES, Plane
from mmadapt.tasks.volume.prompts import check_points
from mmadapt.tasks.volume.volume import Volume


@drawn
def planes_figure(
    volume: Volume,
    at: Any = None,
    mask: Any = None,
    names: Mapping[int, str] | None = None,
    alpha: float = 0.35,
    limits: tuple[float, float] | None = None,
) -> Any:
    """A matplotlib `Figure`: axial, coronal and sagittal slices through one voxel.

    `at` is (z, y, x) in the volume as it is now, else the middle of the mask's largest label or of
    the volume. `mask` holds labels (D, H, W) on the volume's grid, filled with share `alpha` and
    outlined. Greys run from `limits`, else from the 0.5 to the 99.5 percentile of what is drawn;
    of a file only these planes are read. Each plane tells its slice's number and place in millimetres, its orientation by letters at the edges, and has the
    proportions of the body. Oblique volumes are drawn along their own axes, with the nearest letters.
    """
    labels = None if mask is None else _labels(mask, volume)
    point = _point(volume, at, labels)
    panels = [Plane(volume, *plane) for plane in PLANES]
    pictures = [panel.cut(volume.array, point) for panel in panels]
    seen = numpy.concatenate([picture.ravel() for picture in pictures])
    low, high = limits or (float(v) for v in numpy.percentile(seen, (0.5, 99.5)))
    scale = 9.0 / sum(panel.width for panel in panels)  # inches a millimetre
    tallest = max(panel.height for panel in panels) * scale
    figure = new_figure(10.5, min(max(tallest, 0.8), 9) + 1.3)
    figure.get_layout_engine().set(wspace=0.06)  # type: ignore[union-attr]
    grid = figure.subplots(1, 3, width_ratios=[panel.width for panel in panels])
    for axes, panel, picture in zip(grid, panels, pictures, strict=True):
        extent = (0, panel.width, 0, panel.height)
        axes.imshow(picture, "gray", vmin=low, vmax=max(high, low + 1e-9), extent=extent, origin="lower", interpolation="nearest")  # fmt: skip
        if labels is not None:
            _overlay(axes, panel.cut(labels[None], point), extent, alpha)
        _crosshair(axes, panel, point)
        _letters(axes, panel)
        axes.set_title(panel.title(point), pad=18)
        axes.set_axis_off()
    figure.suptitle(f"{volume.name}   {volume.grid}", fontsize=9)
    if labels is not None and labels.any():
        _legend(figure, labels, names)
    return figure


def _overlay(axes: Any, labels: numpy.ndarray, extent: Any, alpha: float) -> None:
    from matplotlib.colors import to_rgba

    for label in numpy.unique(labels[labels > 0]):
        colour = _colour(label)
        own = labels == label
        layer = numpy.zeros((*own.shape, 4))
        layer[own] = to_rgba(colour, alpha)
        axes.imshow(layer, extent=extent, origin="lower", interpolation="nearest")
        # every voxel as 4 × 4, within a rim, so that the outline follows voxels' edges
        fine = numpy.pad(own.repeat(4, 0).repeat(4, 1), 1).astype(float)
        across = numpy.linspace(extent[0], extent[1], fine.shape[1] - 1)
        upwards = numpy.linspace(extent[2], extent[3], fine.shape[0] - 1)
        half = (across[1] - across[0]) / 2, (upwards[1] - upwards[0]) / 2
        xs = numpy.concatenate(
            [[across[0] - half[0]], across[:-1] + half[0], [across[-1] + half[0]]]
        )
        ys = numpy.concatenate([[upwards[0] - half[1]], upwards[:-1] + half[1], [upwards[-1] + half[1]]])  # fmt: skip
        axes.contour(xs, ys, fine, levels=[0.5], colors="black", linewidths=2.2)
        axes.contour(xs, ys, fine, levels=[0.5], colors=colour, linewidths=1.2)


def _crosshair(axes: Any, panel: Plane, point: tuple[int, int, int]) -> None:
    from matplotlib.patheffects import withStroke

    x, y = panel.place(point)
    gap = 0.06 * max(panel.width, panel.height)
    dark = withStroke(linewidth=1.6, foreground="black", alpha=0.5)
    style: Any = {"color": "white", "linewidth": 0.6, "path_effects": [dark]}
    for low, high in ((0, x - gap), (x + gap, panel.width)):
        if high > low:
            axes.plot([low, high], [y, y], **style)
    for low, high in ((0, y - gap), (y + gap, panel.height)):
        if high > low:
            axes.plot([x, x], [low, high], **style)
    axes.set_xlim(0, panel.width)
    axes.set_ylim(0, panel.height)


def _letters(axes: Any, panel: Plane) -> None:
    (left, right), (top, bottom) = panel.letters
    for at, letter, offset, across, upwards in (
        ((0, 0.5), left, (-4, 0), "right", "center"),
        ((1, 0.5), right, (4, 0), "left", "center"),
        ((0.5, 1), top, (0, 4), "center", "bottom"),
        ((0.5, 0), bottom, (0, -4), "center", "top"),
    ):
        axes.annotate(letter, at, offset, "axes fraction", "offset points", fontweight="bold", fontsize=10, ha=across, va=upwards)  # fmt: skip


def _legend(figure: Any, labels: numpy.ndarray, names: Mapping[int, str] | None) -> None:
    from matplotlib.patches import Patch

    present = [int(label) for label in numpy.unique(labels[labels > 0])]
    handles = [
        Patch(
            facecolor=_colour(label), edgecolor="black", label=(names or {}).get(label, str(label))
        )
        for label in present
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(present))


def _colour(label: int) -> str:
    return TINTS[(int(label) - 1) % len(TINTS)]


def _point(volume: Volume, at: Any, labels: numpy.ndarray | None) -> tuple[int, int, int]:
    if at is not None:
        found = check_points(at, [1], volume.grid)[0][0]
    elif labels is not None and labels.any():
        largest = int(numpy.bincount(labels[labels > 0].ravel()).argmax())
        voxels = numpy.argwhere(labels == largest)
        found = voxels[((voxels - voxels.mean(0)) ** 2).sum(1).argmin()]
    else:
        found = numpy.array(volume.size) // 2
    z, y, x = (int(v) for v in numpy.minimum(numpy.rint(found), numpy.array(volume.size) - 1))
    return z, y, x


def _labels(mask: Any, volume: Volume) -> numpy.ndarray:
    array = numpy.asarray(mask.detach().cpu() if hasattr(mask, "detach") else mask)
    if array.dtype.kind not in "bui" or array.shape != volume.size:
        raise DataError(
            f"the mask is {array.dtype} {array.shape}, expected whole numbers of {volume.size}",
            "volume.forth(mask) brings one from the original grid",
        )
    return array.astype(numpy.int32)
