"""Backbones and outputs that peers computed in their own environments, in today's classes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

PEERS = Path(__file__).parent / "peers"
#: what transformers 4 called by other names than 5 does, in this order
_NAMES = (
    (r"^vision_model\.encoder\.layers\.", "encoder.layers."),
    (r"^vision_model\.", ""),
    (r"encoder\.layer\.", "layers."),  # not of DINOv2
    (r"attention\.attention\.(\w)\w+", r"attention.\1_proj"),
    (r"attention\.output\.dense", "attention.o_proj"),
    (r"intermediate\.dense", "mlp.fc1"),
    (r"(layers\.\d+)\.output\.dense", r"\1.mlp.fc2"),
)


def part(saved: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin so, without it."""
    return {k.removeprefix(prefix): v for k, v in saved.items() if k.startswith(prefix)}


def fill(model: nn.Module, weights: dict[str, Tensor]) -> Any:
    """Load weights under former names; every one has to find its place."""
    own = model.state_dict()
    kept = any(key.startswith("encoder.layer.") for key in own)
    renamed = {}
    for key, value in weights.items():
        new = key
        for old, now in _NAMES:
            if new not in own and not (kept and now == "layers."):
                new = re.sub(old, now, new)
        renamed[new] = value
    unplaced = model.load_state_dict(renamed, strict=False)
    assert not unplaced.unexpected_keys, unplaced.unexpected_keys
    assert all("position_ids" in key or "classifier" in key for key in unplaced.missing_keys)
    return model.eval()


def outputs(model: Any, *args: Tensor, **batch: Tensor) -> Tensor:
    """The main output of a forward pass."""
    with torch.no_grad():
        given = model(*args, **batch)
    if isinstance(given, Tensor):
        return given
    if "image_embeds" in given:
        return torch.stack([given.text_embeds, given.image_embeds])
    return given.logits if "logits" in given else given.last_hidden_state


def distance(one: Tensor, other: Tensor) -> float:
    """The largest difference."""
    return float((one - other).abs().max())
