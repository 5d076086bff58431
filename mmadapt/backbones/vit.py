"""Vision transformers: ViT, DeiT, BEiT, ViT-MAE and DINOv2 of transformers, timm's `VisionTransformer`.

Where a block scales its branches before adding them (layer scale), the roles `attn` and `mlp` are
the branches before that scale, in every library.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mmadapt.backbones.blocks import (
    activation_name,
    block_taps,
    linears,
    logits,
    norm,
    norms,
    patches,
    timm_layers,
    wholes,
    with_prefix,
)
from mmadapt.core.anatomy import Anatomy
from mmadapt.core.parts import PatchPositions
from mmadapt.core.site import NO_GRID, Span

if TYPE_CHECKING:
    from torch import nn

# -- ViT ----------------------------------------------------------------------------------------


#: tokens before the patches; the masked autoencoder leaves out and shuffles patches
_PREFIX = {"vit": 1, "beit": 1, "deit": 2, "vit_mae": NO_GRID}


def vit_anatomy(model: Any) -> Anatomy:
    """ViT, DeiT, BEiT and ViT-MAE of transformers, bare or with a head."""
    kind = model.config.model_type
    inner = next((f"{name}." for name in ("vit", "deit", "beit") if hasattr(model, name)), "")
    tower = f"{inner}layers"
    block = tower + ".{i}"
    channels = f"{block}.layernorm_before.weight"
    role = "vision.layers[i]"
    layers = {
        role: Span(block, channels=channels),
        f"{role}.attn": Span(f"{block}.attention", channels=channels),
        **linears(f"{role}.attn", f"{block}.attention", {w: f"{w}_proj" for w in "qkvo"}),
        f"{role}.mlp": Span(f"{block}.mlp", channels=channels),
        **linears(f"{role}.mlp", f"{block}.mlp", {"up": "fc1", "down": "fc2"}),
        **norms(role, block, "layernorm_before", "layernorm_after"),
    }
    return Anatomy(
        family=kind,
        spans={
            **with_prefix(layers, _PREFIX[kind]),
            **(_wholes(inner) if kind == "vit" else {}),
            "vision.patches": patches(f"{inner}embeddings.patch_embeddings.projection"),
            "vision.norm": norm(f"{inner}layernorm"),
            "logits": logits("classifier"),
        },
        towers={"vision": inner.rstrip(".")},
        taps=block_taps("vision", tower, "layernorm_before", "layernorm_after"),
        facts=_vit_facts,
    )


def _wholes(inner: str) -> dict[str, Span]:
    return {} if inner else wholes("vision", "embeddings.position_embeddings@2", _patch_positions)


def _patch_positions(embeddings: Any) -> PatchPositions:
    size = embeddings.patch_embeddings.image_size
    height, width = (size, size) if isinstance(size, int) else size
    patch = embeddings.patch_embeddings.projection.kernel_size
    rows, columns = height // patch[0], width // patch[1]
    return PatchPositions(
        embeddings.position_embeddings[0, 1:].unflatten(0, (rows, columns)), (height, width)
    )


def _vit_facts(model: Any) -> dict[str, Any]:
    config = model.config
    return {
        "image": config.image_size,
        "patch": config.patch_size,
        "vision_layers": config.num_hidden_layers,
        "width": config.hidden_size,
        "activation": config.hidden_act,
        "classes": config.num_labels if hasattr(model, "classifier") else None,
    }


# -- DINOv2 -------------------------------------------------------------------------------------


def dinov2_anatomy(model: nn.Module) -> Anatomy:
    """`transformers.Dinov2Model`, with or without registers, and their image classifiers."""
    inner = next(
        (f"{name}." for name in ("dinov2", "dinov2_with_registers") if hasattr(model, name)), ""
    )
    path = f"{inner}encoder.layer"
    block, role = path + ".{i}", "vision.layers[i]"
    channels = f"{block}.norm1.weight"
    first: Any = model.get_submodule(path)[0]  # type: ignore[index]
    if hasattr(first.attention, "q_proj"):
        attention = {word: f"{word}_proj" for word in "qkvo"}
    else:  # releases that nest the projections one module deeper
        attention = {
            "q": "attention.query",
            "k": "attention.key",
            "v": "attention.value",
            "o": "output.dense",
        }
    if hasattr(first.mlp, "fc1"):
        mlp = {"up": "fc1", "down": "fc2"}
    elif hasattr(first.mlp, "up_proj"):  # SwiGLU
        mlp = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    else:  # SwiGLU of releases that pack gate and value
        mlp = {"up": "weights_in", "down": "weights_out"}
    registers = getattr(model.config, "num_register_tokens", 0)  # type: ignore[union-attr]
    layers = {
        role: Span(block, channels=channels),
        f"{role}.attn": Span(f"{block}.attention", channels=channels),
        **linears(f"{role}.attn", f"{block}.attention", attention),
        f"{role}.mlp": Span(f"{block}.mlp", x="0|hidden_state", channels=channels),
        **linears(f"{role}.mlp", f"{block}.mlp", mlp),
        **norms(role, block, "norm1", "norm2"),
    }
    return Anatomy(
        family="dinov2",
        spans={
            **with_prefix(layers, 1 + registers),
            **({} if registers else _wholes(inner)),
            "vision.patches": patches(f"{inner}embeddings.patch_embeddings.projection"),
            "vision.norm": norm(f"{inner}layernorm"),
            "logits": logits("classifier"),
        },
        towers={"vision": inner.rstrip(".")},
        taps=block_taps("vision", path, "norm1", "norm2"),
        facts=_dinov2_facts,
    )


def _dinov2_facts(model: Any) -> dict[str, Any]:
    config = model.config
    return {
        "patch": config.patch_size,
        "vision_layers": config.num_hidden_layers,
        "width": config.hidden_size,
        "registers": getattr(config, "num_register_tokens", 0),
        "activation": "swiglu" if config.use_swiglu_ffn else config.hidden_act,
        "classes": config.num_labels if hasattr(model, "classifier") else None,
    }


# -- timm ---------------------------------------------------------------------------------------


def timm_vit_anatomy(model: nn.Module) -> Anatomy:
    """`timm.models.vision_transformer.VisionTransformer` and what inherits from it."""
    from torch import nn

    spans = timm_layers("vision", "blocks", model)
    spans.update(timm_ends(model))
    spans["vision.pooled"] = Span(
        "head_drop", x="0|input", channels="blocks.0.norm1.weight", layout="BD"
    )
    if isinstance(getattr(model, "head", None), nn.Linear):
        spans["logits"] = logits("head")
    return Anatomy(
        family="timm-vit",
        spans=spans,
        towers={"vision": ""},
        taps=block_taps("vision", "blocks", "norm1", "norm2"),
        facts=timm_facts,
    )


def timm_ends(model: Any, path: str = "") -> dict[str, Span]:
    """What stands before and behind the blocks of a timm vision transformer."""
    averaged = getattr(model.norm, "weight", None) is None  # then the norm follows the pooling
    return {
        "vision.patches": patches(f"{path}patch_embed.proj"),
        "vision.norm": norm(f"{path}fc_norm", "BD") if averaged else norm(f"{path}norm"),
    }


def timm_facts(model: Any) -> dict[str, Any]:
    """What must be equal for an adapter file to fit a timm vision transformer."""
    patches, blocks = model.patch_embed, model.blocks
    return {
        "image": list(patches.img_size) if getattr(patches, "img_size", None) else None,
        "patch": list(patches.patch_size),
        "vision_layers": len(blocks),
        "width": model.embed_dim,
        "activation": activation_name(getattr(getattr(blocks[0], "mlp", None), "act", None)),
        "pool": model.global_pool,
        "classes": model.num_classes,
    }
