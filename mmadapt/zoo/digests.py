"""Whether a file on this machine is what its size and digest promise; what was hashed once is remembered."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from mmadapt.folders import cache_folder
from mmadapt.zoo.files import File

BLOCK = 1 << 20
#: what was verified in this process, where no stamp can be written
_VERIFIED: dict[str, Any] = {}


def digest_of(path: Path) -> tuple[str, str]:
    """The sha256 of a file, and the name git would give it (empty above 64 MB, which no hub keeps in git)."""
    size = path.stat().st_size
    sha256 = hashlib.sha256()
    git = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    small = size < 64 * BLOCK
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            sha256.update(block)
            if small:
                git.update(block)
    return sha256.hexdigest(), git.hexdigest() if small else ""


def difference(path: Path, file: File) -> str:
    """What of a file is not as promised, in words; empty when all is."""
    if not path.is_file():
        return "it is missing"
    if file.size is not None and path.stat().st_size != file.size:
        return f"it has {path.stat().st_size} bytes, expected {file.size}"
    return compare(path, file, digest_of(path)) if file.pinned else ""


def compare(path: Path, file: File, digests: tuple[str, str]) -> str:
    """What of the digests is not as promised, in words; a web page in place of a file is told too."""
    sha256, blob = digests
    if file.sha256 and file.sha256 != sha256:
        return f"its sha256 is {sha256[:12]}…, expected {file.sha256[:12]}…"
    if file.blob and not file.sha256 and file.blob != blob:
        return f"its digest in git is {blob[:12]}…, expected {file.blob[:12]}…"
    if not file.pinned and is_page(path) and not file.path.endswith((".html", ".htm", ".md")):
        return "it is a web page"
    return ""


def is_page(path: Path) -> bool:
    """Whether a file begins as web pages do."""
    with open(path, "rb") as file:
        head = file.read(256).lstrip().lower()
    return head.startswith((b"<!doctype html", b"<html", b"<head"))


def problem(path: Path, file: File, again: bool = False) -> str:
    """`difference`, by what is remembered where size and time of change are the same; `again` hashes anew."""
    try:
        stat = path.stat()
    except OSError:
        return "it is missing"
    stamp = {
        "size": stat.st_size,
        "changed": stat.st_mtime_ns,
        "digest": file.sha256 or file.blob,
    }
    if not again and file.pinned and _remembered(path) == stamp:
        return ""
    wrong = difference(path, file)
    if not wrong and file.pinned:
        _remember(path, stamp)
    return wrong


def _place(path: Path) -> Path:
    name = hashlib.sha256(str(path.absolute()).encode()).hexdigest()[:32]
    return cache_folder() / "zoo" / "stamps" / f"{name}.json"


def _remembered(path: Path) -> Any:
    try:
        return json.loads(_place(path).read_bytes())
    except (OSError, ValueError):
        return _VERIFIED.get(str(path.absolute()))


def _remember(path: Path, stamp: dict[str, Any]) -> None:
    _VERIFIED[str(path.absolute())] = stamp
    with contextlib.suppress(OSError):  # beside a read-only cache, once a process
        write_json(_place(path), stamp)


def write_json(path: Path, data: Any) -> None:
    """A file that is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(data, file, indent=1)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
