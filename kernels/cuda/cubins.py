"""Compiled kernels, kept on disk by the digest of all that they depend on.

A file is a line of JSON, with the size and digest of the machine code below it. What does not agree
with its line is compiled again. `MMADAPT_CUBINS` is a folder, or `off` to keep nothing.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import tempfile
import warnings
from pathlib import Path

from mmadapt.folders import cache_folder

from . import compiler
from .compiler import Compiled


def folder() -> Path | None:
    """Where compiled kernels are kept, or None."""
    asked = os.environ.get("MMADAPT_CUBINS")
    if asked == "off":
        return None
    return Path(asked).expanduser() if asked else cache_folder() / "cubins"


def digest(expression: str, architecture: str) -> str:
    """Of source, instance, architecture, NVRTC's version and options."""
    parts = (compiler.source(), expression, architecture, compiler.version(), compiler.OPTIONS)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def kept(expression: str, architecture: str) -> Compiled:
    """The compiled instance from disk, or compiled now and kept for the next process."""
    place = folder()
    path = place / f"{digest(expression, architecture)}.kernel" if place else None
    found = read(path) if path else None
    if found is None:
        found = compiler.compile_(expression, architecture)
        if path:
            try:
                write(path, found)
            except OSError as error:
                _say_once(path.parent, error.strerror or str(error))
    return found


def read(path: Path) -> Compiled | None:
    """What `write` put there; None for a file that is not there, cut short or changed."""
    try:
        line, _, cubin = path.read_bytes().partition(b"\n")
        head = json.loads(line)
        if head["size"] == len(cubin) and head["sha256"] == hashlib.sha256(cubin).hexdigest():
            return Compiled(cubin, str(head["function"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None  # compiling again mends all of these, or says why it cannot
    return None


def write(path: Path, compiled: Compiled) -> None:
    """At once or not at all, however many processes do so."""
    head = {
        "function": compiled.function,
        "size": len(compiled.cubin),
        "sha256": hashlib.sha256(compiled.cubin).hexdigest(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem[:16]}-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(json.dumps(head).encode() + b"\n" + compiled.cubin)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


@functools.cache
def _say_once(place: Path, reason: str) -> None:
    warnings.warn(
        f"compiled kernels cannot be kept in {place} ({reason}), so every process compiles them; "
        "set MMADAPT_CUBINS to another folder, or to 'off'",
        UserWarning,
        stacklevel=2,
    )
