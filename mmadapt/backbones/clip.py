"""CLIP in open_clip and in transformers: two towers, named alike, so adapter files fit both."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mmadapt.backbones.blocks import (
    activation_name,
    block_taps,
    hf_layers,
    linear,
    norm,
    norms,
    patches,
    text_mask,
    timm_layers,
    with_prefix,
)
from mmadapt.backbones.vit import timm_ends, timm_facts
from mmadapt.core.anatomy import Anatomy
from mmadapt.core.site import Span

if TYPE_CHECKING:
    from torch import Tensor, nn


def _open_clip_layers(tower: str, path: str) -> dict[str, Span]:
    """Roles of the residual blocks at `path`.

    `nn.MultiheadAttention` reads its packed in_proj and its out_proj itself, so hooks on those would
    never fire: q, k, v and o are offered at the `weight` port, met at the attention's own call.
    """
    block = path + ".{i}"
    channels = f"{block}.ln_1.weight"
    roles = {
        f"{tower}.layers[i]": Span(block, x="0|q_x", channels=channels),
        f"{tower}.layers[i].attn": Span(f"{block}.attn", x="0|query", channels=channels),
    }
    for place, word in enumerate("qkv"):
        roles[f"{tower}.layers[i].attn.{word}"] = Span(
            f"{block}.attn", ("weight",), weight=f"{block}.attn.in_proj_weight", block=(place, 3)
        )
    roles[f"{tower}.layers[i].attn.o"] = Span(
        f"{block}.attn", ("weight",), weight=f"{block}.attn.out_proj.weight"
    )
    roles[f"{tower}.layers[i].mlp"] = Span(f"{block}.mlp", x="0|input", channels=channels)
    for word, name in (("up", "c_fc"), ("down", "c_proj")):
        roles[f"{tower}.layers[i].mlp.{word}"] = linear(f"{block}.mlp.{name}")
    return {**roles, **norms(f"{tower}.layers[i]", block, *_NORMS)}


# -- open_clip ----------------------------------------------------------------------------------

_NORMS = ("ln_1", "ln_2")


def open_clip_anatomy(model: nn.Module) -> Anatomy:
    """`open_clip.model.CLIP` and `CustomTextCLIP` with transformer towers.

    A timm vision transformer as vision tower (SigLIP and others) is named by timm's own table.
    """
    trunk = _timm_trunk(model.visual)
    if trunk is not None:
        vision, first_last = "visual.trunk.blocks", ("norm1", "norm2")
        layers = timm_layers("vision", vision, trunk)
    else:
        vision, first_last = "visual.transformer.resblocks", _NORMS
        layers = with_prefix(_open_clip_layers("vision", vision), 1)
    text = "text.transformer" if hasattr(model, "text") else "transformer"
    spans = {
        **layers,
        **_open_clip_ends(model.visual, "visual."),
        "vision.pooled": Span("visual", x="0|x", channels=_open_clip_pooled(model), layout="BD"),
        **_open_clip_layers("text", f"{text}.resblocks"),
        "text.norm": norm("text.ln_final" if hasattr(model, "text") else "ln_final"),
    }
    if hasattr(model, "text"):
        spans["text.pooled"] = Span(
            "text", x="0|text", channels="text.text_projection@1", layout="BD"
        )
    return Anatomy(
        family="clip",
        spans=spans,
        towers={"vision": "visual", "text": text},
        taps={
            **block_taps("vision", vision, *first_last),
            **block_taps("text", f"{text}.resblocks", *_NORMS),
        },
        facts=_open_clip_facts,
        encode={"image": _open_clip_image, "text": _open_clip_text},
    )


def open_clip_vision_anatomy(model: nn.Module) -> Anatomy:
    """`open_clip.transformer.VisionTransformer` on its own."""
    return Anatomy(
        family="clip-vision",
        spans={
            **with_prefix(_open_clip_layers("vision", "transformer.resblocks"), 1),
            **_open_clip_ends(model, ""),
            "vision.pooled": Span("", x="0|x", channels="proj@1", layout="BD"),
        },
        towers={"vision": ""},
        taps=block_taps("vision", "transformer.resblocks", *_NORMS),
        facts=_open_clip_vision_facts,
        encode={"image": _call},
    )


def _open_clip_ends(visual: Any, path: str) -> dict[str, Span]:
    """What stands before and behind the blocks of a vision transformer; nothing in a ResNet."""
    trunk = _timm_trunk(visual)
    if trunk is not None:
        return timm_ends(trunk, f"{path}trunk.")
    if not hasattr(visual, "transformer"):
        return {}
    pooled_first = getattr(visual, "final_ln_after_pool", False)
    return {
        "vision.patches": patches(f"{path}conv1"),
        "vision.embeddings.norm": norm(f"{path}ln_pre"),
        "vision.norm": norm(f"{path}ln_post", "BD" if pooled_first else "BTC"),
    }


def _timm_trunk(visual: Any) -> Any:
    """The timm vision transformer inside open_clip's `TimmModel`, if that is what `visual` is."""
    trunk = getattr(visual, "trunk", None)
    names = {f"{cls.__module__}.{cls.__qualname__}" for cls in type(trunk).__mro__}
    return trunk if "timm.models.vision_transformer.VisionTransformer" in names else None


