"""How every figure looks: one palette, one style, one way to draw a grid of numbers.

The colours are those of Okabe and Ito (2008), which colour-blind readers can tell apart. Figures
have a white ground of their own, so that they are legible on dark pages too. Nothing is imported
from matplotlib before something is drawn.
"""

from __future__ import annotations

import base64
import functools
import html
import io
import math
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

BLUE, SKY, GREEN, YELLOW = "#0072B2", "#56B4E9", "#009E73", "#F0E442"
ORANGE, VERMILION, PINK = "#E69F00", "#D55E00", "#CC79A7"
#: text and axes; baselines and what is compared with; helping lines
INK, GREY, FAINT = "#1c2330", "#8a94a3", "#d5dae1"

#: lines and bars, on white
LINES = (BLUE, VERMILION, GREEN, PINK, ORANGE, SKY)
#: areas over pictures in grey, bright ones first
TINTS = (ORANGE, SKY, PINK, GREEN, YELLOW, BLUE, VERMILION)

#: colour maps: of shares and other amounts, of numbers with a sign, of spectra and heat
AMOUNT, SIGNED, HEAT = "Blues", "RdBu_r", "magma"


def _style() -> dict[str, Any]:
    from cycler import cycler

    return {
        "axes.edgecolor": GREY,
        "axes.facecolor": "white",
        "axes.labelcolor": INK,
        "axes.labelsize": 9,
        "axes.linewidth": 0.8,
        "axes.prop_cycle": cycler(color=LINES),
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlecolor": INK,
        "axes.titlesize": 9,
        "figure.facecolor": "white",
        "figure.titlesize": 10,
        "font.size": 9,
        "legend.fontsize": 8,
        "legend.frameon": False,
        "lines.linewidth": 1.2,
        "savefig.facecolor": "auto",
        "text.color": INK,
        "xtick.color": INK,
        "xtick.labelsize": 8,
        "ytick.color": INK,
        "ytick.labelsize": 8,
    }


def drawn(draw: Callable[P, R]) -> Callable[P, R]:
    """A function that draws in the common style, whatever the user's own matplotlib style is."""

    @functools.wraps(draw)
    def in_style(*args: P.args, **kwargs: P.kwargs) -> R:
        from matplotlib import rc_context

        with rc_context(_style()):  # type: ignore[arg-type]
            return draw(*args, **kwargs)

    return in_style


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib `Figure`, in inches, that a notebook shows without any magic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    # IPython draws figures itself only where pyplot was imported
    figure._repr_png_ = functools.partial(png, figure)  # type: ignore[attr-defined]
    return figure


def png(figure: Any, dpi: int = 110) -> bytes:
    """A figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def img(data: bytes, alt: str) -> str:
    """A PNG as HTML that needs nothing beside it, with words for those who cannot see it."""
    source = base64.b64encode(data).decode()
    style = "max-width:100%"
    return f'<img style="{style}" alt="{html.escape(alt)}" src="data:image/png;base64,{source}">'


def cells(
    axes: Any,
    values: Any,
    rows: Sequence[str] = (),
    columns: Sequence[str] = (),
    label: str = "",
    limits: tuple[float | None, float | None] = (None, None),
    colours: str = AMOUNT,
    write: str = "",
    least: float = -math.inf,
    slant: float = 0,
) -> Any:
    """A grid of numbers (R, C) as coloured cells with a scale, written out by the format `write`.

    Numbers below `least` are not written, nor are NaN, nor those of more than 400 cells. Returns the
    image.
    """
    import numpy

    array = numpy.asarray(values, float)
    low, high = limits
    image = axes.imshow(array, colours, vmin=low, vmax=high, aspect="auto", interpolation="nearest")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    for names, set_ticks, turned in (
        (rows, axes.set_yticks, {}),
        (columns, axes.set_xticks, {"rotation": slant, "ha": "right"} if slant else {}),
    ):
        if names:
            set_ticks(range(len(names)), names, **turned)
    if write and array.size <= 400:
        for place in zip(*numpy.nonzero(array >= least), strict=True):
            text = format(array[place], write)
            red, green, blue, _ = image.cmap(image.norm(array[place]))
            dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.5
            axes.text(
                place[1], place[0], text, ha="center", va="center", fontsize=7,
                color="white" if dark else INK,
            )  # fmt: skip
    bar = axes.figure.colorbar(image, ax=axes, label=label)
    bar.outline.set_visible(False)
    return image
