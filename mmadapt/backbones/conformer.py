"""Conformers of transformers: Wav2Vec2-Conformer, Wav2Vec2-BERT 2.0 and Parakeet (Fast Conformer).

A block stands between two halves of an MLP, each of which counts half:
h = x + ½·mlp1(x), then + attn, then + conv, then norm(h + ½·mlp(h)). So what a layer adds at `mlp1`
or `mlp`, which is the second half and has the name `mlp2` too, counts half as well; behind the block,
at `layers[i]`, it counts whole.

The fact "mask" (B, T) is over the frames that the blocks see. Wav2Vec2-BERT and Parakeet keep padding
out of their convolutions by themselves. Wav2Vec2-Conformer's do not: a clip's frames depend on how
far it is padded, unless `mmadapt.tasks.audio.fix_conformer_padding` keeps it out; and where its front
end has a group norm, they do all the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmadapt.backbones.audio import in_rows
from mmadapt.backbones.blocks import (
    block_taps,
    linear,
    linears,
    norm,
    with_prefix,
)
from mmadapt.backbones.wav2vec2 import convolution_in_time, ends, frames_told
from mmadapt.core.anatomy import Anatomy
from mmadapt.core.site import Span

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class _Paths:
    """Where one class keeps its parts, inside a block."""

    mlp1: str = "ffn1"
    mlp: str = "ffn2"
    up: str = "intermediate_dense"
    down: str = "output_dense"
    q: str = "linear_q"
    k: str = "linear_k"
    v: str = "linear_v"
    o: str = "linear_out"
    conv: str = "conv_module"
    norm_mlp1: str = "ffn1_layer_norm"
    norm1: str = "self_attn_layer_norm"
    norm_conv: str = "conv_module.layer_norm"
    norm2: str = "ffn2_layer_norm"
    norm_out: str = "final_layer_norm"


_PARAKEET = _Paths(
    mlp1="feed_forward1",
    mlp="feed_forward2",
    up="linear1",
    down="linear2",
    q="q_proj",
    k="k_proj",
    v="v_proj",
    o="o_proj",
    conv="conv",
    norm_mlp1="norm_feed_forward1",
    norm1="norm_self_att",
    norm_conv="norm_conv",
    norm2="norm_feed_forward2",
    norm_out="norm_out",
)


def conformer_anatomy(model: Any) -> Anatomy:
    """Wav2Vec2-Conformer and Wav2Vec2-BERT 2.0, bare or with a head."""
    prefix = model.base_model_prefix
    inner = f"{prefix}." if hasattr(model, prefix) else ""
    by_frame = any(cls.__name__.endswith("FrameClassification") for cls in type(model).__mro__)
    waves = hasattr(model.get_submodule(inner.rstrip(".")), "feature_extractor")
    spans = {
        **_blocks(f"{inner}encoder.layers", _Paths()),
        "audio.norm": norm(f"{inner}encoder.layer_norm"),
        "audio.embeddings": linear(f"{inner}feature_projection.projection"),
    }
    return Anatomy(
        family=model.config.model_type,
        spans={
            **in_rows(with_prefix(spans, 0), 1),
            "audio.frontend[i]": convolution_in_time(
                f"{inner}feature_extractor.conv_layers.{{i}}.conv"
            ),
            "audio.projector": linear("projector"),
            **ends("lm_head", "BTK", model),
            **ends("classifier", "BTK" if by_frame else "BK", model),
        },
        towers={"audio": inner.rstrip(".")},
        taps=_taps(f"{inner}encoder.layers", _Paths()),
        fills={f"{inner}encoder": frames_told},
        # in train mode it would keep every activation of the frozen convolutions for backward
        settings={f"{inner}feature_extractor._requires_grad": False} if waves else {},
        facts=_facts,
        aliases={"audio.layers[i].mlp2": "audio.layers[i].mlp"},
    )


def parakeet_anatomy(model: Any) -> Anatomy:
    """Parakeet's encoder, bare or with a CTC head."""
    inner = "encoder." if hasattr(model, "encoder") else ""
    head = "ctc_head.weight"
    spans = {
        **_blocks(f"{inner}layers", _PARAKEET),
        "audio.embeddings": linear(f"{inner}subsampling.linear"),
    }
    return Anatomy(
        family=_encoder_config(model).model_type,
        spans={
            **in_rows(with_prefix(spans, 0), 1),
            # a convolution of one frame, which takes and gives its channels last
            "logits": Span(
                "ctc_head",
                ("out", "in"),
                channels=f"{head}@0",
                channels_in=f"{head}@1",
                layout="BTK",
            ),
        },
        towers={"audio": inner.rstrip(".")},
        taps=_taps(f"{inner}layers", _PARAKEET),
        fills={inner.rstrip("."): _parakeet_told},
        facts=_facts,
        aliases={"audio.layers[i].mlp2": "audio.layers[i].mlp"},
    )