def _open_clip_pooled(model: nn.Module) -> str:
    """Where the width of the image embedding can be read, for the vision towers open_clip has."""
    visual: Any = model.visual
    if getattr(visual, "proj", None) is not None:
        return "visual.proj@1"
    if hasattr(visual, "attnpool"):
        return "visual.attnpool.c_proj.weight"
    head = getattr(visual, "head", None)
    if hasattr(head, "mlp"):
        return "visual.head.mlp.fc2.weight"
    if _timm_trunk(visual) is not None and not hasattr(head, "proj"):
        return "visual.trunk.blocks.0.norm1.weight"
    return "visual.head.proj.weight" if head is not None else "visual.ln_post.weight"


def _open_clip_vision_facts(visual: Any) -> dict[str, Any]:
    trunk = _timm_trunk(visual)
    if trunk is not None:
        return {"vision": "timm-vit", **timm_facts(trunk)}
    grid = getattr(visual, "grid_size", None)
    patch = getattr(visual, "patch_size", None)
    blocks = visual.transformer.resblocks if hasattr(visual, "transformer") else ()
    return {
        "vision": "transformer" if blocks else type(visual).__name__,
        "image": list(visual.image_size) if hasattr(visual, "image_size") else None,
        "patch": list(patch) if patch is not None else None,
        "grid": list(grid) if grid is not None else None,
        "vision_layers": len(blocks),
        "activation": activation_name(blocks[0].mlp.gelu) if blocks else None,
    }


def _open_clip_facts(model: Any) -> dict[str, Any]:
    text = getattr(model, "text", model)
    blocks = getattr(getattr(text, "transformer", None), "resblocks", ())
    tokens = getattr(text, "token_embedding", None)
    return {
        **_open_clip_vision_facts(model.visual),
        "text_layers": len(blocks),
        "vocabulary": tokens.weight.shape[0] if tokens is not None else None,
        "context": getattr(text, "context_length", None),
    }


def _open_clip_image(model: Any, pixels: Tensor) -> Tensor:
    return model.encode_image(pixels)


def _open_clip_text(model: Any, tokens: Tensor) -> Tensor:
    return model.encode_text(tokens)


def _call(model: Any, pixels: Tensor) -> Tensor:
    return model(pixels)


# -- transformers -------------------------------------------------------------------------------


