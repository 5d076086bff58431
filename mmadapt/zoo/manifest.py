"""The registry: entries that come with mmadapt, those of $MMADAPT_ZOO, and registered ones."""

from __future__ import annotations

import builtins
import json
import os
import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Any

from mmadapt.core.table import Table, count
from mmadapt.errors import ZooError, closest
from mmadapt.zoo.entries import PERMISSIVE, Entry, from_json

SCHEMA = 2
_REGISTERED: dict[str, Entry] = {}


class Entries(builtins.list[Entry]):
    """A list of entries that shows itself as a table."""

    def table(self) -> Table:
        """Names, sizes, licences, and whether the files are on this machine."""
        from mmadapt.zoo.places import find

        table = Table(("name", "kind", "parameters", "MB", "licence", "here", "summary"))
        for item in self:
            size = None if item.size is None else f"{item.size / 1e6:.1f}"
            parameters = None if item.parameters is None else count(item.parameters)
            found = find(item)
            table.rows.append(
                (
                    item.name,
                    item.kind,
                    parameters,
                    size,
                    item.licence["weights"],
                    found.where if found else None,
                    item.summary,
                )
            )
        table.title = f"{len(self)} entries"
        return table

    def __getitem__(self, place: Any) -> Any:
        """An entry, or of a slice the table of fewer."""
        found = super().__getitem__(place)
        return Entries(found) if isinstance(place, slice) else found

    def __repr__(self) -> str:
        return repr(self.table())

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


def data_folder() -> Path:
    """The zoo's data: the manifest and the tiny weights, installed or beside a checkout."""
    from importlib.resources import files
    from importlib.util import find_spec

    if find_spec("mmadapt._zoo_data") is None:
        return Path(__file__).resolve().parents[2] / "zoo"
    return Path(str(files("mmadapt._zoo_data")))


def read_manifest(path: str | Path) -> builtins.list[Entry]:
    """The entries of a manifest file; what is wrong in it is named with its place."""
    path = Path(path).expanduser()
    try:
        stat = path.stat()
        return _read(path, stat.st_mtime_ns, stat.st_size)
    except OSError as error:
        raise ZooError(
            f"the manifest {path} cannot be read: {error.strerror or error}",
            "MMADAPT_ZOO names files, separated as in PATH",
        ) from None


@lru_cache(maxsize=16)
def _read(path: Path, changed: int, size: int) -> builtins.list[Entry]:
    """Read once as long as the file stays what it is."""
    try:
        data = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ZooError(f"{path} is no JSON: {str(error)[:200]}") from None
    if not isinstance(data, dict) or not isinstance(data.get("entries"), builtins.list):
        raise ZooError(f"{path} holds no entries", '{"schema": 2, "entries": [...]}')
    schema = data.get("schema", SCHEMA)
    if type(schema) is not int or not 1 <= schema <= SCHEMA:
        raise ZooError(
            f"{path} has schema {schema!r}, this mmadapt reads up to {SCHEMA}", "upgrade mmadapt"
        )
    entries = [from_json(item, path.name) for item in data["entries"]]
    names: set[str] = set()
    for item in entries:
        if item.name in names:
            raise ZooError(f"{path} names {item.name} twice")
        names.add(item.name)
    return entries


def shipped() -> builtins.list[Entry]:
    """The entries that come with mmadapt."""
    return read_manifest(data_folder() / "manifest.json")


def known() -> dict[str, Entry]:
    """Every entry by name, in order; a later source replaces an earlier one's entry of that name."""
    found = {item.name: item for item in shipped()}
    for path in filter(None, os.environ.get("MMADAPT_ZOO", "").split(os.pathsep)):
        found |= {item.name: item for item in read_manifest(path)}
    found |= _REGISTERED
    return dict(sorted(found.items(), key=lambda pair: _natural(pair[0])))


