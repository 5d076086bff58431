"""Zoo entries: what is known of a backbone before a byte of it is read."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from mmadapt.core.table import Table, count, facts
from mmadapt.errors import ZooError, did_you_mean


@dataclass(frozen=True)
class Entry:
    """One backbone: how to build it, its files with digests, its licence and measured numbers."""

    name: str
    summary: str
    builder: str
    source: dict[str, str]
    files: tuple[dict[str, Any], ...]
    parameters: int
    licence: dict[str, str]
    metrics: dict[str, Any] = field(default_factory=dict)
    input: dict[str, Any] = field(default_factory=dict)
    recipe: str = ""
    revision: str = ""

    @property
    def sha256(self) -> str:
        """Digest of the file that holds the weights."""
        return next(file["sha256"] for file in self.files if file["role"] == "weights")

    def __repr__(self) -> str:
        size = sum(file["size"] for file in self.files)
        return (
            f"{self.name}: {self.summary}\n  {count(self.parameters)} parameters, {size / 1e6:.1f} MB, "
            f"licence {self.licence['weights']}\n  load: mmadapt.load({self.name!r})"
        )

    def _repr_html_(self) -> str:
        shown = {
            "parameters": count(self.parameters),
            "files": f"{sum(file['size'] for file in self.files) / 1e6:.1f} MB",
            "licence": self.licence["weights"],
            "builder": self.builder,
            "load": f"mmadapt.load({self.name!r})",
        }
        return facts(f"{self.name}: {self.summary}", shown)._repr_html_()


def data_folder() -> Path:
    """The installed zoo data: the manifest and the tiny weights."""
    from importlib.resources import files

    return Path(str(files("mmadapt._zoo_data")))


@lru_cache(maxsize=1)
def _entries() -> dict[str, Entry]:
    data = json.loads((data_folder() / "manifest.json").read_text())
    entries = [Entry(**{**item, "files": tuple(item["files"])}) for item in data["entries"]]
    return {item.name: item for item in sorted(entries, key=lambda item: item.name)}


def entry(name: str) -> Entry:
    """The entry of that name; an unknown one is an error that names the nearest."""
    known = _entries()
    if name not in known:
        raise ZooError(
            f"the zoo has no {name!r}",
            did_you_mean(name, known) or "mmadapt.zoo.list() shows every name",
        )
    return known[name]


def list(pattern: str = "*") -> Table:
    """Every backbone whose name matches the glob `pattern`."""
    from fnmatch import fnmatch

    table = Table(("name", "parameters", "MB", "licence", "summary"))
    for item in _entries().values():
        if fnmatch(item.name, pattern):
            size = sum(file["size"] for file in item.files) / 1e6
            licence = item.licence["weights"]
            table.rows.append(
                (item.name, count(item.parameters), f"{size:.1f}", licence, item.summary)
            )
    table.title = f"{len(table)} backbones"
    return table
