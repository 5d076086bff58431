"""What readers and writers of other people's files have in common: strictness and a report."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmadapt.core.attached import require_bank, require_name
from mmadapt.core.backbone import unwrap
from mmadapt.errors import AdapterError, AdapterFileError

if TYPE_CHECKING:
    from torch import Tensor

    from mmadapt.core.attachment import Attachment


@dataclass(frozen=True)
class ForeignFile:
    """What was read or written: the layout, how many tensors, and what deserves a word."""

    layout: str
    tensors: int
    #: keys that were there and were not taken, such as gates of layers without tokens
    ignored: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    attachment: Attachment | None = field(default=None, repr=False)
    #: keys among the tensors that were taken in another form, such as the change from the backbone
    converted: tuple[str, ...] = ()
    #: keys of the backbone itself that the file could have had
    missing: tuple[str, ...] = ()
    #: entries beside the tensors, such as an optimiser
    dropped: tuple[str, ...] = ()
    #: a module beside the backbone that the file holds, such as what makes features of images
    encoder: Any = field(default=None, repr=False)

    def __str__(self) -> str:
        counts = {"skipped": self.ignored, "missing": self.missing, "dropped": self.dropped}
        lines = [
            f"{self.layout}: {self.tensors} tensors loaded, {len(self.converted)} of them converted",
            *(f"  {len(keys)} {word}: {some(keys)}" for word, keys in counts.items() if keys),
            *(f"  {note}" for note in self.notes),
        ]
        return "\n".join(lines)


def parts(m: Any, name: str | None) -> tuple[Any, dict[str, Any], int]:
    """The record of an attachment, its layers by file key, and how many layers the backbone has."""
    _, bank = require_bank(m)
    name = require_name(bank, name, "write")
    return bank.records[name], dict(bank.layers_of(name)), depth_of(m)


def attention_of(m: Any) -> Any:
    """What the attention of the first layer does; `AdapterFileError` where there is no such site."""
    model, anatomy, _ = unwrap(m)
    spans = anatomy.roles(model)
    role = "text.layers[0].attn.heads"
    if role not in spans:
        raise AdapterFileError(
            f"LLaMA-Adapter files fit decoders with the site {role!r}, which "
            f"{type(model).__name__} does not have"
        )
    return anatomy.view(model, role, "in", spans[role]).attention


def depth_of(m: Any) -> int:
    """How many layers the decoder has."""
    attention_of(m)
    model, anatomy, _ = unwrap(m)
    return sum(role.endswith("attn.heads") for role in anatomy.roles(model))


def refuse_keys(
    missing: Sequence[str], unexpected: Sequence[str], shapes: Sequence[str] = ()
) -> None:
    """Raise `AdapterFileError` where keys are missing or unexpected, or tensors of another shape."""
    parts = [
        f"{len(keys)} {what}: {some(keys)}"
        for what, keys in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", shapes),
        )
        if keys
    ]
    if parts:
        raise AdapterFileError("the file does not fit: " + ". ".join(parts), "nothing was attached")


@contextlib.contextmanager
def told_of(path: Path) -> Iterator[None]:
    """Settings and tensors that no layer can be made of are the file's mistake: say which file's."""
    try:
        yield
    except (AdapterError, AdapterFileError) as error:
        text = error.message if str(path) in error.message else f"{path}: {error.message}"
        kind = type(error) if isinstance(error, AdapterFileError) else AdapterFileError
        raise kind(text, error.hint) from None


def some(keys: Any) -> str:
    """The first few of several names."""
    keys = list(keys)
    return ", ".join(keys[:4]) + (" …" if len(keys) > 4 else "") or "nothing"


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of a `.bin` or `.pth` that `load_pickle` reads."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if path.suffix != ".safetensors":
        return load_pickle(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterFileError(f"{path} is no safetensors file: {error}") from None


def load_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.pth` file, or of its entry "model", read without running code."""
    return load_checkpoint(path, ("model",))[0]


def load_checkpoint(path: Path, entries: tuple[str, ...]) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of a `.pth` file or of the first of these entries in it, and its other entries.

    Read without running code: of what is no tensor only plain values and numpy's numbers.
    """
    import torch

    stored = unpickled(path)
    others: list[str] = []
    held = [k for k in entries if isinstance(stored, dict) and isinstance(stored.get(k), dict)]
    if held:
        others = [str(key) for key in stored if key != held[0]]
        stored = stored[held[0]]
    if not isinstance(stored, dict) or not all(
        isinstance(v, torch.Tensor) for v in stored.values()
    ):
        raise AdapterFileError(
            f"{path} holds something else than tensors by name",
            f"it holds {some(map(str, stored))}" if isinstance(stored, dict) else "",
        )
    return stored, others


def unpickled(path: Path, device: str = "cpu") -> Any:
    """What a `.pth` file holds, read without running code: tensors, plain values, numpy's numbers."""
    import torch

    if not path.is_file():
        raise AdapterFileError(
            f"there is no file {path}" if not path.exists() else f"{path} is a folder"
        )
    try:
        with torch.serialization.safe_globals(_numbers()):
            return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:
        raise AdapterFileError(f"{path} cannot be read as tensors: {error}") from error


def checkpoint_keys(path: Path) -> list[str]:
    """The names in a file of tensors, of those in an entry of it too; numbers are not read."""
    from safetensors import SafetensorError, safe_open

    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                return list(file.keys())
        except (SafetensorError, OSError, ValueError) as error:
            raise AdapterFileError(f"{path} is no safetensors file: {error}") from None
    stored = unpickled(path, "meta")
    if not isinstance(stored, dict):
        raise AdapterFileError(f"{path} holds {type(stored).__name__}, expected tensors by name")
    below = [key for value in stored.values() if isinstance(value, dict) for key in value]
    return [str(key) for key in (*stored, *below)]


def _numbers() -> list[Any]:
    """What pickled numbers of numpy are made of, under both names that its versions write."""
    import numpy

    made: Any = numpy.float64(0).__reduce__()[0]
    return [
        (made, "numpy.core.multiarray.scalar"),
        (made, "numpy._core.multiarray.scalar"),
        numpy.dtype,
        *(type(numpy.dtype(kind)) for kind in ("float32", "float64", "int64")),
    ]


def install_tensors(
    m: Any, adapters: Any, name: str, values: dict[str, Tensor], replace: bool = False
) -> Attachment:
    """Attach adapters at their own sites with these tensors; nothing is changed if any is wrong."""
    from mmadapt.core.attach import resolve
    from mmadapt.core.install import install

    model, anatomy, entry = unwrap(m)
    sites = [resolve(model, anatomy, one, None) for one in adapters]
    return install(
        model, anatomy, entry, tuple(adapters), sites, name, replace=replace, tensors=values
    )
