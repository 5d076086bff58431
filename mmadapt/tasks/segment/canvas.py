"""The pieces that pictures of masks are made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy

from mmadapt.core.figure import TINTS, new_figure
from mmadapt.tasks.segment.prompts import check_prompts


def grid(rows: int, columns: int, inches: float, ratio: float) -> tuple[Any, Any]:
    """A figure of axes that are `inches` wide and `ratio` times as high."""
    figure = new_figure(inches * columns + 0.2, (inches * ratio + 0.28) * rows + 0.2)
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03, wspace=0, hspace=0)  # type: ignore[union-attr]
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
    return figure, grid


def draw(
    axes: Any,
    picture: numpy.ndarray,
    masks: numpy.ndarray,
    limits: tuple[float, float] | None,
    aspect: float = 1.0,
    colours: Sequence[str] = TINTS,
) -> None:
    """The picture, and every mask as a tint with an outline."""
    from matplotlib.colors import to_rgb

    low, high = limits or (None, None)
    axes.imshow(picture, cmap="gray", vmin=low, vmax=high, aspect=aspect, interpolation="nearest")
    for place, mask in enumerate(masks):
        colour = colours[place % len(colours)]
        tint = numpy.zeros((*mask.shape, 4))
        tint[mask] = (*to_rgb(colour), 0.35)
        axes.imshow(tint, aspect=aspect, interpolation="nearest")
        outline(axes, mask, colour, "-")


def outline(
    axes: Any,
    mask: numpy.ndarray,
    colour: str,
    style: str,
    behind: str = "",
    width: float = 1.4,
) -> None:
    """Along the edges of the mask's pixels, also where the picture ends."""
    if not mask.any():
        return
    wide = numpy.repeat(numpy.repeat(numpy.pad(mask, 1), 4, 0), 4, 1)
    places = [(numpy.arange(4 * n) + 0.5) / 4 - 1.5 for n in numpy.array(mask.shape) + 2]
    for line, kind, thick in ((behind, "-", 1.6 * width), (colour, style, width)):
        if line:
            axes.contour(
                *places[::-1], wide, [0.5], colors=[line], linestyles=[kind], linewidths=[thick]
            )
    axes.set(xlim=(-0.5, mask.shape[1] - 0.5), ylim=(mask.shape[0] - 0.5, -0.5))


def prompts(
    axes: Any, size: tuple[int, ...], points: Any, labels: Any, box: Any, scale: int = 140
) -> None:
    """A plus on the object, a cross beside it, and the box."""
    from matplotlib.patches import Rectangle

    if points is None and labels is None and box is None:
        return
    prompts = check_prompts((size[0], size[1]), points, labels, box)
    if prompts.points is not None and prompts.labels is not None:
        for label, marker, face, edge in ((1, "P", "white", "black"), (0, "X", "black", "white")):
            own = prompts.points[prompts.labels == label]
            if len(own):
                axes.scatter(
                    *own.T,
                    marker=marker,
                    s=scale,
                    c=face,
                    edgecolors=edge,
                    linewidths=1.2,
                    zorder=5,
                )
    if prompts.box is not None:
        x1, y1, x2, y2 = prompts.box
        for colour, style in (("black", "-"), ("white", "--")):
            axes.add_patch(
                Rectangle(
                    (x1, y1), x2 - x1, y2 - y1, fill=False, ec=colour, ls=style, lw=1.6, zorder=4
                )
            )


def legend(figure: Any, names: Sequence[str] | None) -> None:
    """What each colour means, below."""
    from matplotlib.patches import Patch

    if names:
        handles = [
            Patch(facecolor=TINTS[i % len(TINTS)], label=name) for i, name in enumerate(names)
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=min(len(names), 6))


def frame(axes: Any) -> None:
    """A frame around one of several pictures."""
    for spine in axes.spines.values():
        spine.set(visible=True, linewidth=2.5, color=TINTS[-1])
