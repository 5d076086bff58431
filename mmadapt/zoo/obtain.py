"""From a zoo name or a hub id to a folder with verified files, downloading what is not here."""

from __future__ import annotations

import errno
import http.client
import os
import re
import shutil
import sys
import urllib.error
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mmadapt.errors import (
    ChecksumError,
    DownloadError,
    MissingDependencyError,
    OfflineError,
    StorageError,
    ZooError,
)
from mmadapt.train.progress import Progress, in_notebook
from mmadapt.zoo import hub, places
from mmadapt.zoo.digests import difference, problem
from mmadapt.zoo.download import PART, fetch_file, only_one
from mmadapt.zoo.entries import Entry
from mmadapt.zoo.fetch import request, settings
from mmadapt.zoo.files import COMMIT, File, megabytes
from mmadapt.zoo.manifest import entry, known

HUB_ID = re.compile(
    r"(?P<repo>hf:[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w./-]+))?"
)
#: room to leave on a disk
MARGIN = 1 << 20


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
    read through MMADAPT_ZOO_PATH. What is here needs no request at all.

    Raises `OfflineError` (no network, within three seconds), `GatedError`, `ChecksumError`, `StorageError`
    or `DownloadError`, each with the way on; what had arrived is kept and gone on with.

        folder = zoo.get("sam/vit-b")
    """
    return obtain(what, patterns=patterns, offline=offline, token=token, progress=progress,
                  refresh=refresh, to=to).folder  # fmt: skip


def obtain(
    what: str | Entry,
    *,
    patterns: Sequence[str] | None = None,
    offline: bool = False,
    token: str | bool | None = None,
    progress: bool = True,
    refresh: bool = False,
    to: str | Path | None = None,
) -> places.Found:
    """As `get`, and which files they are."""
    item = resolve(what)
    chosen = None if patterns is None else tuple(patterns)
    damaged = ""
    if to is None and not refresh:
        found, damaged = _here(item, chosen)
        if found is not None:
            return found
    if offline or settings().offline:
        raise _offline(item, damaged or "the network is not to be used")
    _require_libraries(item)
    if "manual" in item.source:
        raise _by_hand(item)
    show = progress and _can_show()
    if damaged:
        _say(item, f"{damaged}; fetching it again", show)
    try:
        return _Download(item, chosen, settings(token).token, show, to).run()
    except OfflineError as error:
        raise _offline(item, error.message, error.hint) from None


def _here(item: Entry, patterns: places.Patterns) -> tuple[places.Found | None, str]:
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


@dataclass
class _Download:
    """One entry on its way to this machine."""

    item: Entry
    patterns: places.Patterns
    token: str | None
    show: bool
    to: str | Path | None

    def run(self) -> places.Found:
        record = self._record()
        files = places.wanted(self.item, record.files, self.patterns)
        if not files:
            asked = f"matches {', '.join(self.patterns)}" if self.patterns else "can be loaded"
            raise DownloadError(
                f"{self.item.name}: {self.item.source} has no file that {asked}",
                "there: " + (", ".join(file.path for file in record.files[:12]) or "nothing"),
            )
        root = self._root()
        folder = root / places.slug(self.item) / places.key_of(self.item, record.revision)
        try:
            return self._into(root, folder, record, files)
        except OSError as error:
            if isinstance(error, urllib.error.HTTPError):
                repo = str(self.item.source.get("hf", ""))
                raise hub.refused(error, repo, record.revision, self.item.name) from None
            if error.errno == errno.ENOSPC:
                raise StorageError(f"the disk is full: {folder}", _room_hint(root)) from None
            raise StorageError(
                f"{folder} cannot be written: {error.strerror or error}",
                "set MMADAPT_CACHE to a folder of yours",
            ) from None

    def _root(self) -> Path:
        if self.to is not None:
            return Path(self.to).expanduser()
        root, note = places.writable_root()
        if note:
            _say(self.item, note, self.show)
        return root

    def _record(self) -> places.Record:
        """What there is to fetch: from the manifest where it is pinned, else from its server."""
        item = self.item
        if "urls" in item.source:
            files = tuple(self._sized(file) for file in item.files)
            return places.Record(item.name, "", files, item.licence["weights"])
        if item.pinned and COMMIT.fullmatch(item.revision) and self.patterns is None:
            return places.Record(item.name, item.revision, item.files, item.licence["weights"])
        revision = item.revision or "main"
        found = hub.listing(item.source["hf"], revision, self.token, item.name)
        licence = item.licence["weights"]
        licence = found.licence if licence == "unknown" else licence
        return places.Record(item.name, found.commit, found.files, licence)

    def _sized(self, file: File) -> File:
        """The file with the size its server tells, for the sake of progress; it stays not pinned."""
        if file.size is not None:
            return file
        try:
            with request(self._urls(file, "")[0], method="HEAD") as answer:
                length = answer.headers.get("Content-Length") or ""
        except (OSError, http.client.HTTPException):
            return file  # the download itself tells what is wrong
        return replace(file, size=int(length)) if re.fullmatch(r"\d{1,18}", length) else file

    def _urls(self, file: File, commit: str) -> list[str]:
        if "hf" in self.item.source:
            return [hub.address(self.item.source["hf"], commit, file.path)]
        return [url + file.path if url.endswith("/") else url for url in self.item.source["urls"]]

    def _into(
        self, root: Path, folder: Path, record: places.Record, files: tuple[File, ...]
    ) -> places.Found:
        folder.mkdir(parents=True, exist_ok=True)
        wait = "another process is downloading it; waiting"
        with only_one(folder / ".lock", lambda: _say(self.item, wait, self.show)) as alone:
            earlier = places.read_record(folder)  # another process may have been here meanwhile
            told = {file.path: file for file in earlier.files} if earlier else {}
            files = tuple(f if f.pinned else told.get(f.path, f) for f in files)
            missing = [f for f in files if not f.pinned or problem(folder / f.path, f)]
            self._require_room(root, folder, missing)
            digests = self._fetch(folder, missing, record, alone)
            known = {file.path: file for file in (*record.files, *files)}
            for path, sha256 in digests.items():
                size = (folder / path).stat().st_size
                known[path] = replace(known[path], size=size, sha256=sha256)
            places.write_record(folder, replace(record, files=tuple(known.values())))
            if "hf" in self.item.source and not COMMIT.fullmatch(self.item.revision):
                revision = self.item.revision or "main"
                places.remember_commit(root, self.item, revision, record.revision)
                self._say_pin(record, revision)
            elif digests and not self.item.pinned:
                got = ", ".join(f"{path} sha256 {digest}" for path, digest in digests.items())
                _say(self.item, f"not pinned in the manifest; recorded {got}", self.show)
            pinned = tuple(known[file.path] for file in files)
            return places.Found(folder, pinned, "cached", record.revision)

    def _say_pin(self, record: places.Record, revision: str) -> None:
        name = f"hf:{self.item.source['hf']}"
        _say(
            self.item,
            f"{revision} is commit {record.revision}, which later calls use; {name}@{record.revision} "
            "asks for it on any machine",
            self.show,
        )

    def _require_room(self, root: Path, folder: Path, missing: list[File]) -> None:
        need = 0
        for file in missing:
            part = _part(folder / file.path)
            need += max(0, (file.size or 0) - (part.stat().st_size if part.exists() else 0))
        free = shutil.disk_usage(folder).free
        if need and free < need + MARGIN:
            raise StorageError(
                f"{self.item.name} needs {megabytes(need)} in {root}, {megabytes(free)} are free",
                _room_hint(root),
            )

    def _fetch(
        self, folder: Path, missing: list[File], record: places.Record, alone: bool
    ) -> dict[str, str]:
        """Fetch what is missing, one file after another; sha256 by path."""
        if not missing:
            return {}
        total = sum(file.size or 0 for file in missing)
        terms = f"{megabytes(total) if total else 'size unknown'}, licence {record.licence}"
        limits = self.item.licence.get("restrictions") or []
        _say(self.item, ", ".join([terms, *limits]), self.show)
        digests: dict[str, str] = {}
        is_hub = "hf" in self.item.source
        before = 0
        with Progress(self.item.name, total, show=self.show, unit="B") as bar:
            for file in missing:
                path = folder / file.path
                path.parent.mkdir(parents=True, exist_ok=True)
                begun = before
                try:
                    digests[file.path] = fetch_file(
                        self._urls(file, record.revision),
                        path,
                        file,
                        token=self.token if is_hub else None,
                        report=lambda done, begun=begun: bar.update(begun + done),
                        hub=is_hub,
                        part=_part(path) if alone else _part(path, f".{os.getpid()}"),
                    )
                except KeyboardInterrupt:
                    share = f"{100 * bar.done / total:.0f} %" if total else megabytes(bar.done)
                    bar.note(f"stopped; {share} is kept, run it again to go on")
                    raise
                before += file.size or path.stat().st_size
                bar.update(before)
        return digests


def _part(path: Path, mark: str = "") -> Path:
    return path.with_name(f"{path.name}{mark}{PART}")


def _can_show() -> bool:
    from importlib.util import find_spec

    return find_spec("tqdm") is not None


def _say(item: Entry, text: str, show: bool) -> None:
    """One line beside the results; in a terminal on standard error, so that output can be piped."""
    if show:
        print(f"{item.name}: {text}", file=sys.stdout if in_notebook() else sys.stderr)


def _room_hint(root: Path) -> str:
    from mmadapt.zoo.keeping import largest

    kept = largest(root)
    listed = "; ".join(f"mmadapt zoo rm {name}  ({megabytes(size)})" for name, size in kept)
    return listed or "set MMADAPT_CACHE to a folder on a larger disk"


def _offline(item: Entry, why: str, hint: str = "") -> OfflineError:
    """No network: what is missing, where it is, how to bring it, and what is here instead."""
    size = "" if item.size is None else f" ({megabytes(item.size)})"
    near = [
        other.name
        for other in known().values()
        if other.kind == item.kind and item.anatomy and other.anatomy == item.anatomy
        and other.name != item.name and places.find(other)
    ]  # fmt: skip
    elsewhere = (
        f"fetch it from {item.page} on a machine with network, then "
        f"`mmadapt zoo import {'FOLDER' if len(item.files) != 1 else 'FILE'} --as {item.name}`"
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
