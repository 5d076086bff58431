"""One entry's files on their way to this machine: what there is, where it goes, room, lock, progress."""

from __future__ import annotations

import contextlib
import errno
import http.client
import os
import re
import shutil
import sys
import urllib.error
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from mmadapt.errors import DownloadError, OfflineError, StorageError
from mmadapt.train.progress import Progress, in_notebook
from mmadapt.zoo import hub, places
from mmadapt.zoo.digests import problem
from mmadapt.zoo.download import PART, fetch_file
from mmadapt.zoo.entries import Entry
from mmadapt.zoo.fetch import reason, request, settings
from mmadapt.zoo.files import COMMIT, File, megabytes

#: room to leave on a disk
MARGIN = 1 << 20


@dataclass
class Transfer:
    """One entry on its way; `run` returns its folder."""

    item: Entry
    patterns: places.Patterns
    token: str | None
    show: bool
    to: str | Path | None

    def run(self) -> Path:
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
            say(self.item, note, self.show)
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
        """The file with the size that a mirror tells, for what is said first; it is not pinned by that."""
        if file.size is not None:
            return file
        urls = self._urls(file, "")
        failures = []
        for url in urls:
            try:
                patience = settings().connect / len(urls)
                with request(url, method="HEAD", connect=patience) as answer:
                    length = answer.headers.get("Content-Length") or ""
                    known = re.fullmatch(r"\d{1,18}", length)
                    return replace(file, size=int(length)) if known else file
            except urllib.error.HTTPError as error:
                error.close()
                return file  # the download itself tells what is wrong
            except (OSError, http.client.HTTPException) as error:
                failures.append(f"{url} cannot be reached: {reason(error)}")
        raise OfflineError("; ".join(failures))

    def _urls(self, file: File, commit: str) -> list[str]:
        if "hf" in self.item.source:
            return [hub.address(self.item.source["hf"], commit, file.path)]
        return [url + file.path if url.endswith("/") else url for url in self.item.source["urls"]]

    def _into(
        self, root: Path, folder: Path, record: places.Record, files: tuple[File, ...]
    ) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        wait = "another process is downloading it; waiting"
        with only_one(folder / ".lock", lambda: say(self.item, wait, self.show)) as alone:
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
                say(self.item, f"not pinned in the manifest; recorded {got}", self.show)
            return folder

    def _say_pin(self, record: places.Record, revision: str) -> None:
        name = f"hf:{self.item.source['hf']}"
        say(
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
        say(self.item, ", ".join([terms, *limits]), self.show)
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


def say(item: Entry, text: str, show: bool) -> None:
    """One line beside the results; in a terminal on standard error, so that output can be piped."""
    if show:
        print(f"{item.name}: {text}", file=sys.stdout if in_notebook() else sys.stderr)


def _room_hint(root: Path) -> str:
    from mmadapt.zoo.keeping import largest

    kept = largest(root)
    listed = "; ".join(f"mmadapt zoo rm {name}  ({megabytes(size)})" for name, size in kept)
    return listed or "set MMADAPT_CACHE to a folder on a larger disk"


@contextlib.contextmanager
def only_one(path: Path, waiting: Callable[[], None]) -> Iterator[bool]:
    """Inside, no other process fetches what this lock file stands for; False where locks do not work."""
    try:
        from filelock import FileLock, Timeout  # torch and huggingface_hub bring it
    except ImportError:
        yield False
        return
    lock = FileLock(str(path))
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            waiting()
            lock.acquire()
    except (OSError, NotImplementedError):  # some network file systems
        yield False
        return
    try:
        yield True
    finally:
        lock.release()
