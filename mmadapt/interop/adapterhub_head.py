"""The classifier that AdapterHub saves beside an adapter."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmadapt.interop.foreign import load_tensors
from mmadapt.interop.peft_config import read_json, weights_at

if TYPE_CHECKING:
    from torch import Tensor

    from mmadapt.interop.placing import Placing

CONFIG = "head_config.json"
WEIGHTS = ("model_head.safetensors", "pytorch_model_head.bin")
_KEY = re.compile(r"(?:heads\.[^.]+\.\d+|classifier)\.(weight|bias)\Z")
_KINDS = ("image_classification", "classification", None)  # None: the model's own classifier


def place_head(placing: Placing, folder: Path) -> list[str]:
    """Place a head that is one linear of the first token; notes say what was left out, and why."""
    from mmadapt.adapter import Head

    if not (folder / CONFIG).is_file():
        return []
    config = read_json(folder / CONFIG)
    inner: Any = config.get("config") or {}
    stored = load_tensors(weights_at(folder, WEIGHTS))
    tensors = {match[1]: stored[match[0]] for match in map(_KEY.match, stored) if match}
    reason = _why_not(placing, inner, stored, tensors)
    if reason:
        return [f"the head in {folder / CONFIG} was left out: {reason}"]
    matrix = tensors["weight"]
    features = placing.places.view("logits", Head.ports).width_in
    key = next(key for key in stored if key.endswith("weight"))
    if not placing.fits(key, matrix, len(matrix), features):
        return []
    names = _names(inner.get("label2id") or config.get("label2id"), len(matrix))
    bias = tensors.get("bias", matrix.new_zeros(len(matrix)))
    placing.put(Head(len(matrix), names), "logits", matrix=matrix, bias=bias)
    return [f"an output layer of {len(matrix)} classes takes the place of the backbone's"]


def _why_not(
    placing: Placing,
    inner: Mapping[str, Any],
    stored: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
) -> str:
    kind = inner.get("head_type")
    if kind not in _KINDS or "weight" not in tensors or len(tensors) != len(stored):
        return (
            f"a {kind or 'model'} head is no single classifier ({', '.join(sorted(stored)[:3])} …)"
        )
    if inner.get("use_pooler"):
        return "it reads pooled features, and a classifier here the first token"
    if "logits" not in placing.places.spans:
        name = type(placing.places.model).__name__
        return f"{name} has no site 'logits'; take the library's class with a classifier"
    return ""


def _names(labels: Any, classes: int) -> tuple[str, ...]:
    """Class names by their ids; none where they are placeholders or do not count the classes."""
    if not isinstance(labels, dict) or sorted(map(str, labels.values())) != sorted(
        map(str, range(classes))
    ):
        return ()
    names = tuple(str(name) for name in sorted(labels, key=lambda name: int(labels[name])))
    return () if all(re.fullmatch(r"LABEL_\d+", name) for name in names) else names
