"""Tables with a rich and a plain form; needs neither torch nor pandas."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

#: rows of a table that are shown; of longer ones the middle is left out
SHOWN = 100


@dataclass
class Table:
    """Rows under named columns, with a headline and notes.

    `repr` gives aligned text, a notebook gets HTML, `records()` gives plain dictionaries. Of more than
    100 rows the first and the last are shown.
    """

    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]] = field(default_factory=list)
    title: str = ""
    notes: list[str] = field(default_factory=list)

    def records(self) -> list[dict[str, Any]]:
        """One dictionary a row; `pandas.DataFrame(table.records())` makes a frame."""
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        return iter(self.rows)

    def _shown(self) -> tuple[list[tuple[Any, ...]], list[str]]:
        """The rows that are shown, and the notes below them."""
        left = len(self.rows) - SHOWN
        if left <= 0:
            return self.rows, self.notes
        half = SHOWN // 2
        gap = ("…", *("" for _ in self.columns[1:]))
        note = f"{left:,} rows are not shown; records() holds all {len(self.rows):,}"
        return [*self.rows[:half], gap, *self.rows[-half:]], [note, *self.notes]

    def __str__(self) -> str:
        rows, notes = self._shown()
        cells = [[text(value) for value in row] for row in rows]
        widths = [
            max([len(name), *(len(row[i]) for row in cells)]) for i, name in enumerate(self.columns)
        ]
        right = [_numeric(self.rows, i) for i in range(len(self.columns))]
        lines = [self.title] if self.title else []
        if any(self.columns):
            lines.append(line(self.columns, widths, right))
            lines.append("  ".join("-" * width for width in widths))
        lines += [line(row, widths, right) for row in cells]
        return "\n".join([*lines, *notes])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        right = [_numeric(self.rows, i) for i in range(len(self.columns))]
        rows, below = self._shown()

        def cell(tag: str, value: str, is_right: bool) -> str:
            align = "right" if is_right else "left"
            return (
                f'<{tag} style="text-align:{align};padding:2px 10px">{html.escape(value)}</{tag}>'
            )

        head = "".join(cell("th", name, r) for name, r in zip(self.columns, right, strict=True))
        head = f"<thead><tr>{head}</tr></thead>" if any(self.columns) else ""
        body = "".join(
            "<tr>"
            + "".join(cell("td", text(v), r) for v, r in zip(row, right, strict=True))
            + "</tr>"
            for row in rows
        )
        title = f"<div><b>{html.escape(self.title)}</b></div>" if self.title else ""
        notes = "".join(f"<div><small>{html.escape(note)}</small></div>" for note in below)
        return f"{title}<table>{head}<tbody>{body}</tbody></table>{notes}"


def facts(title: str, values: Mapping[str, Any]) -> Table:
    """A table of names and what they are, without a head; what is empty is left out."""
    return Table(("", ""), [(k, v) for k, v in values.items() if v not in ("", None)], title)


def line(cells: Sequence[str], widths: Sequence[int], right: Sequence[bool]) -> str:
    """One aligned line of text."""
    parts = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(cells, widths, right, strict=True)]
    return "  ".join(parts).rstrip()


def text(value: Any) -> str:
    """A cell as text: numbers grouped or to three places, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) >= 1e4 or 0 < abs(value) < 1e-3 else f"{value:.3f}"
    return str(value)


def _numeric(rows: Sequence[Sequence[Any]], column: int) -> bool:
    values = [row[column] for row in rows if row[column] not in (None, "–")]
    return bool(values) and all(isinstance(v, (int, float)) or _starts_digit(v) for v in values)


def _starts_digit(value: Any) -> bool:
    return isinstance(value, str) and value[:1].isdigit() and not value[-1:].isalpha()


def count(number: int) -> str:
    """A parameter count for people: 1,234 · 0.02 M · 1.1 M · 7.2 B."""
    if number < 10_000:
        return f"{number:,}"
    if number < 1_000_000_000:
        return f"{number / 1e6:.3g} M" if number >= 100_000 else f"{number / 1e3:.3g} k"
    return f"{number / 1e9:.3g} B"


def shape_of(tensor: Any) -> str:
    """A tensor as equinox prints it: f32[8,16]."""
    kind = str(tensor.dtype).removeprefix("torch.")
    short = {
        "float32": "f32",
        "float64": "f64",
        "float16": "f16",
        "bfloat16": "bf16",
        "int64": "i64",
    }
    return f"{short.get(kind, kind)}[{','.join(map(str, tensor.shape))}]"