def _natural(name: str) -> builtins.list[Any]:
    """Sorts b-2 before b-16."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]


def register(item: Entry, replace: bool = False) -> Entry:
    """Add an entry until the process ends; a name that is known is an error that offers `replace=True`.

    zoo.register(Entry("lab/sam", "…", "segment_anything:vit_b", {"urls": ["https://…/sam.pth"]},
                       files=(File("sam.pth"),), licence={"weights": "MIT", "declared_by": "us"}))
    """
    if not isinstance(item, Entry):
        raise ZooError(f"expected an Entry, got {type(item).__name__}", "mmadapt.zoo.Entry(...)")
    if item.name in known() and not replace:
        raise ZooError(
            f"the zoo has {item.name} already", "take another name, or pass replace=True"
        )
    _REGISTERED[item.name] = item
    return item


def entry(name: str | Entry) -> Entry:
    """The entry of that name or alias; an unknown one is an error that names the nearest."""
    if isinstance(name, Entry):
        return name
    if not isinstance(name, str):
        raise ZooError(
            f"expected a zoo name, got {type(name).__name__}", "mmadapt.zoo.list() shows every name"
        )
    entries = known()
    if name in entries:
        return entries[name]
    for item in entries.values():
        if name in item.aliases:
            return item
    near = suggestions(name, entries)
    hint = "did you mean " + " or ".join(map(repr, near)) + "?" if near else ""
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not near:
        hint = f"a repository of the hub is written 'hf:{name}'"
    raise ZooError(f"the zoo has no {name!r}", hint or "mmadapt.zoo.list() shows every name")


def suggestions(name: str, entries: dict[str, Entry]) -> builtins.list[str]:
    """Up to three known names, the family compared with families and the rest within the nearest."""
    aliases = {alias: item.name for item in entries.values() for alias in item.aliases}
    found = [aliases[near] for near in closest(name, aliases, n=1)] if "/" not in name else []
    family, _, rest = name.lower().partition("/")
    families = {key.partition("/")[0] for key in entries}
    for near in closest(family, families):
        inside = {key.partition("/")[2]: key for key in entries if key.startswith(f"{near}/")}
        found += [inside[part] for part in closest(rest, inside)] if rest else inside.values()
    if not found:  # the family's name may be what was left out
        short = {key.partition("/")[2]: key for key in entries}
        found = [short[part] for part in closest(name.lower(), short)]
    found += [aliases[near] for near in closest(name, aliases, n=1)]
    return builtins.list(dict.fromkeys(found))[:3]


def list(
    pattern: str = "*",
    *,
    kind: str | None = None,
    max_params: int | str | None = None,
    licence: str | None = None,
    cached: bool | None = None,
) -> Entries:
    """Every entry whose name or an alias matches the glob `pattern`, in natural order.

    `max_params` counts ("200M"), `licence` is an SPDX name or "permissive", `cached` asks whether the
    files are on this machine.

        zoo.list("*clip*", max_params="200M", licence="permissive")
    """
    from mmadapt.zoo.places import find

    if kind not in (None, "backbone", "adapter"):
        raise ZooError(f"kind is {kind!r}, expected 'backbone' or 'adapter'")
    limit = None if max_params is None else _count(max_params)
    pattern = pattern.lower()
    found = Entries()
    for item in known().values():
        names = (item.name, *item.aliases)
        terms = item.licence["weights"]
        if (
            any(fnmatchcase(name.lower(), pattern) for name in names)
            and kind in (None, item.kind)
            and (limit is None or (item.parameters is not None and item.parameters <= limit))
            and (licence in (None, terms) or (licence == "permissive" and terms in PERMISSIVE))
            and (cached is None or cached == (find(item) is not None))
        ):
            found.append(item)
    return found


def _count(text: int | str) -> int:
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*([kKMB]?)", str(text).strip())
    if match is None:
        raise ZooError(f"max_params is {text!r}", "a count such as 200_000_000 or '200M'")
    return int(float(match[1]) * {"": 1, "k": 1e3, "K": 1e3, "M": 1e6, "B": 1e9}[match[2]])


def search(words: str) -> Entries:
    """Entries that the words speak of, best first: in names, aliases, summaries, tasks, modalities.

    zoo.search("few shot audio")
    """
    wanted = re.findall(r"[a-z0-9.+]+", words.lower())
    scored = []
    for place, item in enumerate(known().values()):
        fields: Iterable[tuple[int, str]] = (
            (4, item.name),
            (3, " ".join(item.aliases)),
            (2, " ".join((*item.tasks, *item.modality, item.anatomy))),
            (1, item.summary),
        )
        scores = [sum(weight for weight, text in fields if word in text.lower()) for word in wanted]
        matched = sum(score > 0 for score in scores)
        if matched:
            scored.append((-matched, -sum(scores), place, item))
    return Entries(item for *_, item in sorted(scored, key=lambda row: row[:3]))
