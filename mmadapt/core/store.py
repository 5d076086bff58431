"""Adapter files: `adapter.json` to read, `adapter.safetensors` for the numbers.

The tensors are keyed by site names, so files survive renamed modules. The safetensors file carries
the manifest in its header too: it alone decides, and a save that is killed half-way leaves the old
adapter or the new one.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmadapt.core.attached import require_bank, require_name
from mmadapt.core.card import CARD, card, may_replace
from mmadapt.core.site import BIAS, stem
from mmadapt.core.table import shape_of
from mmadapt.errors import AdapterFileError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mmadapt.core.anatomy import Anatomy
    from mmadapt.core.site import Span

SCHEMA = 2
#: what is told of an adapter where it is known: how images and prompts have to be given, what it was
#: trained on, whose file it was read from
TOLD = ("input", "data", "origin")
MANIFEST = "adapter.json"
TENSORS = "adapter.safetensors"


def save(
    m: Any,
    path: str | Path,
    name: str | None = None,
    *,
    licence: str | None = None,
    metrics: dict[str, Any] | None = None,
    data: str | None = None,
) -> Path:
    """Write one attachment to the folder `path` (created if need be) and return it.

    Only the adapter is written: `adapter.json` (what it is, where it stands, the backbone it was
    made for) and `adapter.safetensors`, and a `README.md` that tells the same to people, where there
    is none of another's. `licence`, `metrics` and `data`, what it was trained on, stand in both. Without
    a name exactly one must be attached. Where several processes train together the first one writes;
    where FSDP2 shards the adapter all have to call.
    """
    return write(Path(path).expanduser(), *content(m, name, licence, metrics, data))


def content(
    m: Any,
    name: str | None = None,
    licence: str | None = None,
    metrics: dict[str, Any] | None = None,
    data: str | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The manifest and the tensors of one attachment, as `save` writes them."""
    model, bank = require_bank(m)
    name = require_name(bank, name, "save")
    record = bank.records[name]
    tensors = {
        f"{key}/{tensor}": _whole(value.detach()).cpu().contiguous()
        for key, layer in bank.tensors_of(name)
        for tensor, value in layer.to_file().items()
    }
    manifest = {
        "schema": SCHEMA,
        "name": name,
        "adapters": [
            {**adapter.to_json(), "sites": list(sites)}
            for adapter, sites in zip(record.adapters, record.sites, strict=True)
        ],
        "backbone": backbone_card(model, bank.anatomy, bank.entry, bank.anatomy.roles(model)),
        "tensors": {key: shape_of(value) for key, value in sorted(tensors.items())},
        "versions": _versions(),
        "licence": licence or record.metadata.get("licence"),
        "metrics": metrics or record.metadata.get("metrics") or {},
    }
    told = {**record.metadata, "data": data or record.metadata.get("data")}
    manifest |= {part: told[part] for part in TOLD if told.get(part)}
    return manifest, tensors


def write(folder: Path, manifest: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    """The files of an adapter, each whole or not at all."""
    files = to_files(manifest, tensors)
    if folder.exists() and not folder.is_dir():
        raise AdapterFileError(f"{folder} is a file", "adapters are saved to a folder")
    if not writes():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        if name != CARD or may_replace(folder / name):
            replace_file(folder / name, content)
    return folder


def to_files(
    manifest: dict[str, Any], tensors: dict[str, Tensor], source: str = ""
) -> dict[str, bytes]:
    """The files of an adapter by name, the one that decides first; `source` is the hub id it will have."""
    from safetensors.torch import save as to_bytes

    try:
        text = json.dumps(manifest, indent=1, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise AdapterFileError(
            f"metrics, licence, data or input cannot be written as JSON: {error}",
            "use plain finite numbers and text",
        ) from None
    return {
        TENSORS: to_bytes(tensors, metadata={"mmadapt": text}),
        MANIFEST: (text + "\n").encode(),
        CARD: card(manifest, source).encode(),
    }


def _whole(tensor: Any) -> Tensor:
    """A tensor that FSDP2 sharded, gathered from all processes; any other as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def writes() -> bool:
    """Whether this is the first of the processes that train together, or the only one."""
    from torch import distributed

    return not (
        distributed.is_available() and distributed.is_initialized() and distributed.get_rank()
    )


def replace_file(path: Path, content: bytes) -> None:
    """Write a file so that a reader, or a crash, sees the old content or the new, never a part."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def backbone_card(
    model: nn.Module, anatomy: Anatomy, entry: Any, spans: dict[str, Span]
) -> dict[str, Any]:
    """What a file says of the backbone it was made for."""
    hub = (getattr(entry, "source", None) or {}).get("hf")
    return {
        "zoo": getattr(entry, "name", None),
        **({"hub": hub} if hub else {}),
        "revision": getattr(entry, "revision", None),
        "sha256": getattr(entry, "sha256", None),
        "class": _class_name(model),
        "family": anatomy.family,
        "facts": anatomy.facts(model) if anatomy.facts else {},
        "widths": _widths(model, anatomy, spans),
    }


def _class_name(model: nn.Module) -> str:
    """The model's own class, where FSDP2 has put one of its making before it."""
    own = next(c for c in type(model).__mro__ if not c.__module__.startswith("torch.distributed."))
    return f"{own.__module__}.{own.__qualname__}"


def _widths(model: nn.Module, anatomy: Anatomy, spans: dict[str, Span]) -> dict[str, list[int]]:
    """[inputs, outputs] of the first site of each kind: alike sites are alike in every layer."""
    found: dict[str, list[int]] = {}
    for role, span in spans.items():
        kind = stem(role)
        if kind not in found and not kind.endswith(f".{BIAS}"):  # as wide as what it stands beside
            view = anatomy.view(model, role, span.ports[0], span)
            found[kind] = [view.width_in, view.width]
    return found


def _versions() -> dict[str, str]:
    import torch

    import mmadapt

    return {"mmadapt": mmadapt.__version__, "torch": torch.__version__}
