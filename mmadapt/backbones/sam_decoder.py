"""What follows SAM's image encoder: the prompt encoder and the mask decoder, in every library.

`token_to_image` and `image_to_token` are the decoder's two cross-attentions.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from mmadapt.backbones.blocks import linear, linears, norm, patches
from mmadapt.core.site import Span


@dataclass(frozen=True)
class Names:
    """What one library calls the parts; an argument stands as "position|keyword"."""

    #: where the embeddings of the four kinds of points are: a list of modules, or one module
    points: str
    #: convolutions and norms of the mask prompts, below the prompt encoder
    masks: tuple[str, str, str, str, str]
    #: what the norms' names begin with
    norm: str
    #: the linears of an MLP, its input, and the last linear of an attention
    mlp: tuple[str, str]
    x: str
    out: str
    #: the queries of an attention
    query: str
    #: convolution, norm and convolution of the upscaling, below the decoder
    upscale: tuple[str, str, str]
    #: whether the linears of a head are one list, or a list between two named ones
    listed: bool
    #: axes of the decoder's tokens: B batch, P prompts of an image, T tokens, C channels
    tokens: str
    #: rows of the decoder for each row of the batch
    rows: str


HF = Names(
    points="point_embed",
    masks=("conv1", "layer_norm1", "conv2", "layer_norm2", "conv3"),
    norm="layer_norm",
    mlp=("lin1", "lin2"),
    x="0|hidden_states",
    out="out_proj",
    query="0|query",
    upscale=("upscale_conv1", "upscale_layer_norm", "upscale_conv2"),
    listed=False,
    tokens="BPTC",
    rows="several",
)
HF2 = replace(HF, mlp=("proj_in", "proj_out"), out="o_proj")
#: its decoder is called for one image at a time, with that image's prompts as rows
SEGMENT_ANYTHING = Names(
    points="point_embeddings",
    masks=("0", "1", "3", "4", "6"),
    norm="norm",
    mlp=("lin1", "lin2"),
    x="0|x",
    out="out_proj",
    query="0|q",
    upscale=("output_upscaling.0", "output_upscaling.1", "output_upscaling.3"),
    listed=True,
    tokens="BTC",
    rows="unknown",
)


def weight_only(module: str, parameter: str, block: tuple[int, int] = (0, 1)) -> Span:
    """A tensor that its module reads itself, met at the module's own call."""
    return Span(module, ("weight",), weight=parameter, block=block)


def prompts(names: Names, model: Any) -> dict[str, Span]:
    """Roles of the prompt encoder; `prompt.points[i]`: background, foreground, two corners of a box."""
    path = "prompt_encoder"
    single = not isinstance(getattr(model.prompt_encoder, names.points), Iterable)
    spans = {}
    for kind in range(4):
        where = f"{path}.{names.points}" if single else f"{path}.{names.points}.{kind}"
        block = (kind, 4) if single else (0, 1)
        spans[f"prompt.points[{kind}]"] = weight_only(path, f"{where}.weight", block)
    spans["prompt.no_point"] = weight_only(path, f"{path}.not_a_point_embed.weight")
    spans["prompt.no_mask"] = weight_only(path, f"{path}.no_mask_embed.weight")
    masks = f"{path}.mask_embed" if not names.listed else f"{path}.mask_downscaling"
    for word, name in zip(("conv1", "norm1", "conv2", "norm2", "conv3"), names.masks, strict=True):
        where = f"{masks}.{name}"
        conv = word.startswith("conv")
        spans[f"prompt.masks.{word}"] = patches(where) if conv else norm(where, "BCHW")
    return _with(spans, rows=names.rows)


