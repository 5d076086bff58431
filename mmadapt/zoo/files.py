"""The files of an entry or a repository: what tells one from others, what each is for, which are wanted."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from mmadapt.errors import ZooError

COMMIT = re.compile(r"[0-9a-f]{40}")
SHA256 = re.compile(r"[0-9a-f]{64}")
#: what a backbone needs beside its weights
BESIDE = (
    "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "bpe.txt.gz", "README.md", "LICENSE*",
)  # fmt: skip
TOKENIZER = (
    "bpe.txt.gz",
    "chat_template.jinja",
    "merges.txt",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
)
OPEN_CLIP = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
WEIGHTS = (
    "model.safetensors",
    "model-*-of-*.safetensors",
    "*.safetensors",
    "pytorch_model.bin",
    "pytorch_model-*-of-*.bin",
)


@dataclass(frozen=True)
class File:
    """One file of an entry; without a digest it is not pinned."""

    path: str
    role: str = "weights"
    size: int | None = None
    sha256: str = ""
    #: git's name of the content, where a hub tells no sha256
    blob: str = ""

    def __post_init__(self) -> None:
        require_inside(self.path)
        if self.size is not None and (type(self.size) is not int or self.size < 0):
            raise ZooError(f"{self.path}: size is {self.size!r}, expected a count of bytes")
        for name, pattern in (("sha256", SHA256), ("blob", COMMIT)):
            value = getattr(self, name)
            if value and not (isinstance(value, str) and pattern.fullmatch(value)):
                raise ZooError(f"{self.path}: {name} is {value!r}, expected lower-case hex digits")

    @classmethod
    def of(cls, path: str | Path) -> File:
        """A file on this machine, with its size and digest, as an entry pins it."""
        from mmadapt.zoo.digests import digest_of

        path = Path(path).expanduser()
        return cls(path.name, role_of(path.name), path.stat().st_size, digest_of(path)[0])

    @property
    def pinned(self) -> bool:
        """Whether a copy can be told from any other."""
        return bool(self.sha256 or self.blob)


def role_of(path: str) -> str:
    """What a file of a repository is for, by its name."""
    name = path.rpartition("/")[2]
    if name.endswith((".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".npz", ".h5", ".msgpack")):
        return "weights"
    if "token" in name or name in TOKENIZER:
        return "tokenizer"
    if "processor" in name:
        return "preprocessing"
    return "config" if name.endswith(".json") else "text"


def choose(files: tuple[File, ...], patterns: tuple[str, ...] | None) -> tuple[File, ...]:
    """The files that are wanted: those of `patterns`, else the weights in their safest form and what is beside."""
    if patterns is not None:
        return tuple(file for file in files if any(fnmatchcase(file.path, p) for p in patterns))
    top = [file for file in files if "/" not in file.path]
    weights: list[File] = []
    both = any(
        file.path == "open_clip_config.json" for file in top
    )  # timm's weights may lie beside
    for pattern in (*(OPEN_CLIP if both else ()), *WEIGHTS):
        weights = [file for file in top if fnmatchcase(file.path, pattern)]
        if weights:
            break
    beside = [file for file in top if any(fnmatchcase(file.path, p) for p in BESIDE)]
    kind = ".safetensors" if weights and weights[0].path.endswith(".safetensors") else ".bin"
    kept = [f for f in beside if not f.path.endswith(".index.json") or kind in f.path]
    return tuple(dict.fromkeys([*weights, *kept]))


def require_inside(path: Any) -> None:
    """A relative path that stays inside its folder on every system; everything else is refused."""
    parts = PurePosixPath(path).parts if isinstance(path, str) else ()
    fine = (
        bool(parts)
        and not any(part in ("..", "/") or part.startswith("//") for part in parts)
        and not re.search(r"[\x00-\x1f\\:*?\"<>|]", path)
        and len(path) < 500
    )
    if not fine:
        raise ZooError(
            f"the path {path!r} is not a plain one inside its folder",
            "manifests, hubs and archives may name files in their own folder only",
        )


def megabytes(size: float) -> str:
    """Bytes for people: 12 kB · 375.0 MB · 2.56 GB."""
    if size < 1e6:
        return f"{size / 1e3:.0f} kB" if size >= 1e3 else f"{size:.0f} bytes"
    return f"{size / 1e6:.1f} MB" if size < 1e9 else f"{size / 1e9:.2f} GB"
