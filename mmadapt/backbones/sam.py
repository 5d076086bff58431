"""SAM in transformers and in segment_anything: one table, so that adapter files fit both.

The image encoder keeps its tokens as a grid (BHWC). Most of its blocks attend within windows, whose
rows stand side by side: all windows of an image, then those of the next one. Where a window sticks
out of the grid it is filled with zeros, and what comes out of there is thrown away.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mmadapt.backbones.blocks import (
    activation_name,
    block_taps,
    linear,
    linears,
    norm,
    norms,
    patches,
)
from mmadapt.backbones.sam_decoder import (
    HF,
    SEGMENT_ANYTHING,
    decoder,
    prompt_tokens,
    prompts,
    weight_only,
)
from mmadapt.core.anatomy import Anatomy
from mmadapt.core.parts import GridAttention, GridEncoder, Prompted
from mmadapt.core.site import Span

if TYPE_CHECKING:
    from torch import nn

_NORMS = ("layer_norm1", "layer_norm2")


def sam_anatomy(model: nn.Module) -> Anatomy:
    """`transformers.SamModel`."""
    encoder = _hf_encoder()
    return Anatomy(
        family="sam",
        spans={
            "model": _whole("", "vision_encoder.pos_embed@3", _hf_model),
            **encoder.spans,
            **prompts(HF, model),
            **decoder(HF, model),
            **_ends(),
        },
        towers={"vision": "vision_encoder", "decoder": "mask_decoder"},
        taps=encoder.taps,
        fills={"mask_decoder": prompt_tokens},
        facts=_hf_facts,
    )


def sam_vision_anatomy(model: nn.Module) -> Anatomy:
    """`transformers.SamVisionModel`, the image encoder alone."""
    encoder = _hf_encoder()
    return replace(encoder, facts=_hf_vision_facts)


def _hf_encoder() -> Anatomy:
    path = "vision_encoder"
    neck = f"{path}.neck"
    spans = {
        "vision": _whole(path, f"{neck}.conv2.weight@0", _hf_encoder_parts),
        "vision.patches": patches(f"{path}.patch_embed.projection"),
        "vision.positions": weight_only(path, f"{path}.pos_embed"),
        **_blocks(f"{path}.layers", "0|hidden_states", _NORMS),
        "vision.neck": Span(  # takes BHWC and gives BCHW
            neck,
            x="0|hidden_states",
            channels=f"{neck}.conv2.weight@0",
            channels_in=f"{neck}.conv1.weight@1",
            layout="BCHW",
            aligned=False,
        ),
        "vision.neck.conv1": patches(f"{neck}.conv1"),
        "vision.neck.norm1": norm(f"{neck}.layer_norm1", "BCHW"),
        "vision.neck.conv2": patches(f"{neck}.conv2"),
        "vision.neck.norm2": norm(f"{neck}.layer_norm2", "BCHW"),
    }
    return Anatomy(
        family="sam-vision",
        spans=spans,
        towers={"vision": path},
        taps=block_taps("vision", f"{path}.layers", *_NORMS),
    )


def segment_anything_anatomy(model: nn.Module) -> Anatomy:
    """`segment_anything.modeling.Sam`; its own forward has no gradients, its three parts have."""
    path = "image_encoder"
    neck = f"{path}.neck"
    spans = {
        "model": _whole("", f"{path}.pos_embed@3", _segment_anything_model),
        "vision": _whole(path, f"{neck}.2.weight@0", _segment_anything_encoder_parts),
        "vision.patches": patches(f"{path}.patch_embed.proj"),
        "vision.positions": weight_only(path, f"{path}.pos_embed"),
        **_blocks(f"{path}.blocks", "0|x", ("norm1", "norm2")),
        "vision.neck": Span(
            neck,
            x="0|input",
            channels=f"{neck}.2.weight@0",
            channels_in=f"{neck}.0.weight@1",
            layout="BCHW",
        ),
        "vision.neck.conv1": patches(f"{neck}.0"),
        "vision.neck.norm1": norm(f"{neck}.1", "BCHW"),
        "vision.neck.conv2": patches(f"{neck}.2"),
        "vision.neck.norm2": norm(f"{neck}.3", "BCHW"),
        **prompts(SEGMENT_ANYTHING, model),
        **decoder(SEGMENT_ANYTHING, model),
        **_ends(),
    }
    return Anatomy(
        family="sam",
        spans=spans,
        towers={"vision": path, "decoder": "mask_decoder"},
        taps=block_taps("vision", f"{path}.blocks", "norm1", "norm2"),
        fills={"mask_decoder": prompt_tokens},
        facts=_segment_anything_facts,
    )


def _blocks(path: str, x: str, names: tuple[str, str]) -> dict[str, Span]:
    spans = encoder_blocks(path, x, names, ("lin1", "lin2"))
    attention = "vision.layers[i].attn"
    return {**spans, attention: replace(spans[attention], parts=_attention)}


def encoder_blocks(
    path: str, x: str, names: tuple[str, str], mlp: tuple[str, str]
) -> dict[str, Span]:
    """Roles of an encoder's blocks; q, k and v are each a third of a called linear's columns."""
    block, role = path + ".{i}", "vision.layers[i]"
    first, second = (f"{block}.{name}.weight" for name in names)
    fused = f"{block}.attn.qkv"
    attention = {
        f"{role}.attn": Span(
            f"{block}.attn",
            x=x,
            channels=f"{block}.attn.proj.weight@0",
            channels_in=f"{fused}.weight@1",
        ),
        **{
            f"{role}.attn.{word}": Span(
                fused, ("out", "weight"), "0|input", weight=f"{fused}.weight", block=(place, 3)
            )
            for place, word in enumerate("qkv")
        },
        f"{role}.attn.o": linear(f"{block}.attn.proj"),
    }
    spans = {
        role: Span(block, x=x, channels=second, channels_in=first),
        **{name: replace(span, rows="several") for name, span in attention.items()},
        f"{role}.mlp": Span(f"{block}.mlp", x=x, channels=second),
        **linears(f"{role}.mlp", f"{block}.mlp", {"up": mlp[0], "down": mlp[1]}),
        **norms(role, block, *names),
    }
    tables = {
        f"{role}.attn.rel_{axis}": weight_only(f"{block}.attn", f"{block}.attn.rel_pos_{axis}")
        for axis in "hw"
    }
    return {**{name: replace(span, layout="BHWC") for name, span in spans.items()}, **tables}


# -- the parts, for methods that stand in for a whole ------------------------------------------------


def _whole(path: str, channels: str, parts: Any = None) -> Span:
    """A module whose call a method may stand in for, taking and giving what it likes."""
    return Span(path, ("around",), channels=channels, layout="BCHW", aligned=False, parts=parts)


def _ends() -> dict[str, Span]:
    return {
        "prompt": _whole("prompt_encoder", "prompt_encoder.no_mask_embed.weight@1"),
        "decoder": _whole("mask_decoder", "mask_decoder.iou_token.weight@1"),
    }


def _hf_model(model: Any) -> Prompted:
    return Prompted(model.vision_encoder, model.prompt_encoder, model.mask_decoder)


def _segment_anything_model(model: Any) -> Prompted:
    return Prompted(model.image_encoder, model.prompt_encoder, model.mask_decoder)


def _hf_encoder_parts(encoder: Any) -> GridEncoder:
    return GridEncoder(encoder.patch_embed.projection, encoder.pos_embed, encoder.layers)


def _segment_anything_encoder_parts(encoder: Any) -> GridEncoder:
    return GridEncoder(encoder.patch_embed.proj, encoder.pos_embed, encoder.blocks)


def _attention(module: Any) -> GridAttention:
    """Both libraries agree on all names but one."""
    original = hasattr(module, "num_heads")
    return GridAttention(
        qkv=module.qkv,
        proj=module.proj,
        heads=module.num_heads if original else module.num_attention_heads,
        rows=getattr(module, "rel_pos_h", None),
        columns=getattr(module, "rel_pos_w", None),
        pair=not original,
    )


# -- what must be equal for a file to fit ---------------------------------------------------------


def _hf_vision_facts(model: Any) -> dict[str, Any]:
    config = getattr(model.config, "vision_config", model.config)
    return _facts(
        config.image_size,
        config.patch_size,
        config.window_size,
        config.num_hidden_layers,
        set(config.global_attn_indexes),
        config.hidden_size,
        config.num_attention_heads,
        config.hidden_act,
    )


def _hf_facts(model: Any) -> dict[str, Any]:
    config = model.config.mask_decoder_config
    return {
        **_hf_vision_facts(model),
        "decoder_layers": config.num_hidden_layers,
        "decoder_width": config.hidden_size,
        "masks": config.num_multimask_outputs,
    }


def _segment_anything_facts(model: Any) -> dict[str, Any]:
    encoder, decoder = model.image_encoder, model.mask_decoder
    windows: list[int] = [block.window_size for block in encoder.blocks]
    return {
        **_facts(
            encoder.img_size,
            encoder.patch_embed.proj.kernel_size[0],
            max(windows),
            len(windows),
            {place for place, size in enumerate(windows) if size == 0},
            encoder.blocks[0].norm1.weight.shape[0],
            encoder.blocks[0].attn.num_heads,
            activation_name(encoder.blocks[0].mlp.act),
        ),
        "decoder_layers": decoder.transformer.depth,
        "decoder_width": decoder.transformer_dim,
        "masks": decoder.num_multimask_outputs,
    }


def _facts(
    image: int,
    patch: int,
    window: int,
    layers: int,
    whole: set[int],
    width: int,
    heads: int,
    activation: str,
) -> dict[str, Any]:
    return {
        "image": image,
        "patch": patch,
        "window": window,
        "vision_layers": layers,
        "global_layers": sorted(whole),
        "width": width,
        "heads": heads,
        "activation": activation,
    }
