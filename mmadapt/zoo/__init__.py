"""The zoo: backbones and published adapters by name, found, fetched, verified and kept; without torch.

mm.zoo.list("*clip*")            # a table of names
mm.zoo.get("clip/vit-b-16/openai")
mm.zoo.load("tiny/clip")         # the same as mm.load
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmadapt.zoo.entries import Entry
    from mmadapt.zoo.files import File
    from mmadapt.zoo.keeping import cached, import_file, rm, verify, where
    from mmadapt.zoo.loading import load
    from mmadapt.zoo.manifest import entry, list, register, search
    from mmadapt.zoo.obtain import get
    from mmadapt.zoo.upload import Upload, push

#: each comes from its module at its first use: listing needs no HTTP client, and only load needs torch
_HOME = {
    "Entry": "entries",
    "File": "files",
    "Upload": "upload",
    "cached": "keeping",
    "entry": "manifest",
    "get": "obtain",
    "import_file": "keeping",
    "list": "manifest",
    "load": "loading",
    "push": "upload",
    "register": "manifest",
    "rm": "keeping",
    "search": "manifest",
    "verify": "keeping",
    "where": "keeping",
}
__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"mmadapt.zoo.{_HOME[name]}"), name)
    from mmadapt.errors import did_you_mean

    hint = did_you_mean(name, _HOME) if not name.startswith("_") else ""
    raise AttributeError(
        f"module 'mmadapt.zoo' has no attribute {name!r}" + (f"; {hint}" if hint else "")
    )


def __dir__() -> Any:
    return sorted(_HOME)
