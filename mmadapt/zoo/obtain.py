"""From a zoo name or a hub id to a folder with verified files, downloading what is not here."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from mmadapt.errors import (
    ChecksumError,
    DownloadError,
    MissingDependencyError,
    OfflineError,
    ZooError,
)
from mmadapt.zoo import places
from mmadapt.zoo.digests import difference, problem
from mmadapt.zoo.entries import Entry
from mmadapt.zoo.fetch import settings
from mmadapt.zoo.files import megabytes
from mmadapt.zoo.manifest import entry, known
from mmadapt.zoo.transfer import Transfer, say

HUB_ID = re.compile(
    r"(?P<repo>hf:[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w./-]+))?"
)


def resolve(what: str | Entry) -> Entry:
    """The entry of a name, of an `Entry`, or made for a hub id such as `hf:org/repo@revision`."""
    if isinstance(what, str) and what.startswith("hf:"):
        match = HUB_ID.fullmatch(what)
        if match is None:
            raise ZooError(f"{what!r} is no hub id", "hf:org/repo or hf:org/repo@revision")
        return Entry(
            match["repo"],
            "a repository of the hub",
            "folder",
            {"hf": match["repo"].removeprefix("hf:")},
            licence={"weights": "unknown", "declared_by": "not looked up"},
            revision=match["revision"] or "",
        )
    return entry(what)


def get(
    what: str | Entry,
    *,
    patterns: Sequence[str] | None = None,
    offline: bool = False,
    token: str | bool | None = None,
    progress: bool = True,
    refresh: bool = False,
    to: str | Path | None = None,
) -> Path:
    """The folder that holds an entry's verified files, downloaded where they are not on this machine.

    `what` is a zoo name, an `Entry` or a hub id (`hf:org/repo@revision`), of which `patterns` takes only
    files that match; `refresh` asks again which commit a branch is. `to` is a root for other machines to
    read through MMADAPT_ZOO_PATH. What is here needs no request at all; what comes
    with mmadapt stays where it is.

    Raises `OfflineError` (no network, within three seconds), `GatedError`, `ChecksumError`, `StorageError`
    or `DownloadError`, each with the way on; what had arrived is kept and gone on with.

        folder = zoo.get("sam/vit-b")
    """
    item = resolve(what)
    patterns = (patterns,) if isinstance(patterns, str) else patterns
    chosen = None if patterns is None else tuple(patterns)
    damaged = ""
    asks_anew = refresh and "hf" in item.source  # nothing else has branches
    if "bundled" in item.source or (to is None and not asks_anew):
        found, damaged = here(item, chosen)
        if found is not None:
            return found.folder
    if offline or settings().offline:
        raise _offline(item, damaged or "the network is not to be used")
    if to is None:  # other machines have libraries of their own
        _require_libraries(item)
    if "manual" in item.source:
        raise _by_hand(item)
    show = progress and _can_show()
    if damaged:
        say(item, f"{damaged}; fetching it again", show)
    try:
        return Transfer(item, chosen, settings(token).token, show, to).run()
    except OfflineError as error:
        raise _offline(item, error.message, error.hint) from None


def here(item: Entry, patterns: places.Patterns = None) -> tuple[places.Found | None, str]:
    """The first verified copy on this machine, and what is wrong with one of the own cache."""
    damaged = ""
    for found in places.candidates(item, patterns):
        bundled = found.where == "bundled"
        check = difference if bundled else problem  # what is small is not worth remembering
        for file in found.files:
            wrong = check(found.folder / file.path, file)
            if wrong and bundled:
                lost = "missing" if wrong == "it is missing" else f"damaged: {wrong}"
                raise ChecksumError(f"{item.name}: {file.path} is {lost}", "reinstall mmadapt")
            if wrong:
                damaged = f"{found.folder / file.path} is damaged: {wrong}"
                break
        else:
            return found, ""
    return None, damaged


def _can_show() -> bool:
    from importlib.util import find_spec

    return find_spec("tqdm") is not None


def _offline(item: Entry, why: str, hint: str = "") -> OfflineError:
    """No network: what is missing, where it is, how to bring it, and what is here instead."""
    size = "" if item.size is None else f" ({megabytes(item.size)})"
    near = [
        other.name
        for other in known().values()
        if other.kind == item.kind and item.anatomy and other.anatomy == item.anatomy
        and other.name != item.name and places.find(other)
    ]  # fmt: skip
    asked = item.name
    if asked.startswith("hf:") and item.revision:
        asked += f"@{item.revision}"
    elsewhere = (
        f"fetch it from {item.page} on a machine with network, then "
        f"`mmadapt zoo import {'FOLDER' if len(item.files) != 1 else 'FILE'} --as {asked}`"
    )
    instead = f"; on this machine is {' and '.join(near[:2])}" if near else ""
    return OfflineError(
        f"{item.name}{size} is not on this machine: {why}",
        f"{hint + '; or ' if hint else ''}{elsewhere}{instead}",
    )


def _by_hand(item: Entry) -> DownloadError:
    expected = "; ".join(
        f"{file.path}: {megabytes(file.size) if file.size else 'size unknown'}, sha256 "
        f"{file.sha256 or 'unknown'}"
        for file in item.files
    )
    return DownloadError(
        f"{item.name} can only be fetched in a browser, from {item.source['manual']} ({expected or 'files'}), "
        f"licence {item.licence['weights']}",
        f"save it, then `mmadapt zoo import FILE --as {item.name}`",
    )


def _require_libraries(item: Entry) -> None:
    """What the entry needs to be built is installed, before anything is downloaded."""
    from importlib.metadata import PackageNotFoundError, version

    for name, wanted in item.requires.items():
        try:
            have = version(name)
        except PackageNotFoundError:
            raise MissingDependencyError(
                f"{item.name} needs {name}{wanted}, which is not installed",
                f"pip install '{name}{wanted}'",
            ) from None
        if wanted and not _fits(have, wanted):
            raise MissingDependencyError(
                f"{item.name} needs {name}{wanted}, this is {have}", f"pip install '{name}{wanted}'"
            )


def _fits(have: str, wanted: str) -> bool:
    from packaging.specifiers import SpecifierSet  # transformers and huggingface_hub bring it

    return SpecifierSet(wanted).contains(have, prereleases=True)
