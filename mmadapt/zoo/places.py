"""Where the files of an entry may lie, looked through in order without a network or a library.

With the package, in shared roots that may be read-only ($MMADAPT_ZOO_PATH), in the own cache, then in
the caches of huggingface_hub, torch.hub and CLIP, used in place.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from mmadapt.errors import StorageError, ZooError
from mmadapt.folders import cache_folder, hub_home
from mmadapt.zoo.digests import write_json
from mmadapt.zoo.entries import Entry
from mmadapt.zoo.files import COMMIT, File, choose, role_of

RECORD = "mmadapt-zoo.json"
Patterns = tuple[str, ...] | None


@dataclass(frozen=True)
class Found:
    """An entry's files on this machine; `where` says in which place."""

    folder: Path
    files: tuple[File, ...]
    where: str
    revision: str = ""
    #: what their server said when they were fetched
    licence: str = ""


def own_root() -> Path:
    """The own cache of downloads."""
    return cache_folder() / "zoo"


def fallback_root() -> Path:
    """Where downloads go when the own cache cannot be written: this user's folder for temporary files."""
    user = os.getuid() if hasattr(os, "getuid") else os.environ.get("USERNAME", "user")
    return Path(tempfile.gettempdir()) / f"mmadapt-{user}" / "zoo"


def shared_roots() -> list[Path]:
    """The roots of $MMADAPT_ZOO_PATH, separated as in PATH; they are read, never written."""
    listed = os.environ.get("MMADAPT_ZOO_PATH", "").split(os.pathsep)
    return [Path(part).expanduser() for part in listed if part]


def roots() -> list[tuple[str, Path]]:
    """Every root laid out by mmadapt, in the order of lookup."""
    found = [("shared", path) for path in shared_roots()] + [("cached", own_root())]
    return [*found, ("temporary", fallback_root())] if _is_own(fallback_root().parent) else found


def _is_own(folder: Path) -> bool:
    """Whether a folder in a place that all may write to was made by this user."""
    try:
        stat = folder.lstat()
    except OSError:
        return False
    return not folder.is_symlink() and (not hasattr(os, "getuid") or stat.st_uid == os.getuid())


def writable_root() -> tuple[Path, str]:
    """The first root that can be written, and a sentence where it is not the own cache."""
    problems = []
    for root in (own_root(), fallback_root()):
        try:
            root.parent.mkdir(
                parents=True, exist_ok=True, mode=0o700 if root == fallback_root() else 0o777
            )
            if root == fallback_root() and not _is_own(root.parent):
                raise PermissionError(13, "belongs to someone else", str(root.parent))
            root.mkdir(exist_ok=True)
            with tempfile.TemporaryFile(dir=root):
                pass
            note = f"{problems[0]}; keeping files in {root}" if problems else ""
            return root, note
        except OSError as error:
            problems.append(f"{root} cannot be written ({error.strerror or error})")
    raise StorageError("; ".join(problems), "set MMADAPT_CACHE to a folder of yours")


def slug(item: Entry) -> str:
    """The name of an entry's folder."""
    return item.name.replace("hf:", "hf--").replace("/", "--")


def name_of(folder: Path) -> str:
    """The entry's name, back from its folder."""
    name = folder.name.replace("--", "/")
    return name.replace("hf/", "hf:", 1) if name.startswith("hf/") else name


def key_of(item: Entry, commit: str = "") -> str:
    """The folder of one version: the commit, or what the digests of the files say."""
    if "hf" in item.source:
        return commit or item.revision
    if item.pinned:
        told = "".join(file.sha256 or file.blob for file in item.files)
        return hashlib.sha256(told.encode()).hexdigest()[:16]
    return "not-pinned"


# -- records ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Record:
    """What a first download has learnt of a version: kept beside it, so that it is pinned from then on."""

    entry: str
    revision: str
    files: tuple[File, ...]
    licence: str = "unknown"


def write_record(folder: Path, record: Record) -> None:
    """Pin a folder to what it holds."""
    write_json(folder / RECORD, {"schema": 1, **asdict(record)})


def read_record(folder: Path) -> Record | None:
    """What was learnt of a folder's content; None where nothing readable is there."""
    try:
        data = json.loads((folder / RECORD).read_bytes())
        files = tuple(File(**file) for file in data["files"])
        return Record(str(data["entry"]), str(data["revision"]), files, str(data["licence"]))
    except (OSError, ValueError, KeyError, TypeError, RecursionError, ZooError):
        return None


