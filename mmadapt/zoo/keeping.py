"""The downloads on this machine: what is there, whether it is sound, and how it goes or comes by hand."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from mmadapt.core.table import Table
from mmadapt.errors import ChecksumError, StorageError, ZooError, did_you_mean
from mmadapt.zoo import places
from mmadapt.zoo.digests import compare, digest_of, problem
from mmadapt.zoo.download import PART
from mmadapt.zoo.entries import Entry
from mmadapt.zoo.files import COMMIT, File, choose, megabytes, role_of
from mmadapt.zoo.manifest import data_folder, known
from mmadapt.zoo.obtain import resolve

#: what `verify` says of files that are not damaged
SOUND = ("sound", "no digest is known")


def _kept(root: Path) -> Iterator[tuple[str, Path]]:
    """(entry's name, folder) of everything in a root."""
    for folder in sorted(root.glob("*--*")) if root.is_dir() else ():
        if folder.is_dir():
            yield places.name_of(folder), folder


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def largest(root: Path, n: int = 3) -> list[tuple[str, int]]:
    """Names and sizes of the largest entries in a root."""
    sizes = [(name, _bytes(folder)) for name, folder in _kept(root)]
    return sorted(sizes, key=lambda pair: -pair[1])[:n]


def cached() -> Table:
    """What mmadapt has downloaded, in every root: name, size, what is still on its way, and where."""
    table = Table(("name", "MB", "state", "folder"))
    total = 0
    for _, root in places.roots():
        for name, folder in _kept(root):
            size = _bytes(folder)
            total += size
            parts = [path for path in folder.rglob(f"*{PART}")]
            whole = any((child / places.RECORD).exists() for child in folder.iterdir())
            state = "whole" if whole and not parts else "partly downloaded"
            table.rows.append((name, f"{size / 1e6:.1f}", state, str(folder)))
    table.title = f"{len(table)} downloads, {megabytes(total)}"
    return table


def where() -> Table:
    """The places that are looked through, in order, and what the environment says about them."""
    rows = [(kind, path, "read") for kind, path in places.roots() if kind == "shared"]
    own = [(kind, path, "read and write") for kind, path in places.roots() if kind != "shared"]
    rows = [("bundled", data_folder(), "read"), *rows, *own]
    rows.append(("hub cache", places.hub_cache(), "used in place"))
    table = Table(("place", "folder", "use", "there", "MB free"))
    for kind, path, use in rows:
        there = path.exists()
        free = f"{shutil.disk_usage(path).free / 1e6:.0f}" if there else None
        table.rows.append((kind, str(path), use, there, free))
    for name in ("MMADAPT_CACHE", "MMADAPT_ZOO", "MMADAPT_ZOO_PATH", "HF_HOME", "HF_ENDPOINT"):
        if os.environ.get(name):
            table.notes.append(f"{name}={os.environ[name]}")
    return table


def verify(what: str | Entry | None = None) -> Table:
    """Hash the files of one entry, or of everything that is downloaded, anew: one row a file.

    `state` is "sound" or what is wrong; a file whose digest nobody knows says so.
    """
    table = Table(("name", "file", "MB", "state"))
    for name, folder, files in _recorded() if what is None else [_located(what)]:
        for file in files:
            path = folder / file.path
            wrong = problem(path, file, again=True)
            state = wrong or ("sound" if file.pinned else "no digest is known")
            size = f"{path.stat().st_size / 1e6:.1f}" if path.is_file() else None
            table.rows.append((name, file.path, size, state))
    bad = sum(row[3] not in SOUND for row in table.rows)
    table.title = f"{len(table)} files, {bad} damaged"
    return table


def _located(what: str | Entry) -> tuple[str, Path, tuple[File, ...]]:
    item = resolve(what)
    found = places.find(item)
    if found is None:
        raise ZooError(f"{item.name} is not on this machine", f"mmadapt.zoo.get({item.name!r})")
    return item.name, found.folder, found.files


def _recorded() -> Iterator[tuple[str, Path, tuple[File, ...]]]:
    """Everything in the roots, by the records beside it: a repository's files that were fetched."""
    for _, root in places.roots():
        for name, folder in _kept(root):
            for record in sorted(folder.glob(f"*/{places.RECORD}")):
                known = places.read_record(record.parent)
                files = known.files if known else ()
                there = tuple(file for file in files if (record.parent / file.path).is_file())
                yield name, record.parent, there


def rm(pattern: str, dry_run: bool = False) -> Table:
    """Remove downloads whose names match the glob `pattern` from the own cache; nowhere else.

    zoo.rm("sam/*", dry_run=True)
    """
    roots = [root for kind, root in places.roots() if kind != "shared"]
    all_kept = [(name, folder) for root in roots for name, folder in _kept(root)]
    chosen = [(n, folder) for n, folder in all_kept if fnmatchcase(n, pattern)]
    if not chosen:
        names = [name for name, _ in all_kept]
        hint = did_you_mean(pattern, names) or "mmadapt.zoo.cached() shows what there is"
        raise ZooError(f"nothing in the cache matches {pattern!r}", hint)
    table = Table(("name", "MB", "folder"))
    total = 0
    for name, folder in chosen:
        size = _bytes(folder)
        total += size
        table.rows.append((name, f"{size / 1e6:.1f}", str(folder)))
        if not dry_run:
            _remove(folder)
    table.title = f"{megabytes(total)} {'would be' if dry_run else 'were'} removed"
    return table


def _remove(folder: Path) -> None:
    """The records first, so that a removal that is cut short leaves nothing that passes for whole."""
    try:
        for path in [*folder.rglob(places.RECORD), *folder.glob("refs/*")]:
            path.unlink()
        shutil.rmtree(folder)
    except OSError as error:
        raise StorageError(f"{folder} cannot be removed: {error.strerror or error}") from None


# -- files fetched by hand ----------------------------------------------------------------------


def import_file(path: str | Path, name: str | Entry | None = None) -> Path:
    """Take a file or folder that was fetched by hand into the cache; the entry's folder.

    Without `name`, the entry whose file has this sha256 is meant. Digest and size have to be as the manifest
    says; where it does not, what is given is recorded.

        zoo.import_file("~/Downloads/sam_vit_b_01ec64.pth")
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise ZooError(f"there is no {path}")
    digests = {} if path.is_dir() else {path: digest_of(path)}
    item = _entry_of(path, digests) if name is None else resolve(name)
    pairs = list(_pairs(path, item))
    for source, file in pairs:
        found = digests.get(source) or digest_of(source)
        digests[source] = found
        size = source.stat().st_size
        wrong = (
            f"it has {size} bytes, expected {file.size}" if file.size not in (None, size) else ""
        )
        wrong = wrong or compare(source, file, found)
        if wrong:
            raise ChecksumError(
                f"{source} is not {item.name}'s {file.path}: {wrong}", "fetch it again"
            )
    root, _ = places.writable_root()
    key = places.key_of(item)
    if "hf" in item.source and not COMMIT.fullmatch(key):  # which commit it was, nobody can tell
        told = "".join(digests[source][0] for source, _ in pairs)
        key = hashlib.sha1(told.encode(), usedforsecurity=False).hexdigest()
        places.remember_commit(root, item, item.revision or "main", key)
    folder = root / places.slug(item) / key
    files = []
    for source, file in pairs:
        target = folder / file.path
        target.parent.mkdir(parents=True, exist_ok=True)
        _copy(source, target)
        files.append(File(file.path, file.role, source.stat().st_size, digests[source][0]))
    record = places.Record(item.name, item.revision, tuple(files), item.licence["weights"])
    places.write_record(folder, record)
    return folder


def _copy(source: Path, target: Path) -> None:
    """A copy that is whole or not there."""
    part = target.with_name(target.name + PART)
    try:
        shutil.copyfile(source, part)
        os.replace(part, target)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise StorageError(
            f"{source} cannot be copied to {target}: {error.strerror or error}"
        ) from None


def _entry_of(path: Path, digests: dict[Path, tuple[str, str]]) -> Entry:
    """The entry that a file belongs to, by its digest."""
    if path.is_dir():
        raise ZooError(f"{path} is a folder: whose?", "say which entry it is: --as NAME")
    sha256 = digests[path][0]
    for item in known().values():
        if any(file.sha256 == sha256 for file in item.files):
            return item
    named = [i.name for i in known().values() if any(f.path == path.name for f in i.files)]
    hint = f"--as {named[0]} takes it as that" if named else "say which entry it is: --as NAME"
    if named and any(f.sha256 for f in known()[named[0]].files):
        hint = f"it is called as {named[0]}'s file and holds something else: fetch it again"
    raise ZooError(f"no entry has a file with sha256 {sha256}", hint)


def _pairs(path: Path, item: Entry) -> Iterator[tuple[Path, File]]:
    """(given file, what it is in the entry)."""
    if path.is_dir():
        there = tuple(
            File(p.relative_to(path).as_posix(), role_of(p.name), p.stat().st_size)
            for p in sorted(path.rglob("*"))
            if p.is_file() and not p.name.startswith(".")
        )
        wanted = item.files or choose(there, None)
        for file in wanted:
            if not (path / file.path).is_file():
                raise ZooError(f"{path} has no {file.path}, which {item.name} needs")
            yield path / file.path, file
        if not wanted:
            raise ZooError(f"{path} holds nothing that {item.name} could be loaded from")
        return
    if not item.files and "manual" in item.source:
        yield path, File(path.name, role_of(path.name))
        return
    own = [file for file in item.files if file.path.rpartition("/")[2] == path.name]
    own = own or [f for f in item.files if f.role == "weights"]
    if len(item.files) > 1 or not own:
        raise ZooError(
            f"{item.name} is more than one file", "give the folder that holds all of them"
        )
    yield path, own[0]
