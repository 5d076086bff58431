"""`mmadapt zoo …`: the zoo from a shell, for people and for scripts; imports no torch."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from mmadapt.core.table import Table
from mmadapt.errors import (
    ChecksumError,
    GatedError,
    MmadaptError,
    OfflineError,
    StorageError,
    ZooError,
)

#: exit code of each kind of error; the first that fits
EXIT_CODES = (
    (OfflineError, 3),
    (ChecksumError, 4),
    (StorageError, 5),
    (GatedError, 6),
    (ZooError, 2),
)


def exit_code(error: MmadaptError) -> int:
    """2 unknown name or refused, 3 no network, 4 wrong digest, 5 disk or permission, 6 gated, else 1."""
    return next((code for kind, code in EXIT_CODES if isinstance(error, kind)), 1)


def add(commands: argparse._SubParsersAction) -> None:
    """Put `zoo` and its actions among the commands."""
    zoo = commands.add_parser("zoo", help="find, fetch and keep backbones and published adapters")
    actions = zoo.add_subparsers(title="actions", required=True, metavar="ACTION")

    def action(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        parser = actions.add_parser(name, help=text, description=text)
        parser.add_argument("--json", action="store_true", help="one JSON value on standard output")
        parser.set_defaults(run=run)
        return parser

    listing = action("list", _list, "entries whose name or alias matches a glob pattern")
    listing.add_argument("pattern", nargs="?", default="*")
    listing.add_argument("--kind", choices=("backbone", "adapter"))
    listing.add_argument("--max-params", metavar="N", help="at most so many parameters, as 200M")
    listing.add_argument("--licence", help="an SPDX name, or permissive")
    listing.add_argument("--cached", action="store_true", help="only what is on this machine")
    search = action("search", _search, "entries that words speak of, best first")
    search.add_argument("words", nargs="+")
    show = action("show", _show, "everything known of one entry")
    show.add_argument("name")
    get = action("get", _get, "download entries or hub ids; prints their folders")
    get.add_argument("names", nargs="+", metavar="NAME", help="a zoo name, or hf:org/repo@revision")
    get.add_argument("--to", metavar="ROOT", help="another root, for MMADAPT_ZOO_PATH elsewhere")
    get.add_argument("--offline", action="store_true", help="only what is on this machine")
    get.add_argument("--refresh", action="store_true", help="ask again which commit a branch is")
    get.add_argument("--quiet", action="store_true", help="no progress")
    verify = action("verify", _verify, "hash the files of one entry, or of all, anew")
    verify.add_argument("name", nargs="?")
    rm = action("rm", _rm, "remove downloads whose names match; shows them, and needs --yes")
    rm.add_argument("pattern")
    rm.add_argument("--yes", action="store_true")
    action("where", _where, "the places looked through, and what has been downloaded")
    bring = action("import", _import, "take a file or folder fetched by hand into the cache")
    bring.add_argument("path")
    bring.add_argument("--as", dest="name", metavar="NAME", help="the entry it belongs to")


def _print(value: Any, as_json: bool) -> None:
    if as_json:
        value = value.records() if isinstance(value, Table) else value
        print(json.dumps(value, indent=1))
    else:
        print(value)


def _entries(entries: Any, as_json: bool) -> int:
    _print([item.to_json() for item in entries] if as_json else entries.table(), as_json)
    return 0


def _list(chosen: argparse.Namespace) -> int:
    from mmadapt.zoo import manifest

    found = manifest.list(
        chosen.pattern,
        kind=chosen.kind,
        max_params=chosen.max_params,
        licence=chosen.licence,
        cached=True if chosen.cached else None,
    )
    return _entries(found, chosen.json)


def _search(chosen: argparse.Namespace) -> int:
    from mmadapt.zoo import manifest

    return _entries(manifest.search(" ".join(chosen.words)), chosen.json)


def _show(chosen: argparse.Namespace) -> int:
    from mmadapt.zoo import manifest, places

    item = manifest.entry(chosen.name)
    found = places.find(item)
    here = str(found.folder) if found else None
    if chosen.json:
        _print({**item.to_json(), "pinned": item.pinned, "folder": here}, True)
        return 0
    print(item.card())
    print(f"  here: {here} ({found.where})" if found else "  here: no")
    if item.metrics:
        print(json.dumps({"metrics": item.metrics}, indent=1))
    return 0


def _get(chosen: argparse.Namespace) -> int:
    from mmadapt.zoo.obtain import get

    folders: dict[str, str] = {}
    worst = 0
    for name in chosen.names:
        try:
            folder = get(
                name,
                offline=chosen.offline,
                refresh=chosen.refresh,
                to=chosen.to,
                progress=not chosen.quiet,
            )
            folders[name] = str(folder)
        except MmadaptError as error:  # the others are still fetched
            print(f"mmadapt: {error}", file=sys.stderr)
            worst = worst or exit_code(error)
    _print(folders if chosen.json else "\n".join(folders.values()), chosen.json)
    return worst


def _verify(chosen: argparse.Namespace) -> int:
    from mmadapt.zoo.keeping import SOUND, verify

    table = verify(chosen.name)
    _print(table, chosen.json)
    return 0 if all(row[3] in SOUND for row in table.rows) else 4


def _rm(chosen: argparse.Namespace) -> int:
    from mmadapt.zoo.keeping import rm

    table = rm(chosen.pattern, dry_run=not chosen.yes)
    _print(table, chosen.json)
    if not chosen.yes:
        print("nothing was removed; --yes removes them", file=sys.stderr)
    return 0


def _where(chosen: argparse.Namespace) -> int:
    from mmadapt.zoo.keeping import cached, where

    if chosen.json:
        _print({"places": where().records(), "downloads": cached().records()}, True)
    else:
        print(where(), cached(), sep="\n\n")
    return 0


def _import(chosen: argparse.Namespace) -> int:
    from mmadapt.zoo.keeping import import_file

    folder = import_file(chosen.path, chosen.name)
    _print({"folder": str(folder)} if chosen.json else folder, chosen.json)
    return 0