def decoder(names: Names, model: Any) -> dict[str, Span]:
    """Roles of the mask decoder: every tensor of it belongs to one."""
    path, module = "mask_decoder", model.mask_decoder
    spans = {
        **_two_way(names, f"{path}.transformer"),
        "decoder.tokens.iou": weight_only(path, f"{path}.iou_token.weight"),
        "decoder.tokens.masks": weight_only(path, f"{path}.mask_tokens.weight"),
    }
    first, between, second = (f"{path}.{name}" for name in names.upscale)
    # the rows of a transposed convolution's kernel are its inputs
    spans["decoder.upscale.conv1"] = weight_only(first, f"{first}.weight")
    spans["decoder.upscale.norm"] = norm(between, "BCHW")
    spans["decoder.upscale.conv2"] = weight_only(second, f"{second}.weight")
    heads = {"decoder.masks[i]": f"{path}.output_hypernetworks_mlps.{{i}}"}
    heads["decoder.iou"] = f"{path}.iou_prediction_head"
    depths = {"decoder.masks[i]": 3, "decoder.iou": module.iou_prediction_head.num_layers}
    if hasattr(module, "pred_obj_score_head"):  # SAM 2 asks too whether the object is there
        spans["decoder.tokens.object"] = weight_only(path, f"{path}.obj_score_token.weight")
        heads["decoder.object"], depths["decoder.object"] = f"{path}.pred_obj_score_head", 3
        for level in range(2):  # features of finer grids, computed with the image
            spans[f"decoder.fine[{level}]"] = patches(f"{path}.conv_s{level}")
    for role, where in heads.items():
        spans.update(_head(names, role, where, depths[role]))
    return _with(spans, rows=names.rows)


def _two_way(names: Names, path: str) -> dict[str, Span]:
    """The transformer in which prompt tokens and image attend to each other."""
    block, role = path + ".layers.{i}", "decoder.layers[i]"
    channels = f"{block}.{names.norm}1.weight"
    spans = {role: Span(block, x="0|queries", channels=channels)}
    attentions = {
        f"{role}.attn": (f"{block}.self_attn", channels),
        f"{role}.token_to_image": (f"{block}.cross_attn_token_to_image", channels),
        f"{role}.image_to_token": (f"{block}.cross_attn_image_to_token", channels),
        "decoder.token_to_image": (
            f"{path}.final_attn_token_to_image",
            f"{path}.{names.norm}_final_attn.weight",
        ),
    }
    words = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": names.out}
    for where, (module, width) in attentions.items():
        spans[where] = Span(module, x=names.query, channels=width)
        spans.update(linears(where, module, words))
    spans[f"{role}.mlp"] = Span(f"{block}.mlp", x=names.x, channels=channels)
    inner = {"up": names.mlp[0], "down": names.mlp[1]}
    spans.update(linears(f"{role}.mlp", f"{block}.mlp", inner))
    for place in range(1, 5):
        spans[f"{role}.norm{place}"] = norm(f"{block}.{names.norm}{place}")
    spans["decoder.norm"] = norm(f"{path}.{names.norm}_final_attn")
    return _with(spans, layout=names.tokens)


def _head(names: Names, role: str, path: str, depth: int) -> dict[str, Span]:
    if names.listed:
        linears_of = [f"layers.{place}" for place in range(depth)]
    else:
        linears_of = ["proj_in", *(f"layers.{place}" for place in range(depth - 2)), "proj_out"]
    spans = {
        f"{role}.linear{place + 1}": linear(f"{path}.{name}")
        for place, name in enumerate(linears_of)
    }
    return _with(spans, layout=names.tokens.replace("T", ""))


def _with(spans: dict[str, Span], **changes: Any) -> dict[str, Span]:
    return {role: replace(span, **changes) for role, span in spans.items()}


def prompt_tokens(module: Any, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The fact "prompt": the embedded points and boxes that the mask decoder was called with.

    (B, P, N, C), or (P, N, C) in segment_anything; None where there are none.
    """
    found = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
    tokens = found.get("sparse_prompt_embeddings")
    return {"prompt": tokens if tokens is not None and tokens.shape[-2] else None}
