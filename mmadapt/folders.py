"""Where mmadapt, and others whose files it uses, keep what they can make or fetch again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """$MMADAPT_CACHE, else the user's cache folder; read anew at every call."""
    chosen = os.environ.get("MMADAPT_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    if os.name == "nt" and "XDG_CACHE_HOME" not in os.environ:
        return Path(os.environ.get("LOCALAPPDATA") or "~/AppData/Local").expanduser() / "mmadapt"
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mmadapt"


def hub_home() -> Path:
    """Where huggingface_hub keeps its token and its cache."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(os.path.expandvars(os.environ.get("HF_HOME") or default)).expanduser()
