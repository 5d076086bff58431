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


def resize_positions(state: Mapping[str, Tensor], grid: int) -> dict[str, Tensor]:
    """A state dict of SAM, in either library's names, for images of grid × grid patches.

    What is added to the tokens is resized bicubically, the tables of relative positions of the blocks
    that see the whole grid linearly, from 2·old − 1 rows to 2·grid − 1; those of windows stay, like
    everything else. A SAM at 256 pixels, as SAM-Med2D's, has 16 × 16 patches. Raises `BackboneError`
    where the tables of windows and of whole grids cannot be told apart.
    """
    from torch.nn import functional as F

    places = [key for key in state if key.endswith("_encoder.pos_embed")]
    if len(places) != 1 or state[places[0]].ndim != 4:
        raise BackboneError(
            "the state dict has no positions of a SAM",
            "expected image_encoder.pos_embed or vision_encoder.pos_embed (1, H, W, C)",
        )
    old = state[places[0]].shape[1]
    tables = [key for key in state if ".attn.rel_pos_" in key]
    whole = {key for key in tables if len(state[key]) == 2 * old - 1}
    if tables and grid != old and len(whole) in (0, len(tables)):
        rows = sorted({len(state[key]) for key in tables})
        raise BackboneError(
            f"the tables of relative positions have {rows} rows, expected some with {2 * old - 1}, those "
            f"of the whole {old} × {old} grid, and others, those of windows"
        )
    found = dict(state)
    if grid == old:
        return found
    positions = state[places[0]].movedim(-1, 1)
    resized = F.interpolate(positions, (grid, grid), mode="bicubic", align_corners=False)
    found[places[0]] = resized.movedim(1, -1).contiguous()
    for key in whole:
        table = F.interpolate(state[key].T[None], 2 * grid - 1, mode="linear")  # (1, C, rows)
        found[key] = table[0].T.contiguous()
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
