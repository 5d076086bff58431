"""The two halves of a SAM or SAM 2, in transformers and in segment_anything, with gradients where wanted."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mmadapt.core.backbone import unwrap, unwrap_model
from mmadapt.core.bank import bank_of
from mmadapt.core.given import asked_facts, context
from mmadapt.errors import BackboneError

_KINDS = {
    "transformers.models.sam.modeling_sam.SamModel": "transformers",
    "transformers.models.sam2.modeling_sam2.Sam2Model": "sam2",
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
        "transformers' SamModel or Sam2Model, or segment_anything's Sam",
    )


def sides(m: Any) -> tuple[int, int]:
    """The side of the square image a SAM takes, and of its mask prompts."""
    model, kind = sam_kind(m)
    if kind == "segment_anything":
        return model.image_encoder.img_size, model.prompt_encoder.mask_input_size[0]
    if kind == "sam2":
        return model.prompt_encoder.input_image_size, model.prompt_encoder.mask_input_size[0]
    prompts = model.config.prompt_encoder_config
    return model.config.vision_config.image_size, 4 * prompts.image_embedding_size


def stretches(m: Any) -> bool:
    """Whether images are stretched to the square a SAM takes, as SAM 2's are, instead of padded."""
    return sam_kind(m)[1] == "sam2"


def decoder_sites(m: Any) -> tuple[str, ...]:
    """The sites of every tensor of a SAM's mask decoder, to train it in full.

    mm.attach(model, mm.Unlock(), at=segment.decoder_sites(model))
    """
    model, anatomy, _ = unwrap(m)
    spans = anatomy.roles(model)
    sites = [r for r, s in spans.items() if r.startswith("decoder.") and "weight" in s.ports]
    return tuple(f"{role}:weight" for role in sites)


def embed(m: Any, pixels: Tensor, depth: int | None = None) -> Tensor:
    """Image embeddings (B, C, h, w) of normalised pixels (B, 3, side, side).

    Those of SAM 2 hold its finer grids too, whose pixels under one of the coarsest are channels there.
    `depth` is how many rows in a row are the slices of one volume; attached layers that ask for it
    are told, and without it that each row is an image of its own, unless `mm.context` says otherwise.
    """
    model, kind = sam_kind(m)
    with _told(model, depth):
        if kind == "sam2":
            return _packed(model, pixels)
        if kind == "segment_anything":
            return model.image_encoder(pixels)
        return model.vision_encoder(pixels).last_hidden_state


def looks_along_depth(m: Any) -> bool:
    """Whether a layer that acts asks how many slices a volume has."""
    bank = bank_of(unwrap_model(m))
    if bank is None or not bank.acting:
        return False
    return any(
        "depth" in layer.facts for name in bank.active.names for _, layer in bank.layers_of(name)
    )


def _told(model: Any, depth: int | None) -> contextlib.AbstractContextManager[Any]:
    bank = bank_of(model)
    if bank is None or (depth is None and "depth" in bank.forwards.given):
        return contextlib.nullcontext()
    if "depth" not in asked_facts(bank):
        return contextlib.nullcontext()
    return context(model, depth=depth or 1)


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
    (B, 1, s, s). K is 1, or 3 with `several`. Where SAM 2's configuration says so (its
    `dynamic_multimask_via_stability`), one of three stands in for a single mask that is not stable.
    """
    model, kind = sam_kind(m)
    if kind != "segment_anything":
        output = model(
            image_embeddings=_unpacked(model, embeddings) if kind == "sam2" else embeddings,
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


def _packed(model: Any, pixels: Tensor) -> Tensor:
    """SAM 2's embeddings on every grid in one tensor, the finest first among the channels."""
    # its get_image_embeddings has no gradients
    flat = list(model.get_image_features(pixels, return_dict=True).fpn_hidden_states)
    flat[-1] = flat[-1] + model.no_memory_embedding
    sizes = model.backbone_feature_sizes
    maps = [one.permute(1, 2, 0).unflatten(2, size) for one, size in zip(flat, sizes, strict=True)]
    coarsest = maps[-1].shape[-1]
    return torch.cat([F.pixel_unshuffle(one, one.shape[-1] // coarsest) for one in maps], 1)


def _unpacked(model: Any, embeddings: Tensor) -> list[Tensor]:
    """The embeddings on each grid, as SAM 2 takes them."""
    factors = [size[-1] // embeddings.shape[-1] for size in model.backbone_feature_sizes]
    decoder = model.mask_decoder
    channels = [conv.weight.shape[0] for conv in (decoder.conv_s0, decoder.conv_s1)]
    sizes = [count * factor**2 for count, factor in zip(channels, factors[:-1], strict=True)]
    parts = embeddings.split([*sizes, embeddings.shape[1] - sum(sizes)], 1)
    return [F.pixel_shuffle(one, factor) for one, factor in zip(parts, factors, strict=True)]
