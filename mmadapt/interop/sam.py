"""The names of SAM's tensors in segment_anything and in transformers, both ways."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from mmadapt.errors import BackboneError

if TYPE_CHECKING:
    from torch import Tensor

#: beginning of a key in segment_anything, and in transformers; the first that fits decides
_NAMES: tuple[tuple[str, str], ...] = (
    ("image_encoder.patch_embed.proj", "vision_encoder.patch_embed.projection"),
    ("image_encoder.blocks.{i}.norm1", "vision_encoder.layers.{i}.layer_norm1"),
    ("image_encoder.blocks.{i}.norm2", "vision_encoder.layers.{i}.layer_norm2"),
    ("image_encoder.blocks.{i}", "vision_encoder.layers.{i}"),
    ("image_encoder.neck.0", "vision_encoder.neck.conv1"),
    ("image_encoder.neck.1", "vision_encoder.neck.layer_norm1"),
    ("image_encoder.neck.2", "vision_encoder.neck.conv2"),
    ("image_encoder.neck.3", "vision_encoder.neck.layer_norm2"),
    ("image_encoder.pos_embed", "vision_encoder.pos_embed"),
    ("prompt_encoder.point_embeddings.{i}", "prompt_encoder.point_embed.{i}"),
    ("prompt_encoder.mask_downscaling.0", "prompt_encoder.mask_embed.conv1"),
    ("prompt_encoder.mask_downscaling.1", "prompt_encoder.mask_embed.layer_norm1"),
    ("prompt_encoder.mask_downscaling.3", "prompt_encoder.mask_embed.conv2"),
    ("prompt_encoder.mask_downscaling.4", "prompt_encoder.mask_embed.layer_norm2"),
    ("prompt_encoder.mask_downscaling.6", "prompt_encoder.mask_embed.conv3"),
    ("prompt_encoder.not_a_point_embed", "prompt_encoder.not_a_point_embed"),
    ("prompt_encoder.no_mask_embed", "prompt_encoder.no_mask_embed"),
    *(
        (
            f"mask_decoder.transformer.layers.{{i}}.norm{place}",
            f"mask_decoder.transformer.layers.{{i}}.layer_norm{place}",
        )
        for place in range(1, 5)
    ),
    (
        "mask_decoder.transformer.norm_final_attn",
        "mask_decoder.transformer.layer_norm_final_attn",
    ),
    ("mask_decoder.transformer", "mask_decoder.transformer"),
    ("mask_decoder.output_upscaling.0", "mask_decoder.upscale_conv1"),
    ("mask_decoder.output_upscaling.1", "mask_decoder.upscale_layer_norm"),
    ("mask_decoder.output_upscaling.3", "mask_decoder.upscale_conv2"),
    ("mask_decoder.iou_token", "mask_decoder.iou_token"),
    ("mask_decoder.mask_tokens", "mask_decoder.mask_tokens"),
)
_MATRIX = "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
#: one matrix under two names
_MATRICES = (
    "shared_image_embedding.positional_embedding",
    "prompt_encoder.shared_embedding.positional_embedding",
)
#: perceptrons: segment_anything has one list, transformers a list between two named linears
_HEADS = r"(mask_decoder\.(?:output_hypernetworks_mlps\.\d+|iou_prediction_head))"


def to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of `segment_anything`'s Sam under the names of `transformers.SamModel`.

    Tensors are the given ones. Raises `BackboneError` for keys that SAM does not have.
    """
    last = _depths(state, rf"{_HEADS}\.layers\.(\d+)\.")
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        if key == _MATRIX:
            found.update(dict.fromkeys(_MATRICES, value))
            continue
        head = re.fullmatch(rf"{_HEADS}\.layers\.(\d+)\.(\w+)", key)
        if head:
            place = int(head[2])
            word = {0: "proj_in", last[head[1]]: "proj_out"}.get(place, f"layers.{place - 1}")
            found[f"{head[1]}.{word}.{head[3]}"] = value
        else:
            found[_renamed(key, _NAMES, "segment_anything")] = value
    return found


def to_segment_anything(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse: a state dict of `transformers.SamModel` under the names of segment_anything's Sam."""
    last = {  # proj_in, those between, proj_out
        head: 1 for key in state for head in re.findall(rf"{_HEADS}\.proj_out\.", key)
    }
    for head, place in _depths(state, rf"{_HEADS}\.layers\.(\d+)\.").items():
        last[head] = place + 2
    backwards = tuple((theirs, ours) for ours, theirs in _NAMES)
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        if key in _MATRICES:
            found[_MATRIX] = value
            continue
        head = re.fullmatch(rf"{_HEADS}\.(proj_in|layers\.(\d+)|proj_out)\.(\w+)", key)
        if head:
            ends = {"proj_in": 0, "proj_out": last.get(head[1], 1)}
            place = ends[head[2]] if head[2] in ends else int(head[3]) + 1
            found[f"{head[1]}.layers.{place}.{head[4]}"] = value
        else:
            found[_renamed(key, backwards, "transformers")] = value
    return found


def _depths(state: Mapping[str, Tensor], pattern: str) -> dict[str, int]:
    """For every head, the last place in its list."""
    found: dict[str, int] = {}
    for key in state:
        match = re.match(pattern, key)
        if match:
            found[match[1]] = max(found.get(match[1], 0), int(match[2]))
    return found


def _renamed(key: str, names: tuple[tuple[str, str], ...], library: str) -> str:
    for old, new in names:
        match = re.match(re.escape(old).replace(r"\{i\}", r"(\d+)") + r"(?=\.|$)", key)
        if match:
            index = match[1] if match.groups() else ""
            return new.replace("{i}", index) + key[match.end() :]
    raise BackboneError(
        f"{key!r} is no tensor of SAM as {library} names them",
        "take the state dict of a bare SAM: without 'module.' in front, without adapters",
    )