def _blocks(tower: str, paths: _Paths) -> dict[str, Span]:
    block, role = tower + ".{i}", "audio.layers[i]"
    channels = f"{block}.{paths.norm1}.weight"
    attention, conv = f"{block}.self_attn", f"{block}.{paths.conv}"
    projections = {"q": paths.q, "k": paths.k, "v": paths.v, "o": paths.o}
    dense = {"up": paths.up, "down": paths.down}
    spans = {
        role: Span(block, channels=channels),
        f"{role}.mlp1": Span(f"{block}.{paths.mlp1}", channels=channels),
        **linears(f"{role}.mlp1", f"{block}.{paths.mlp1}", dense),
        f"{role}.attn": Span(attention, channels=channels),
        **linears(f"{role}.attn", attention, projections),
        f"{role}.conv": Span(conv, channels=channels),
        f"{role}.mlp": Span(f"{block}.{paths.mlp}", channels=channels),
        **linears(f"{role}.mlp", f"{block}.{paths.mlp}", dense),
    }
    for word in ("norm_mlp1", "norm1", "norm_conv", "norm2", "norm_out"):
        spans[f"{role}.{word}"] = norm(f"{block}.{getattr(paths, word)}")
    return spans


def _taps(tower: str, paths: _Paths) -> dict[str, Any]:
    block, role = tower + ".{i}", "audio.layers[i]"
    return {
        **block_taps("audio", tower, paths.norm1, paths.norm2),
        f"{role}.mlp1.residual": f"{block}.{paths.norm_mlp1}:in",
        f"{role}.conv.residual": f"{block}.{paths.norm_conv}:in",
    }


def _encoder_config(model: Any) -> Any:
    return getattr(model.config, "encoder_config", model.config)


def _parakeet_told(module: Any, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The facts "mask" and "tokens", of the frames that convolutions with strides leave."""
    features = args[0] if args else kwargs["input_features"]
    mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
    tokens = _subsampled(module.config, features.shape[1])
    if mask is None:
        return {"mask": None, "tokens": tokens}
    lengths: Tensor = _subsampled(module.config, mask.sum(-1))
    import torch

    return {"mask": torch.arange(tokens, device=mask.device) < lengths[:, None], "tokens": tokens}


def _subsampled(config: Any, length: Any) -> Any:
    """Frames behind the convolutions that halve their number, a whole number or a tensor of them."""
    kernel, stride = config.subsampling_conv_kernel_size, config.subsampling_conv_stride
    factor = config.subsampling_factor
    while factor > 1:
        length = (length + 2 * ((kernel - 1) // 2) - kernel) // stride + 1
        factor //= 2
    return length


def _facts(model: Any) -> dict[str, Any]:
    config = _encoder_config(model)
    heads = {"lm_head": "vocab_size", "ctc_head": "vocab_size", "classifier": "num_labels"}
    found = [getattr(model.config, n) for h, n in heads.items() if hasattr(model, h)]
    kernel = getattr(
        config, "conv_depthwise_kernel_size", getattr(config, "conv_kernel_size", None)
    )
    return {
        "audio_layers": config.num_hidden_layers,
        "width": config.hidden_size,
        "inner": config.intermediate_size,
        "activation": config.hidden_act,
        "kernel": kernel,
        "positions": getattr(config, "position_embeddings_type", "relative"),
        "classes": found[0] if found else None,
    }
