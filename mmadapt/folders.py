"""Where mmadapt keeps on disk what it can make again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Where mmadapt keeps what it can make again: $MMADAPT_CACHE, else the user's cache folder."""
    chosen = os.environ.get("MMADAPT_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mmadapt"
