"""Zip files of adapters, opened without trusting them.

Every name, size and kind is checked before a byte is written. What is unpacked goes to a folder of its
own in the system's temporary directory, which is removed again.
"""

from __future__ import annotations

import contextlib
import shutil
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from mmadapt.errors import AdapterFileError

#: an adapter is a handful of files
MOST_FILES = 1000
#: numbers hardly shrink and text tenfold; more is made to fill disks
MOST_GROWTH, FREE_GROWTH = 100, 1 << 20
_BLOCK = 1 << 20


@contextlib.contextmanager
def unpacked(path: Path) -> Iterator[Path]:
    """The files of a zip, in a folder that is removed at the end of the block.

    Raises `AdapterFileError`, having written nothing, for names that lead out of the folder, links,
    names that stand there twice, encrypted parts, and more bytes than an adapter's zip can hold; and,
    having removed what was written, for contents that are damaged.
    """
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise AdapterFileError(f"{path} is damaged or no zip: {error}", "copy it again") from None
    with archive:
        members = archive.infolist()
        _check(path, members)
        with tempfile.TemporaryDirectory(prefix="mmadapt-") as folder:
            for member in members:
                _unpack(path, archive, member, Path(folder))
            yield Path(folder)


def _check(path: Path, members: list[zipfile.ZipInfo]) -> None:
    seen: set[str] = set()
    for member in members:
        reason = _why_not(member)
        place = member.filename.rstrip("/").casefold()  # some file systems do not tell cases apart
        if not reason and place in seen:
            reason = "stands there twice"
        if reason:
            raise AdapterFileError(
                f"{path} is refused: {member.filename!r} {reason}",
                "nothing was unpacked; make a new zip of the adapter's folder",
            )
        seen.add(place)
    total = sum(member.file_size for member in members)
    allowed = MOST_GROWTH * path.stat().st_size + FREE_GROWTH
    if len(members) > MOST_FILES or total > allowed:
        raise AdapterFileError(
            f"{path} is refused: it would unpack to {len(members)} files of {total:,} bytes",
            f"expected at most {MOST_FILES} files of {allowed:,} bytes; unzip it yourself if you trust it",
        )
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if total > free:
        raise AdapterFileError(
            f"{path} unpacks to {total:,} bytes, and {tempfile.gettempdir()} has {free:,} left",
            "unzip it elsewhere and give the folder",
        )


def _why_not(member: zipfile.ZipInfo) -> str:
    name = member.filename
    if not name or "\0" in name or "\\" in name or ":" in name:
        return "is no plain name"
    if name.startswith("/"):
        return "is an absolute name"
    if any(part in ("..", ".") for part in name.split("/")):
        return "leads out of the folder"
    if not PurePosixPath(name).parts or "//" in name:
        return "is no plain name"
    kind = stat.S_IFMT(member.external_attr >> 16)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "is a link or a device"
    if member.flag_bits & 1:
        return "is encrypted"
    return ""


def _unpack(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo, folder: Path) -> None:
    target = folder.joinpath(*PurePosixPath(member.filename).parts)
    try:
        if member.is_dir():
            target.mkdir(parents=True, exist_ok=True)
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        left = member.file_size
        with archive.open(member) as source, target.open("xb") as file:
            while block := source.read(_BLOCK):
                left -= len(block)
                if left < 0:
                    raise zipfile.BadZipFile("it is longer than its directory says")
                file.write(block)
    except (
        zipfile.BadZipFile,
        zlib.error,
        OSError,
        EOFError,
        ValueError,
        NotImplementedError,
    ) as error:
        raise AdapterFileError(
            f"{path} cannot be unpacked at {member.filename!r}: {error}", "copy it again"
        ) from None
