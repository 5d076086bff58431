"""CLIP's text tower alone: `transformers.CLIPTextModel`, with or without its projection."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from mmadapt.backbones.blocks import block_taps, hf_layers, norm, text_mask, wholes
from mmadapt.core.anatomy import Anatomy
from mmadapt.core.parts import WordPositions, Words
from mmadapt.core.site import Span

if TYPE_CHECKING:
    from torch import Tensor


def hf_clip_text_anatomy(model: Any) -> Anatomy:
    """`transformers.CLIPTextModel` and `CLIPTextModelWithProjection`."""
    inner = "text_model." if hasattr(model, "text_model") else ""
    channels = "embeddings.position_embedding.weight@1"
    return Anatomy(
        family="clip-text",
        spans={
            **hf_layers("text", f"{inner}encoder.layers"),
            **({} if inner else wholes("text", channels, _word_positions, _words)),
            "text.norm": norm(f"{inner}final_layer_norm"),
            "text.pooled": Span(
                "text_projection", x="0|input", channels="text_projection.weight", layout="BD"
            ),
        },
        towers={"text": inner.rstrip(".")},
        taps=block_taps("text", f"{inner}encoder.layers", "layer_norm1", "layer_norm2"),
        fills={inner.rstrip("."): text_mask},
        facts=_facts,
    )


def _word_positions(embeddings: Any) -> WordPositions:
    return WordPositions(embeddings.position_embedding.weight, causal=True)


def _words(model: Any) -> Words:
    return Words("input_ids", partial(_ids, model.config.eos_token_id))


def _ids(end: int, rows: int, tokens: int) -> Tensor:
    """Ids (rows, tokens) of texts that end with their last token, where the tower pools."""
    ids = torch.full((rows, tokens), 0 if end else 1)
    ids[:, -1] = end
    return ids


def _facts(model: Any) -> dict[str, Any]:
    config = model.config
    return {
        "text_layers": config.num_hidden_layers,
        "width": config.hidden_size,
        "vocabulary": config.vocab_size,
        "context": config.max_position_embeddings,
        "activation": config.hidden_act,
    }
