"""SigLIP of transformers: two towers named as CLIP's; the image is pooled by attention."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mmadapt.backbones.blocks import (
    block_taps,
    hf_layers,
    logits,
    norm,
    patches,
    text_mask,
    with_prefix,
)
from mmadapt.backbones.clip import hf_image, hf_text
from mmadapt.core.anatomy import Anatomy
from mmadapt.core.site import Span

if TYPE_CHECKING:
    from torch import Tensor, nn


def siglip_anatomy(model: nn.Module) -> Anatomy:
    """`transformers.SiglipModel`."""
    vision = "vision_model.encoder.layers"
    text = "text_model.encoder.layers"
    return Anatomy(
        family="siglip",
        spans={
            **with_prefix(hf_layers("vision", vision), 0),
            **_vision_ends("vision_model."),
            **hf_layers("text", text),
            "text.norm": norm("text_model.final_layer_norm"),
            "text.pooled": Span(
                "text_model.head", x="0|input", channels="text_model.head.weight", layout="BD"
            ),
        },
        towers={"vision": "vision_model", "text": "text_model"},
        taps={
            **block_taps("vision", vision, "layer_norm1", "layer_norm2"),
            **block_taps("text", text, "layer_norm1", "layer_norm2"),
        },
        fills={"text_model": text_mask},
        facts=_facts,
        encode={"image": hf_image, "text": hf_text},
    )


def siglip_vision_anatomy(model: nn.Module) -> Anatomy:
    """`transformers.SiglipVisionModel` and `SiglipForImageClassification`."""
    inner = "vision_model." if hasattr(model, "vision_model") else ""
    layers = f"{inner}encoder.layers"
    classifies = hasattr(model, "classifier")
    return Anatomy(
        family="siglip-vision",
        spans={
            **with_prefix(hf_layers("vision", layers), 0),
            **_vision_ends(inner),
            "logits": logits("classifier"),
        },
        towers={"vision": inner.rstrip(".")},
        taps=block_taps("vision", layers, "layer_norm1", "layer_norm2"),
        facts=_vision_facts,
        encode={} if classifies else {"image": _pool},
    )


def _vision_ends(inner: str) -> dict[str, Span]:
    """What stands before and behind the vision tower's blocks."""
    head = f"{inner}head"
    return {
        "vision.patches": patches(f"{inner}embeddings.patch_embedding"),
        "vision.norm": norm(f"{inner}post_layernorm"),
        "vision.pooled": Span(
            head, x="0|hidden_state", channels=f"{head}.layernorm.weight", layout="BD"
        ),
    }


def _pool(model: Any, pixels: Tensor) -> Tensor:
    return model(pixel_values=pixels).pooler_output


def _vision_facts(model: Any) -> dict[str, Any]:
    config = getattr(model.config, "vision_config", model.config)
    return {
        "image": config.image_size,
        "patch": config.patch_size,
        "vision_layers": config.num_hidden_layers,
        "vision_width": config.hidden_size,
        "activation": config.hidden_act,
        "classes": model.config.num_labels if hasattr(model, "classifier") else None,
    }


def _facts(model: Any) -> dict[str, Any]:
    text = model.config.text_config
    return {
        **_vision_facts(model),
        "text_layers": text.num_hidden_layers,
        "text_width": text.hidden_size,
        "vocabulary": text.vocab_size,
        "context": text.max_position_embeddings,
    }
