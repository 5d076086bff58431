"""Tables inside Markdown pages, between the comments that name them."""

from __future__ import annotations

from collections.abc import Mapping


def fill(page: str, tables: Mapping[str, str]) -> str:
    """The page with every table in its place, behind `<!-- NAME table -->` and before `<!-- end …`."""
    for name, text in tables.items():
        begin = f"<!-- {name} table -->"
        before, found, rest = page.partition(begin)
        _, end, after = rest.partition("<!-- end")
        if not found or not end:
            raise ValueError(f"the page has no place for a table: {begin} … <!-- end -->")
        page = f"{before}{begin}\n{text}\n{end}{after}"
    return page
