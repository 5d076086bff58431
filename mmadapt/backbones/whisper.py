"""Whisper of transformers: an encoder of spectrograms and a decoder of text with a key-value cache.

Blocks norm before each branch. The MLP is no module of its own: `mlp` is met where fc2 gives what it
gives, and reads what the norm before fc1 gave. The decoder has a second attention, `cross`, over what
the encoder made; its keys and values are computed once a text and cached.

Every clip is 30 seconds, silence included, which the encoder attends to: there is no padding to be
told, and no clip sees another. In the decoder the fact "mask" (B, T) is over the tokens of the call.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mmadapt.backbones.audio import in_rows
from mmadapt.backbones.blocks import (
    block_taps,
    linear,
    linears,
    logits,
    norm,
    norms,
    with_prefix,
)
from mmadapt.backbones.llama import causal_mask
from mmadapt.backbones.wav2vec2 import convolution_in_time
from mmadapt.core.anatomy import Anatomy
from mmadapt.core.site import Span

_PROJECTIONS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"}


def whisper_anatomy(model: Any) -> Anatomy:
    """`WhisperModel`, `WhisperForConditionalGeneration` and `WhisperForAudioClassification`."""
    inner = "model." if hasattr(model, "model") else ""
    encoder, decoder = f"{inner}encoder", f"{inner}decoder"
    first = replace(convolution_in_time(f"{encoder}.conv1"), aligned=True)
    audio = {
        **_blocks("audio", f"{encoder}.layers"),
        "audio.norm": norm(f"{encoder}.layer_norm"),
    }
    spans = {
        **in_rows(with_prefix(audio, 0), 1),
        "audio.conv1": first,
        "audio.conv2": convolution_in_time(f"{encoder}.conv2"),
        "audio.projector": linear("projector"),
    }
    taps = block_taps("audio", f"{encoder}.layers", *_NORMS)
    towers, fills = {"audio": encoder}, {encoder: _encoder_told}
    if hasattr(model, "classifier"):
        spans["logits"] = logits("classifier")
    else:
        spans |= _decoder(decoder)
        taps |= block_taps("text", f"{decoder}.layers", *_NORMS)
        taps["text.layers[i].cross.residual"] = f"{decoder}.layers.{{i}}.encoder_attn_layer_norm:in"
        towers["text"], fills[decoder] = decoder, causal_mask
    if hasattr(model, "proj_out"):
        spans["logits"] = _output(model)
    return Anatomy(
        family=model.config.model_type,
        spans=spans,
        towers=towers,
        taps=taps,
        fills=fills,
        facts=_facts,
    )


_NORMS = ("self_attn_layer_norm", "final_layer_norm")


def _blocks(tower: str, path: str) -> dict[str, Span]:
    block, role = path + ".{i}", f"{tower}.layers[i]"
    channels = f"{block}.self_attn_layer_norm.weight"
    return {
        role: Span(block, channels=channels, more_tokens=tower == "audio"),
        f"{role}.attn": Span(f"{block}.self_attn", channels=channels),
        **linears(f"{role}.attn", f"{block}.self_attn", _PROJECTIONS),
        f"{role}.mlp": Span(f"{block}.fc2", ("out",), x="tap:norm2", channels=channels),
        **linears(f"{role}.mlp", block, {"up": "fc1", "down": "fc2"}),
        **norms(role, block, *_NORMS),
    }


def _decoder(path: str) -> dict[str, Span]:
    block, role = path + ".layers.{i}", "text.layers[i]"
    channels = f"{block}.encoder_attn_layer_norm.weight"
    embeddings = f"{path}.embed_tokens"
    return {
        **_blocks("text", f"{path}.layers"),
        f"{role}.cross": Span(f"{block}.encoder_attn", channels=channels),
        **linears(f"{role}.cross", f"{block}.encoder_attn", _PROJECTIONS),
        f"{role}.norm_cross": norm(f"{block}.encoder_attn_layer_norm"),
        "text.embeddings": Span(
            embeddings, ("out",), x="0|input", channels=f"{embeddings}.weight@1"
        ),
        "text.norm": norm(f"{path}.layer_norm"),
    }


def _output(model: Any) -> Span:
    """The output layer. Tied to the embeddings it is met by its call only, never by its weight."""
    span = logits("proj_out", "BTK")
    tied = model.proj_out.weight is model.model.decoder.embed_tokens.weight
    return replace(span, ports=("out", "in"), weight="") if tied else span


def _encoder_told(module: Any, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The facts "mask", which there is none of, and "tokens"."""
    return {"mask": None, "tokens": module.config.max_source_positions}


def _facts(model: Any) -> dict[str, Any]:
    config = model.config
    speaks = not hasattr(model, "classifier")
    return {
        "audio_layers": config.encoder_layers,
        "text_layers": config.decoder_layers if speaks else None,
        "width": config.d_model,
        "mel_bins": config.num_mel_bins,
        "frames": config.max_source_positions,
        "vocabulary": config.vocab_size if speaks else None,
        "activation": config.activation_function,
        "classes": None if speaks else config.num_labels,
    }
