"""What Any2Point makes of a cloud: its centres, and where they fall on the views."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmadapt.core.figure import FAINT, GREY, INK, drawn, new_figure
from mmadapt.errors import DataError
from mmadapt.ops.points import along_line, farthest_points, pick, projected
from mmadapt.tasks.points.cloud import unit_clouds

if TYPE_CHECKING:
    from mmadapt.core.table import Table

#: of the six views, as they are numbered
TURNS = ("as it is", "x by 90°", "x by 180°", "x by 270°", "y by 90°", "y by −90°")


@drawn
def cloud_figure(
    cloud: Any,
    tokens: int = 32,
    grid: tuple[int, int] = (14, 14),
    distance: float = 1.8,
    rows: int = 77,
    direction: tuple[float, float, float] = (-1.0, 0.0, 1.0),
    title: str = "",
) -> Any:
    """A matplotlib `Figure`: one cloud (N, 3) with its centres, and where these fall on the views.

    Left the cloud with the `tokens` centres that farthest-point sampling takes. In the middle six
    virtual images of `grid` patches (rows, columns), seen through a pinhole `distance` away. Below
    six virtual lines along `direction`, on the `rows` of a text transformer's positions. A centre has
    the colour of its height everywhere, so that it can be followed.
    """
    from matplotlib.gridspec import GridSpec

    points, centres, places, lines = _seen(cloud, tokens, grid, distance, rows, direction)
    shades = centres[:, 2]
    figure = new_figure(11, 6.6)
    cells = GridSpec(3, 5, figure, height_ratios=(1, 1, 0.8), width_ratios=(1, 1, 1, 1, 1))
    axes: Any = figure.add_subplot(cells[:2, :2], projection="3d")
    axes.scatter(*points.T, s=4, color=GREY, alpha=0.5, depthshade=False)
    axes.scatter(*centres.T, s=26, c=shades, cmap="viridis", edgecolors=INK, linewidths=0.4, depthshade=False)  # fmt: skip
    axes.set(xlim=(-1, 1), ylim=(-1, 1), zlim=(-1, 1), xlabel="x", ylabel="y", zlabel="z")
    axes.set(xticks=(-1, 0, 1), yticks=(-1, 0, 1), zticks=(-1, 0, 1), box_aspect=(1, 1, 1))
    axes.tick_params(labelsize=7)
    axes.set_title(f"{len(points)} points, {tokens} centres", fontsize=10)
    for view, turn in enumerate(TURNS):
        axes = figure.add_subplot(cells[view // 3, 2 + view % 3])
        axes.scatter(*places[view].T, s=16, c=shades, cmap="viridis", edgecolors=INK, linewidths=0.3, zorder=3)  # fmt: skip
        axes.set(xlim=(0, grid[1]), ylim=(grid[0], 0), aspect="equal")
        axes.set_xticks(range(grid[1] + 1), [""] * (grid[1] + 1))
        axes.set_yticks(range(grid[0] + 1), [""] * (grid[0] + 1))
        axes.grid(color=FAINT, linewidth=0.6)
        axes.tick_params(length=0)
        axes.set_title(f"image {view + 1}: {turn}", fontsize=9)
    axes = figure.add_subplot(cells[2, :])
    for view in range(len(TURNS)):
        axes.axhline(view, color=FAINT, linewidth=0.8)
        axes.scatter(lines[view], torch.full((tokens,), view), s=14, c=shades, cmap="viridis", edgecolors=INK, linewidths=0.3, zorder=3)  # fmt: skip
    axes.set_yticks(range(len(TURNS)), [f"line {view + 1}" for view in range(len(TURNS))])
    axes.set(xlim=(-1, rows), ylim=(len(TURNS) - 0.5, -0.5))
    axes.tick_params(labelsize=8)
    axes.set_xlabel(f"row of {rows} word positions", fontsize=9)
    if title:
        figure.suptitle(title)
    return figure


def cloud_table(
    cloud: Any,
    tokens: int = 32,
    grid: tuple[int, int] = (14, 14),
    distance: float = 1.8,
    rows: int = 77,
    direction: tuple[float, float, float] = (-1.0, 0.0, 1.0),
) -> Table:
    """The same in words: of every view the patches and rows that hold centres, and the fullest ones."""
    from mmadapt.core.table import Table

    _, _, places, lines = _seen(cloud, tokens, grid, distance, rows, direction)
    table = Table(
        ("view", "patches with centres", "most in one", "rows with centres", "most in one")
    )
    for view, turn in enumerate(TURNS):
        patches, most = _counted((places[view].floor() * torch.tensor([1.0, grid[1]])).sum(-1))
        filled, fullest = _counted(lines[view].floor())
        table.rows.append((f"{view + 1}: {turn}", patches, most, filled, fullest))
    table.title = f"{tokens} centres on six images of {grid[0]} × {grid[1]} patches and six lines of {rows} rows"
    return table


def _counted(cells: Tensor) -> tuple[int, int]:
    """How many cells are filled, and how often the fullest."""
    _, counts = cells.unique(return_counts=True)
    return len(counts), int(counts.max())


def _seen(
    cloud: Any,
    tokens: int,
    grid: tuple[int, int],
    distance: float,
    rows: int,
    direction: tuple[float, float, float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Points (N, 3), centres (T, 3), their patches (6, T, 2) as (column, row), their rows (6, T)."""
    points = unit_clouds(cloud)
    if points.ndim != 2 or not 1 <= tokens <= len(points):
        raise DataError(
            f"the cloud is {tuple(points.shape)} and tokens {tokens}, expected one cloud (N, 3) of at "
            "least as many points",
            "cloud[0] takes the first of a batch",
        )
    points = points.float()[None]
    centres = pick(points, farthest_points(points, tokens))
    places = projected(centres, -distance, float(grid[0]), float(grid[1]))
    return points[0], centres[0], places[0], along_line(centres, direction, rows)[0]
