"""wav2vec 2.0 and its relatives in transformers: HuBERT, UniSpeech, UniSpeech-SAT, data2vec, WavLM.

Convolutions make a frame of every 20 ms or so, a convolution adds positions, and blocks follow: those
of the base models norm behind each branch, h = norm(x + attn(x)), norm(h + mlp(h)), those of the
large ones before it (`do_stable_layer_norm`). The roles `attn` and `mlp` are the branches in both.
WavLM's attention reads the weights of its projections itself; they are met by the `weight` port.
The blocks of MMS models end in an adapter of their own for one language, the role `language`.

The fact "mask" (B, T) is over frames: the encoder is called with it, made from the `attention_mask`
over samples. A front end with a group norm (`feat_extract_norm="group"`, the base models) takes its
statistics over padding too, so there a clip's frames depend on how far it is padded, mask or not.
So do data2vec's: several convolutions make its positions, and padding is zero before the first only.
Batches of equal lengths, or of one clip, are exact with both.
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
    patches,
    text_mask,
    with_prefix,
)
from mmadapt.core.anatomy import Anatomy
from mmadapt.core.site import Span

_PROJECTIONS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"}
_LINEARS = {"up": "intermediate_dense", "down": "output_dense"}


def wav2vec2_anatomy(model: Any) -> Anatomy:
    """wav2vec 2.0, HuBERT, UniSpeech (-SAT), data2vec and WavLM, bare or with a head."""
    config = model.config
    prefix = model.base_model_prefix
    inner = f"{prefix}." if hasattr(model, prefix) else ""
    reads_weights = config.model_type == "wavlm"
    stable = getattr(config, "do_stable_layer_norm", False)
    tower = f"{inner}encoder.layers"
    block, role = tower + ".{i}", "audio.layers[i]"
    channels = f"{block}.layer_norm.weight"
    attention = f"{block}.attention"
    layers = {
        # WavLM's first block makes the position biases of a fixed number of tokens for all
        role: Span(block, channels=channels, more_tokens=not reads_weights),
        f"{role}.attn": Span(attention, channels=channels),
        **(_read if reads_weights else linears)(f"{role}.attn", attention, _PROJECTIONS),
        f"{role}.mlp": Span(f"{block}.feed_forward", channels=channels),
        **linears(f"{role}.mlp", f"{block}.feed_forward", _LINEARS),
        **norms(role, block, "layer_norm", "final_layer_norm"),
        **_language(f"{role}.language", f"{block}.adapter_layer", channels),
    }
    frames = {
        **layers,
        "audio.norm" if stable else "audio.embeddings.norm": norm(f"{inner}encoder.layer_norm"),
        "audio.embeddings": linear(f"{inner}feature_projection.projection"),
    }
    by_frame = any(cls.__name__.endswith("FrameClassification") for cls in type(model).__mro__)
    convolution = f"{inner}feature_extractor.conv_layers.{{i}}.conv"
    return Anatomy(
        family=config.model_type,
        spans={
            **in_rows(with_prefix(frames, 0), 1),
            "audio.frontend[i]": convolution_in_time(convolution),
            "audio.projector": linear("projector"),
            **ends("lm_head", "BTK", model),
            **ends("classifier", "BTK" if by_frame else "BK", model),
        },
        towers={"audio": inner.rstrip(".")},
        taps={
            **block_taps("audio", tower, "layer_norm", "final_layer_norm"),
            **({} if stable else _residuals_behind_norms(role, block)),
        },
        fills={f"{inner}encoder": frames_told},
        # in train mode it would keep every activation of the frozen convolutions for backward
        settings={f"{inner}feature_extractor._requires_grad": False},
        facts=_facts,
    )


def _language(role: str, path: str, channels: str) -> dict[str, Span]:
    """A block's own adapter for one language, which MMS models have (`adapter_attn_dim`)."""
    return {
        role: Span(path, channels=channels),
        f"{role}.norm": norm(f"{path}.norm"),
        **linears(role, path, {"down": "linear_1", "up": "linear_2"}),
    }


def frames_told(module: Any, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The facts "mask" and "tokens", of a pass through the blocks."""
    frames = args[0] if args else kwargs["hidden_states"]
    return {**text_mask(module, args, kwargs), "tokens": frames.shape[1]}


def _read(prefix: str, path: str, names: dict[str, str]) -> dict[str, Span]:
    """`linears` whose weights the module at `path` reads without calling them."""
    return {
        f"{prefix}.{word}": Span(path, ("weight",), weight=f"{path}.{name}.weight")
        for word, name in names.items()
    }


def convolution_in_time(path: str) -> Span:
    """Of the front end, along time; the frames behind it are fewer than those before."""
    return replace(patches(path), layout="BCT", aligned=False)


def ends(path: str, layout: str, model: Any) -> dict[str, Span]:
    """The output layer at `path`, where the model has one."""
    return {"logits": logits(path, layout)} if hasattr(model, path) else {}


def _residuals_behind_norms(role: str, block: str) -> dict[str, str]:
    """What the branches of a block that norms behind them are added to."""
    return {
        f"{role}.attn.residual": f"{block}:in",
        f"{role}.mlp.residual": f"{block}.layer_norm:out",
    }


def _facts(model: Any) -> dict[str, Any]:
    config = model.config
    heads = {"lm_head": "vocab_size", "classifier": "num_labels"}
    return {
        "audio_layers": config.num_hidden_layers,
        "width": config.hidden_size,
        "activation": config.hidden_act,
        "norms": "before" if getattr(config, "do_stable_layer_norm", False) else "behind",
        "frontend": [list(config.conv_dim), list(config.conv_kernel), list(config.conv_stride)],
        "classes": next((getattr(config, n) for h, n in heads.items() if hasattr(model, h)), None),
    }
