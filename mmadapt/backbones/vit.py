"""Vision transformers of transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mmadapt.core.anatomy import Anatomy
from mmadapt.core.site import Span

if TYPE_CHECKING:
    from torch import nn


def vit_anatomy(model: nn.Module) -> Anatomy:
    """`transformers.ViTModel` and `ViTForImageClassification`."""
    inner = "vit." if hasattr(model, "vit") else ""
    tower = f"{inner}layers"
    block = tower + ".{i}"
    channels = f"{block}.layernorm_before.weight"
    spans = {
        "vision.layers[i]": Span(block, channels=channels),
        "vision.layers[i].attn": Span(f"{block}.attention", channels=channels),
    }
    for word in "qkvo":
        spans[f"vision.layers[i].attn.{word}"] = _linear(f"{block}.attention.{word}_proj")
    spans["vision.layers[i].mlp"] = Span(f"{block}.mlp", channels=channels)
    for word, name in (("up", "fc1"), ("down", "fc2")):
        spans[f"vision.layers[i].mlp.{word}"] = _linear(f"{block}.mlp.{name}")
    spans["logits"] = Span(
        "classifier",
        x="0|input",
        channels="classifier.weight@0",
        channels_in="classifier.weight@1",
        layout="BK",
    )
    return Anatomy(
        family="vit",
        spans=spans,
        towers={"vision": inner.rstrip(".")},
        taps={
            "vision.layers[i].norm1": f"{block}.layernorm_before:out",
            "vision.layers[i].norm2": f"{block}.layernorm_after:out",
        },
        facts=_facts,
    )


def _linear(path: str) -> Span:
    return Span(path, ("out", "in", "weight"), x="0|input", weight=f"{path}.weight")


def _facts(model: Any) -> dict[str, Any]:
    config = model.config
    return {
        "image": config.image_size,
        "patch": config.patch_size,
        "vision_layers": config.num_hidden_layers,
        "width": config.hidden_size,
        "activation": config.hidden_act,
        "classes": config.num_labels if hasattr(model, "classifier") else None,
    }
