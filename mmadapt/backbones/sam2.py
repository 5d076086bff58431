"""SAM 2 for images, in transformers: a Hiera encoder, whose stages halve the grid and widen it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mmadapt.backbones.blocks import block_taps, linear, patches
from mmadapt.backbones.sam import encoder_blocks
from mmadapt.backbones.sam_decoder import HF2, decoder, prompt_tokens, prompts, weight_only
from mmadapt.core.anatomy import Anatomy
from mmadapt.core.site import Span

_NORMS = ("layer_norm1", "layer_norm2")


def sam2_anatomy(model: Any) -> Anatomy:
    """`transformers.Sam2Model`.

    Where a stage begins, attention pools its queries: that block and its attention give a quarter of
    the positions they take. `skip` is the linear that widens what goes around such a block.
    """
    path = "vision_encoder.backbone"
    blocks = f"{path}.blocks"
    spans = {
        "vision.patches": patches(f"{path}.patch_embed.projection"),
        "vision.positions": weight_only(path, f"{path}.pos_embed"),
        "vision.positions.window": weight_only(path, f"{path}.pos_embed_window"),
        **encoder_blocks(blocks, "0|hidden_states", _NORMS, ("proj_in", "proj_out")),
        "vision.layers[i].skip": replace(linear(f"{blocks}.{{i}}.proj"), layout="BHWC"),
    }
    for place, block in enumerate(model.get_submodule(blocks)):
        if block.query_stride:
            for word in ("", ".attn"):
                span = spans[f"vision.layers[i]{word}"]
                spans[f"vision.layers[{place}]{word}"] = _pooled(span, place)
    for level in range(len(model.vision_encoder.neck.convs)):
        spans[f"vision.neck.convs[{level}]"] = patches(f"vision_encoder.neck.convs.{level}")
    return Anatomy(
        family="sam2",
        spans={**spans, **prompts(HF2, model), **decoder(HF2, model)},
        towers={"vision": "vision_encoder", "decoder": "mask_decoder"},
        taps=block_taps("vision", blocks, *_NORMS),
        fills={"mask_decoder": prompt_tokens},
        facts=_facts,
    )


def _pooled(span: Span, place: int) -> Span:
    """The span of one block whose output has fewer positions than its input."""
    paths = {
        name: getattr(span, name).replace("{i}", str(place))
        for name in ("module", "channels", "channels_in")
    }
    return replace(span, aligned=False, **paths)


def _facts(model: Any) -> dict[str, Any]:
    config, decoder = model.config.vision_config.backbone_config, model.config.mask_decoder_config
    return {
        "image": model.config.prompt_encoder_config.image_size,
        "patch": list(config.patch_stride),
        "window": list(config.window_size_per_stage),
        "vision_layers": list(config.blocks_per_stage),
        "global_layers": list(config.global_attention_blocks),
        "width": list(config.embed_dim_per_stage),
        "heads": list(config.num_attention_heads_per_stage),
        "activation": config.hidden_act,
        "decoder_layers": decoder.num_hidden_layers,
        "decoder_width": decoder.hidden_size,
        "masks": decoder.num_multimask_outputs,
    }
