"""The adapter that a demo keeps: its size, and whether another process scores it the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from mmadapt.errors import CheckError


def size(folder: Path) -> str:
    """Of all files in a folder, in kB."""
    return f"{sum(file.stat().st_size for file in folder.iterdir()) / 1000:.0f} kB"


def confirm(demo: str, adapter: Path, here: dict[str, Any]) -> None:
    """Load the adapter where nothing of this process is left; `CheckError` unless it scores as `here`."""
    threads = str(torch.get_num_threads())
    command = [sys.executable, "-m", "mmadapt", "demo", demo, "--threads", threads]
    done = subprocess.run(
        [*command, "--verify", str(adapter)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise CheckError(f"the second process failed:\n{done.stderr.strip()[-2000:]}")
    there = json.loads(done.stdout.strip().splitlines()[-1])
    if there != here:
        raise CheckError(
            f"the saved adapter scores {there} in a second process, {here} here",
            "this should not happen; please report it with both numbers",
        )