def hf_clip_anatomy(model: nn.Module) -> Anatomy:
    """`transformers.CLIPModel`."""
    return Anatomy(
        family="clip",
        spans={
            **with_prefix(hf_layers("vision", "vision_model.encoder.layers"), 1),
            **_hf_ends("vision_model."),
            **hf_layers("text", "text_model.encoder.layers"),
            "text.norm": norm("text_model.final_layer_norm"),
            "text.pooled": Span(
                "text_projection", x="0|input", channels="text_projection.weight", layout="BD"
            ),
        },
        towers={"vision": "vision_model", "text": "text_model"},
        taps={
            **block_taps("vision", "vision_model.encoder.layers", "layer_norm1", "layer_norm2"),
            **block_taps("text", "text_model.encoder.layers", "layer_norm1", "layer_norm2"),
        },
        fills={"text_model": text_mask},
        facts=_hf_clip_facts,
        encode={"image": hf_image, "text": hf_text},
    )


def hf_clip_vision_anatomy(model: nn.Module) -> Anatomy:
    """`transformers.CLIPVisionModel`, with or without its projection."""
    inner = "vision_model." if hasattr(model, "vision_model") else ""
    return Anatomy(
        family="clip-vision",
        spans={
            **with_prefix(hf_layers("vision", f"{inner}encoder.layers"), 1),
            **_hf_ends(inner),
        },
        towers={"vision": inner.rstrip(".")},
        taps=block_taps("vision", f"{inner}encoder.layers", "layer_norm1", "layer_norm2"),
        facts=_hf_vision_facts,
        encode={"image": _hf_embeds},
    )


def _hf_ends(inner: str) -> dict[str, Span]:
    return {
        "vision.patches": patches(f"{inner}embeddings.patch_embedding"),
        "vision.embeddings.norm": norm(f"{inner}pre_layrnorm"),
        "vision.norm": norm(f"{inner}post_layernorm", "BD"),
        "vision.pooled": Span(
            "visual_projection", x="0|input", channels="visual_projection.weight", layout="BD"
        ),
    }


def _hf_vision_facts(model: Any) -> dict[str, Any]:
    config = getattr(model.config, "vision_config", model.config)
    size, patch = config.image_size, config.patch_size
    return {
        "vision": "transformer",
        "image": [size, size],
        "patch": [patch, patch],
        "grid": [size // patch] * 2,
        "vision_layers": config.num_hidden_layers,
        "activation": config.hidden_act,
    }


def _hf_clip_facts(model: Any) -> dict[str, Any]:
    text = model.config.text_config
    return {
        **_hf_vision_facts(model),
        "text_layers": text.num_hidden_layers,
        "vocabulary": text.vocab_size,
        "context": text.max_position_embeddings,
    }


def hf_image(model: Any, pixels: Tensor) -> Tensor:
    """Image embeddings (B, D), not normalised."""
    return _embedding(model.get_image_features(pixel_values=pixels))


def hf_text(model: Any, tokens: Any) -> Tensor:
    """Text embeddings (B, D), not normalised; `tokens` are ids (B, L) or a tokenizer's output."""
    tokens = {"input_ids": tokens} if not hasattr(tokens, "keys") else tokens
    return _embedding(model.get_text_features(**tokens))


def _hf_embeds(model: Any, pixels: Tensor) -> Tensor:
    output = model(pixel_values=pixels)
    embeds = getattr(output, "image_embeds", None)
    return output.pooler_output if embeds is None else embeds


def _embedding(output: Any) -> Tensor:
    """transformers 5 returns an output object whose `pooler_output` is the projected embedding."""
    return getattr(output, "pooler_output", output)


# -- a zero-shot classifier over either -----------------------------------------------------------


def classifier_anatomy(model: nn.Module) -> Anatomy:
    """`mmadapt.tasks.few_shot.ZeroShotClassifier`: image embeddings in, logits out."""
    return Anatomy(
        family="zero-shot-classifier",
        spans={
            "logits": Span(
                "head",
                ("out",),
                x="0|features",
                channels="head.weight@0",
                channels_in="head.weight@1",
                layout="BK",
            )
        },
        towers={"head": "head"},
        facts=_classifier_facts,
    )


def _classifier_facts(model: Any) -> dict[str, Any]:
    return {"classes": list(model.names), "features": model.head.weight.shape[1]}