def remembered_commit(root: Path, item: Entry, revision: str) -> str:
    """The commit that a branch was at the first download; empty where there was none."""
    try:
        commit = (root / slug(item) / "refs" / revision.replace("/", "--")).read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""
    return commit if COMMIT.fullmatch(commit) else ""


def remember_commit(root: Path, item: Entry, revision: str, commit: str) -> None:
    """Keep which commit a branch was."""
    path = root / slug(item) / "refs" / revision.replace("/", "--")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(commit)


# -- lookup -------------------------------------------------------------------------------------


def find(item: Entry, patterns: Patterns = None) -> Found | None:
    """The first place that has the entry's files, by name and size."""
    return next(candidates(item, patterns), None)


def candidates(item: Entry, patterns: Patterns = None) -> Iterator[Found]:
    """Every place that has the entry's files, by name and size; their digests are not looked at."""
    if "bundled" in item.source:
        from mmadapt.zoo.manifest import data_folder

        yield Found(data_folder() / item.source["bundled"], item.files, "bundled")
        return
    for place in (_in_roots, _in_hub_cache, _by_file_name):
        for found in place(item, patterns):
            if found.files and all(_plausible(found.folder / f.path, f) for f in found.files):
                yield found


def _plausible(path: Path, file: File) -> bool:
    try:
        return path.is_file() and file.size in (None, path.stat().st_size)
    except OSError:
        return False


def wanted(item: Entry, listed: tuple[File, ...], patterns: Patterns) -> tuple[File, ...]:
    """Which files are asked for: the entry's own, or the choice from what a repository has."""
    if item.files and patterns is None:
        known = {file.path: file for file in listed}
        return tuple(file if file.pinned else known.get(file.path, file) for file in item.files)
    if "hf" not in item.source and patterns is None:
        return listed
    return choose(listed or item.files, patterns)


def _in_roots(item: Entry, patterns: Patterns) -> Iterator[Found]:
    for where, root in roots():
        commit = item.revision
        if "hf" in item.source and not COMMIT.fullmatch(commit):
            commit = remembered_commit(root, item, commit or "main")
            if not commit:
                continue
        folder = root / slug(item) / key_of(item, commit)
        record = read_record(folder)
        if record is not None:
            files = wanted(item, record.files, patterns)
            yield Found(folder, files, where, commit, record.licence)
        elif item.pinned and patterns is None:
            yield Found(folder, item.files, where, commit)


def hub_cache() -> Path:
    """The cache of huggingface_hub, by the variables it reads."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(name):
            return Path(os.path.expandvars(os.environ[name])).expanduser()
    return hub_home() / "hub"


def _in_hub_cache(item: Entry, patterns: Patterns) -> Iterator[Found]:
    if "hf" not in item.source:
        return
    repo = hub_cache() / f"models--{item.source['hf'].replace('/', '--')}"
    commit = item.revision
    if not COMMIT.fullmatch(commit):
        with contextlib.suppress(OSError, UnicodeDecodeError):
            commit = (repo / "refs" / (commit or "main")).read_text().strip()
    if not COMMIT.fullmatch(commit):
        return
    folder = repo / "snapshots" / commit
    if item.pinned and patterns is None:
        yield Found(folder, item.files, "hub cache", commit)
    elif folder.is_dir():
        there = tuple(
            _described(path, folder) for path in sorted(folder.rglob("*")) if _usable(path)
        )
        files = wanted(item, there, patterns)
        if any(file.role == "weights" for file in files) or patterns is not None:
            yield Found(folder, files, "hub cache", commit)


def _usable(path: Path) -> bool:
    return path.is_file() and not path.name.startswith(".")


def _described(path: Path, folder: Path) -> File:
    """A file of the hub's cache, whose blobs are named by their digests."""
    name = path.relative_to(folder).as_posix()
    blob = os.path.basename(os.path.realpath(path))
    is_sha256 = len(blob) == 64 and set(blob) <= set("0123456789abcdef")
    is_git = COMMIT.fullmatch(blob) is not None
    size = path.stat().st_size
    return File(name, role_of(name), size, blob if is_sha256 else "", blob if is_git else "")


def _by_file_name(item: Entry, patterns: Patterns) -> Iterator[Found]:
    """Single files that torch.hub or CLIP have fetched; without a digest a name proves nothing."""
    if "urls" not in item.source or len(item.files) != 1 or not item.pinned:
        return
    torch_home = os.environ.get("TORCH_HOME")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    torch_hub = Path(torch_home).expanduser() if torch_home else cache / "torch"
    yield Found(torch_hub / "hub" / "checkpoints", item.files, "torch hub")
    yield Found(cache / "clip", item.files, "CLIP's cache")
