"""What tests of the zoo download: one file, and a small repository."""

from __future__ import annotations

import hashlib
from typing import Any

from mmadapt.zoo import Entry, File

WEIGHTS = bytes(range(256)) * 1200  # 307,200 bytes
FILES = {
    "config.json": b'{"model_type": "vit"}',
    "model.safetensors": WEIGHTS,
    "README.md": b"---\nlicense: mit\n---\n",
}
COST = {"progress": False}
LICENCE = {"weights": "MIT", "declared_by": "test"}


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def entry(
    *urls: str, content: bytes = WEIGHTS, pinned: bool = True, name: str = "lab/net", **more: Any
) -> Entry:
    """An entry of one file at `urls`."""
    facts = {"size": len(content), "sha256": sha256(content)} if pinned else {}
    file = File("net.pth", **facts)
    return Entry(name, "a net", "timm:net", {"urls": list(urls)}, (file,), LICENCE, **more)
