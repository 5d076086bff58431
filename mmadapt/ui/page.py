"""A report as one HTML file that needs nothing beside it: text, tables, and pictures inside."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

from mmadapt.core.figure import drawn, img, new_figure, png

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;
color:#1c2330;background:#fff}
h1{font-size:1.6rem;margin-bottom:.2rem}h2{font-size:1.15rem;margin-top:2rem}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.9rem}
th{border-bottom:2px solid #ccd3dd}td{border-bottom:1px solid #e8ecf1}
tbody tr:hover{background:#f4f7fb}img{max-width:100%}
code,pre{background:#f4f6f9;border-radius:4px;padding:.1rem .3rem}pre{padding:.8rem;overflow-x:auto}
small,figcaption{color:#5b6676}figure{margin:1rem 0}
"""


class Page:
    """Collects parts in order; `write` puts them into one file."""

    def __init__(self, title: str) -> None:
        self.title = title
        self._parts: list[str] = [f"<h1>{html.escape(title)}</h1>"]

    def heading(self, text: str) -> None:
        """A section's heading."""
        self._parts.append(f"<h2>{html.escape(text)}</h2>")

    def text(self, text: str) -> None:
        """A paragraph of plain text."""
        self._parts.append(f"<p>{html.escape(text)}</p>")

    def code(self, text: str) -> None:
        """Code or a command, as it is typed."""
        self._parts.append(f"<pre>{html.escape(text)}</pre>")

    def table(self, table: Any) -> None:
        """Anything with a rich form."""
        self._parts.append(table._repr_html_())

    def figure(self, figure: Any, caption: str) -> None:
        """A matplotlib figure, with a caption that also serves those who cannot see it."""
        picture = img(png(figure, dpi=130), caption)
        text = html.escape(caption)
        self._parts.append(f"<figure>{picture}<figcaption>{text}</figcaption></figure>")

    def write(self, path: Path) -> Path:
        """Write the file and return its path."""
        from mmadapt.core.store import replace_file

        path.parent.mkdir(parents=True, exist_ok=True)
        document = (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width">'
            f"<title>{html.escape(self.title)}</title><style>{_STYLE}</style></head>"
            f"<body>{''.join(self._parts)}</body></html>\n"
        )
        replace_file(path, document.encode())
        return path


@drawn
def image_grid(images: Any, captions: Any, columns: int = 8, title: str = "") -> Any:
    """A matplotlib figure of small images (uint8 (H, W, 3) or PIL) with a caption under each."""
    rows = -(-len(images) // columns)
    figure = new_figure(1.1 * columns, 1.3 * rows + (0.3 if title else 0))
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for place, axis in enumerate(axes):
        axis.axis("off")
        if place < len(images):
            axis.imshow(images[place], interpolation="nearest")
            axis.set_title(captions[place], fontsize=7, y=-0.24)
    if title:
        figure.suptitle(title)
    return figure


@drawn
def loss_figure(losses: dict[str, list[float]], label: str = "cross-entropy") -> Any:
    """Training loss over steps, a line a name; `label` says what it is."""
    figure = new_figure(7.5, 3)
    axes = figure.add_subplot()
    for name, values in losses.items():
        axes.plot(range(1, len(values) + 1), values, label=name)
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.legend()
    return figure
