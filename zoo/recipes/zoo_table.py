"""Write the table of entries into docs/zoo.md, from the manifest.

python zoo/recipes/zoo_table.py
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from pages import fill

from mmadapt.core.table import count
from mmadapt.zoo.entries import Entry
from mmadapt.zoo.files import megabytes
from mmadapt.zoo.manifest import shipped

ROOT = Path(__file__).resolve().parents[2]


def table() -> str:
    """The entries that come with mmadapt, in Markdown."""
    lines = [
        "| name | what | parameters | size | licence of the weights | pinned |",
        "|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *map(_row, sorted(shipped(), key=lambda item: item.name))])


def _row(item: Entry) -> str:
    size = "" if item.size is None else megabytes(item.size)
    parameters = "" if item.parameters is None else count(item.parameters)
    limits = item.licence.get("restrictions") or []
    terms = "; ".join(
        [item.licence["weights"], *limits, *(["gated"] if item.licence.get("gated") else [])]
    )
    name = f"[`{item.name}`]({item.page})" if item.page else f"`{item.name}`"
    if "manual" in item.source:
        pinned = "by hand"
    elif item.pinned:
        pinned = "yes"
    else:
        pinned = "commit" if item.revision else "no"
    return f"| {name} | {item.summary} | {parameters} | {size} | {terms} | {pinned} |"


def main() -> None:
    page = ROOT / "docs" / "zoo.md"
    page.write_text(fill(page.read_text(), {"entries": table()}))


if __name__ == "__main__":
    main()
