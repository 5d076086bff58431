"""The two halves of a SAM, in transformers and in segment_anything, with gradients where wanted."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmadapt.core.backbone import unwrap, unwrap_model
from mmadapt.errors import BackboneError

_KINDS = {
    "transformers.models.sam.modeling_sam.SamModel": "transformers",
    "segment_anything.modeling.sam.Sam": "segment_anything",
}


def sam_kind(m: Any) -> tuple[Any, str]:
    """The model, and the library whose SAM it is."""
    model = unwrap_model(m)
    for cls in type(model).__mro__:
        kind = _KINDS.get(f"{cls.__module__}.{cls.__qualname__}")
        if kind is not None:
            return model, kind
    raise BackboneError(
        f"a {type(model).__name__} is no SAM that can be prompted here",
        "transformers' SamModel or segment_anything's Sam",
    )


def sides(m: Any) -> tuple[int, int]:
    """The side of the square image a SAM takes, and of its mask prompts."""
    model, kind = sam_kind(m)
    if kind == "segment_anything":
        return model.image_encoder.img_size, model.prompt_encoder.mask_input_size[0]
    prompts = model.config.prompt_encoder_config
    return model.config.vision_config.image_size, 4 * prompts.image_embedding_size


def decoder_sites(m: Any) -> tuple[str, ...]:
    """The sites of every tensor of a SAM's mask decoder, to train it in full.

    mm.attach(model, mm.Unlock(), at=segment.decoder_sites(model))
    """
    model, anatomy, _ = unwrap(m)
    spans = anatomy.roles(model)
    sites = [r for r, s in spans.items() if r.startswith("decoder.") and "weight" in s.ports]
    return tuple(f"{role}:weight" for role in sites)


def embed(m: Any, pixels: Tensor) -> Tensor:
    """Image embeddings (B, C, h, w) of normalised and padded pixels (B, 3, side, side)."""
    model, kind = sam_kind(m)
    if kind == "segment_anything":
        return model.image_encoder(pixels)
    return model.vision_encoder(pixels).last_hidden_state


def decode(
    m: Any,
    embeddings: Tensor,
    points: Tensor | None = None,
    labels: Tensor | None = None,
    boxes: Tensor | None = None,
    masks: Tensor | None = None,
    several: bool = False,
) -> tuple[Tensor, Tensor]:
    """Mask logits (B, K, s, s) and predicted overlaps (B, K), one object an image.

    Points (B, N, 2), labels (B, N), −1 for none, boxes (B, 4), in pixels of the square; masks
    (B, 1, s, s). K is 1, or 3 with `several`.
    """
    model, kind = sam_kind(m)
    if kind == "transformers":
        output = model(
            image_embeddings=embeddings,
            input_points=None if points is None else points[:, None],
            input_labels=None if labels is None else labels[:, None],
            input_boxes=None if boxes is None else boxes[:, None],
            input_masks=masks,
            multimask_output=several,
        )
        return output.pred_masks[:, 0], output.iou_scores[:, 0]
    logits, overlaps = [], []
    for place in range(len(embeddings)):  # its decoder takes the prompts of one image at a time
        own = slice(place, place + 1)
        sparse, dense = model.prompt_encoder(
            points=None if points is None or labels is None else (points[own], labels[own]),
            boxes=None if boxes is None else boxes[own],
            masks=None if masks is None else masks[own],
        )
        found, overlap = model.mask_decoder(
            image_embeddings=embeddings[own],
            image_pe=model.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=several,
        )
        logits.append(found)
        overlaps.append(overlap)
    return torch.cat(logits), torch.cat(overlaps)
