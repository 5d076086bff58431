"""Small pictures as inline SVG: no library, and the page's own colour of text, dark or light."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

from mmadapt.core.figure import BLUE

#: space for numbers above and below a curve
_MARGIN = 14


def curve_svg(
    values: Sequence[float],
    label: str = "loss",
    across: str = "step",
    width: int = 360,
    height: int = 96,
) -> str:
    """A curve over 1, 2, 3 …; empty for fewer than two finite values.

    Its highest and lowest value stand beside it, with `label`; its ends below it, with `across`.
    """
    points = [(place, v) for place, v in enumerate(values, 1) if math.isfinite(v)]
    if len(points) < 2:
        return ""
    first, last = points[0][0], points[-1][0]
    points = _thinned(points, width)
    low, high = min(v for _, v in points), max(v for _, v in points)
    spread, span = (high - low) or 1.0, (points[-1][0] - points[0][0]) or 1
    path = " ".join(
        f"{(place - points[0][0]) / span * (width - 2) + 1:.1f},"
        f"{height - 2 * _MARGIN - (v - low) / spread * (height - 3 * _MARGIN - 4) - 2:.1f}"
        for place, v in points
    )
    ends = f"{low:.4g}", f"{label} {high:.4g}", f"{first}", f"{across} {last}"
    below, above, left, right = map(html.escape, ends)
    return (
        f'<svg width="{width}" height="{height}" role="img" aria-label="{html.escape(label)} curve" '
        'style="display:block" font-size="10" font-family="sans-serif" fill="currentColor">'
        f'<polyline points="{path}" fill="none" stroke="{BLUE}" stroke-width="1.6"/>'
        f'<text x="2" y="10">{above}</text>'
        f'<text x="2" y="{height - _MARGIN - 2}">{below}</text>'
        f'<line x1="0" x2="{width}" y1="{height - _MARGIN}" y2="{height - _MARGIN}" '
        'stroke="currentColor" stroke-opacity=".3"/>'
        f'<text x="2" y="{height - 2}">{left}</text>'
        f'<text x="{width - 2}" y="{height - 2}" text-anchor="end">{right}</text></svg>'
    )


def _thinned(points: Sequence[tuple[int, float]], most: int) -> list[tuple[float, float]]:
    """At most `most` points, each the mean of those it stands for."""
    step = -(-len(points) // most)
    groups = [points[start : start + step] for start in range(0, len(points), step)]
    return [tuple(sum(c) / len(group) for c in zip(*group, strict=True)) for group in groups]  # type: ignore[misc]


def wave_svg(low: Sequence[float], high: Sequence[float], seconds: float, width: int = 600) -> str:
    """A sound's envelope, lowest and highest sample along time, between −1 and 1."""
    height, middle = 60, 24
    step = width / max(len(low), 1)
    edge = [(place * step, middle - 22 * min(v, 1.0)) for place, v in enumerate(high)]
    edge += [(place * step, middle - 22 * max(v, -1.0)) for place, v in reversed([*enumerate(low)])]
    path = " ".join(f"{x:.0f},{y:.1f}" for x, y in edge)
    return (
        f'<svg width="{width}" height="{height}" role="img" aria-label="wave" '
        'style="display:block;max-width:100%" font-size="10" font-family="sans-serif" '
        f'fill="currentColor"><polygon points="{path}" fill="{BLUE}" stroke="{BLUE}" '
        'stroke-width=".6"/>'
        f'<text x="2" y="{height - 2}">0</text><text x="{width - 2}" y="{height - 2}" '
        f'text-anchor="end">{seconds:.2f} s</text></svg>'
    )


def bars_svg(values: Sequence[float], height: int = 16) -> str:
    """A bar a value from 0 upwards, in the line of a text; of many the means of neighbours."""
    points = _thinned(
        [(place, v if math.isfinite(v) else 0.0) for place, v in enumerate(values)], 60
    )
    top = max((v for _, v in points), default=0.0) or 1.0
    width = 4 if len(points) <= 30 else 2
    bars = "".join(
        f'<rect x="{place * width}" y="{height - max(v / top, 0) * height:.1f}" '
        f'width="{width - 1}" height="{max(v / top, 0) * height:.1f}"/>'
        for place, (_, v) in enumerate(points)
    )
    return (
        f'<svg width="{width * len(points)}" height="{height}" role="img" aria-label="by layer" '
        f'style="vertical-align:text-bottom" fill="{BLUE}">{bars}</svg>'
    )
