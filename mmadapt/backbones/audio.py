"""The audio spectrogram transformer of transformers: a ViT over a spectrogram's patches.

Its tokens are the class and the distillation token, then the patches in reading order: rows are bands
of frequency, columns stand along time. The backbone attends to padding unless it is given an
`attention_mask` (B, T) over tokens, which feature extractors do not make.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mmadapt.backbones.blocks import (
    block_taps,
    linears,
    logits,
    norm,
    norms,
    patches,
    text_mask,
    wholes,
    with_prefix,
)
from mmadapt.core.anatomy import Anatomy
from mmadapt.core.parts import PatchPositions
from mmadapt.core.site import Span


def ast_anatomy(model: Any) -> Anatomy:
    """`transformers.ASTModel` and `ASTForAudioClassification`."""
    name = "audio_spectrogram_transformer"
    inner = f"{name}." if hasattr(model, name) else ""
    tower = f"{inner}layers"
    block, role = tower + ".{i}", "audio.layers[i]"
    channels = f"{block}.layernorm_before.weight"
    layers = {
        role: Span(block, channels=channels, more_tokens=True),
        f"{role}.attn": Span(f"{block}.attention", channels=channels),
        **linears(f"{role}.attn", f"{block}.attention", {w: f"{w}_proj" for w in "qkvo"}),
        f"{role}.mlp": Span(f"{block}.mlp", channels=channels),
        **linears(f"{role}.mlp", f"{block}.mlp", {"up": "fc1", "down": "fc2"}),
        **norms(role, block, "layernorm_before", "layernorm_after"),
    }
    return Anatomy(
        family=model.config.model_type,
        spans={
            **in_rows(with_prefix(layers, 2), _bands(model.config)),
            **(
                {}
                if inner
                else wholes("audio", "embeddings.position_embeddings@2", _patch_positions)
            ),
            "audio.patches": patches(f"{inner}embeddings.patch_embeddings.projection"),
            "audio.norm": norm(f"{inner}layernorm"),
            "logits.norm": norm("classifier.layernorm", "BD"),
            "logits": logits("classifier.dense"),
        },
        towers={"audio": inner.rstrip(".")},
        taps=block_taps("audio", tower, "layernorm_before", "layernorm_after"),
        fills={inner.rstrip("."): _patches_told},
        facts=_ast_facts,
    )


def in_rows(spans: dict[str, Span], rows: int) -> dict[str, Span]:
    """The same spans, where a grid of patches or frames has so many rows, time along each."""
    return {role: replace(span, grid_rows=rows) for role, span in spans.items()}


def _patches_told(module: Any, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The facts "mask" and "tokens", of a pass through the whole encoder."""
    tokens = module.embeddings.position_embeddings.shape[1]
    return {**text_mask(module, args, kwargs), "tokens": tokens}


def _patch_positions(embeddings: Any) -> PatchPositions:
    config = embeddings.config
    rows = _bands(config)
    table = embeddings.position_embeddings[0, 2:]
    return PatchPositions(table.unflatten(0, (rows, -1)), (config.num_mel_bins, config.max_length))


def _bands(config: Any) -> int:
    return (config.num_mel_bins - config.patch_size) // config.frequency_stride + 1


def _ast_facts(model: Any) -> dict[str, Any]:
    config = model.config
    return {
        "mel_bins": config.num_mel_bins,
        "patch": config.patch_size,
        "strides": [config.frequency_stride, config.time_stride],
        "audio_layers": config.num_hidden_layers,
        "width": config.hidden_size,
        "activation": config.hidden_act,
        "classes": config.num_labels if hasattr(model, "classifier") else None,
    }
