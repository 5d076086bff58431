"""Whatever a function returned, as HTML and as part of a figure."""

from __future__ import annotations

import html
import io
from typing import Any

from mmadapt.core.figure import img, png
from mmadapt.core.table import text


def as_html(value: Any) -> str:
    """A value as HTML: by its own rich form, as a picture, or as text."""
    if hasattr(value, "savefig"):
        return img(png(value), "figure")
    for form, shown in (("_repr_html_", str), ("_repr_png_", lambda data: img(data, "picture"))):
        own = getattr(value, form, None)
        found = own() if callable(own) else None
        if found:
            return shown(found)
    if isinstance(value, (list, tuple)):
        return "".join(f"<div>{as_html(one)}</div>" for one in value)
    return f'<pre style="white-space:pre-wrap">{html.escape(as_text(value))}</pre>'


def as_text(value: Any) -> str:
    """A value as text."""
    if hasattr(value, "savefig"):
        return "a figure"
    if hasattr(value, "ndim") and value.ndim == 0:
        value = value.item()
    return text(value)


def draw(axes: Any, value: Any) -> None:
    """A value within axes of a figure: a picture, or its text."""
    data: Any = png(value) if hasattr(value, "savefig") else None
    own: Any = getattr(value, "_repr_png_", None)
    data = own() if data is None and callable(own) else data
    axes.set_axis_off()
    if data:
        from matplotlib.image import imread

        axes.imshow(imread(io.BytesIO(data)), interpolation="antialiased")
        return
    shown = as_text(value).splitlines() or [""]
    lines = [line[:90] for line in shown[:16]] + ["…"] * (len(shown) > 16)
    short = len(lines) < 3 and max(map(len, lines)) < 40
    axes.text(
        0, 1, "\n".join(lines), va="top", family="monospace", fontsize=14 if short else 8,
        parse_math=False,
    )  # fmt: skip
