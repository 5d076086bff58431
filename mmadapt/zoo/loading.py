"""From a zoo name, a hub id or a folder to a backbone, at the speed of the disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmadapt.core.backbone import Backbone
from mmadapt.errors import ZooError, did_you_mean
from mmadapt.zoo.entries import Entry
from mmadapt.zoo.obtain import get, here, resolve

if TYPE_CHECKING:
    import torch

    from mmadapt.zoo.places import Found

PRECISIONS = {
    "fp32": "float32",
    "float32": "float32",
    "fp16": "float16",
    "float16": "float16",
    "bf16": "bfloat16",
    "bfloat16": "bfloat16",
}


def load(
    name: str | Path | Entry,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    offline: bool = False,
    token: str | bool | None = None,
    progress: bool = True,
) -> Backbone:
    """A backbone by zoo name, hub id (`hf:org/repo@revision`), or from a folder.

    A folder is a `Path`, or text that starts with ./, / or ~; it holds an open_clip, transformers or timm
    model. What is not on this machine is downloaded and verified first. Weights are mapped from their
    file, not copied, unless `dtype` ("bf16", "fp16", "fp32") or `device` ask for other ones. The model is in
    eval mode; the global random state is left alone.

        clip = mm.load("tiny/clip")
        sam = mm.load("sam/vit-b", dtype="bf16", device="cuda")
    """
    precision = _precision(dtype)
    if isinstance(name, Path) or (
        isinstance(name, str) and name.startswith(("./", "../", "/", "~"))
    ):
        folder, item = Path(name).expanduser(), None
        if not folder.is_dir():
            raise ZooError(f"no folder at {folder}", "zoo names have no leading './' or '/'")
    elif isinstance(name, (str, Entry)):
        item = resolve(name)
        if item.kind == "adapter":
            raise ZooError(
                f"{item.name} is an adapter for {item.base or 'a backbone'}",
                f'load the backbone, then mmadapt.load_adapter(backbone, "{item.name}")',
            )
        folder = get(item, offline=offline, token=token, progress=progress)
        found, _ = here(item)
        if found is not None:
            item = _as_found(item, found)
    else:
        raise ZooError(
            f"expected a zoo name or a folder, got {type(name).__name__}",
            'mmadapt.load("tiny/clip")',
        )
    from mmadapt.zoo.providers import build

    backbone = build(folder, item, precision)
    backbone.model.eval()
    if device is not None:
        backbone.model.to(device)
    return backbone


def _as_found(item: Entry, found: Found) -> Entry:
    """The entry of what was loaded: it says which version this is, and on which terms it came."""
    licence = item.licence
    if licence["weights"] == "unknown" and found.licence not in ("", "unknown"):
        licence = {**licence, "weights": found.licence, "declared_by": "its page on the hub"}
    revision = found.revision or item.revision
    return replace(item, files=found.files, revision=revision, licence=licence)


def _precision(dtype: Any) -> torch.dtype | None:
    if dtype is None:
        return None
    import torch

    if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
        return dtype
    if not isinstance(dtype, str) or dtype not in PRECISIONS:
        raise ZooError(
            f"dtype is {dtype!r}, expected a floating dtype of torch, or its name",
            did_you_mean(str(dtype), PRECISIONS),
        )
    return getattr(torch, PRECISIONS[dtype])
