"""Tiny random backbones of the real libraries, each with a batch and a way to read its outputs.

Every `build` seeds its own draw, so two builds, in one process or in two, are bit-equal.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmadapt.core.anatomy import find_anatomy

WIDTH, LAYERS, HEADS, DIM = 16, 2, 2, 8
IMAGE, PATCH, VOCABULARY, CONTEXT = 16, 8, 32, 6
CLASSES = 5


@dataclass(frozen=True)
class Tiny:
    """One backbone: how to build it, what it takes (as keywords) and what it gives."""

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[int], dict[str, Tensor]]
    read: Callable[[Any], tuple[Tensor, ...]]

    def fresh(self) -> nn.Module:
        """An own copy, in eval mode and with every tensor requiring a gradient."""
        return copy.deepcopy(_prototype(self.name))

    def outputs(self, model: Any, batch: dict[str, Tensor] | None = None) -> tuple[Tensor, ...]:
        """The main output tensors, rows first."""
        return self.read(model(**(self.batch(3) if batch is None else batch)))

    @property
    def family(self) -> str:
        return find_anatomy(_prototype(self.name)).family


@functools.cache
def _prototype(name: str) -> nn.Module:
    return BACKBONES[name].build()


def _seeded(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    @functools.wraps(make)
    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            model = make()
            for parameter in model.parameters():  # biases and norms off their round starts
                if parameter.ndim < 2:
                    parameter.data.add_(0.05 * torch.randn(parameter.shape))
                else:  # the libraries' 0.02 would hide errors
                    scale = parameter[0].numel() ** -0.5
                    parameter.data.copy_(scale * torch.randn(parameter.shape))
        return model.eval()

    return build


def pixels(rows: int) -> Tensor:
    """Pixels (rows, 3, IMAGE, IMAGE)."""
    return torch.randn(rows, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(11))


def tokens(rows: int) -> Tensor:
    """Token ids (rows, CONTEXT); the largest id, which ends a text, stands last."""
    draw = torch.Generator().manual_seed(12)
    ids = torch.randint(1, VOCABULARY - 2, (rows, CONTEXT), generator=draw)
    ids[:, -1] = VOCABULARY - 1
    return ids


# -- open_clip --------------------------------------------------------------------------------

_OPEN_CLIP_VISION = {
    "layers": LAYERS,
    "width": WIDTH,
    "head_width": WIDTH // HEADS,
    "image_size": IMAGE,
    "patch_size": PATCH,
}
_OPEN_CLIP_TEXT = {
    "context_length": CONTEXT,
    "vocab_size": VOCABULARY,
    "width": WIDTH,
    "heads": HEADS,
    "layers": LAYERS,
}


@_seeded
def open_clip() -> nn.Module:
    from open_clip.model import CLIP

    return CLIP(DIM, dict(_OPEN_CLIP_VISION), dict(_OPEN_CLIP_TEXT), quick_gelu=True)


@_seeded
def open_clip_custom_text() -> nn.Module:
    from open_clip.model import CustomTextCLIP

    return CustomTextCLIP(DIM, dict(_OPEN_CLIP_VISION), dict(_OPEN_CLIP_TEXT))


@_seeded
def open_clip_vision() -> nn.Module:
    from open_clip.transformer import VisionTransformer

    return VisionTransformer(IMAGE, PATCH, WIDTH, LAYERS, HEADS, 4.0, output_dim=DIM)


# -- transformers -----------------------------------------------------------------------------

_HF_VISION = {
    "hidden_size": WIDTH,
    "intermediate_size": 4 * WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "image_size": IMAGE,
    "patch_size": PATCH,
}


def _hf_clip_config() -> Any:
    from transformers import CLIPConfig

    text = {
        **{
            key: value
            for key, value in _HF_VISION.items()
            if key not in ("image_size", "patch_size")
        },
        "vocab_size": VOCABULARY,
        "max_position_embeddings": CONTEXT,
        "eos_token_id": VOCABULARY - 1,
        "bos_token_id": 0,
        "pad_token_id": 0,
        "projection_dim": DIM,
    }
    vision = {**_HF_VISION, "projection_dim": DIM}
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=DIM)


@_seeded
def hf_clip() -> nn.Module:
    from transformers import CLIPModel

    return CLIPModel(_hf_clip_config())


@_seeded
def hf_clip_vision() -> nn.Module:
    from transformers import CLIPVisionModel

    return CLIPVisionModel(_hf_clip_config().vision_config)


@_seeded
def hf_clip_vision_projection() -> nn.Module:
    from transformers import CLIPVisionModelWithProjection

    return CLIPVisionModelWithProjection(_hf_clip_config().vision_config)


@_seeded
def hf_vit() -> nn.Module:
    from transformers import ViTConfig, ViTModel

    return ViTModel(ViTConfig(**_HF_VISION))


@_seeded
def hf_vit_classifier() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(**_HF_VISION, num_labels=CLASSES))


# -- a task's own model -------------------------------------------------------------------------


@_seeded
def zero_shot_classifier() -> nn.Module:
    from mmadapt.tasks.few_shot.classifier import CosineHead, ZeroShotClassifier

    head = CosineHead(torch.randn(CLASSES, DIM), scale=20.0, bias=0.1)
    return ZeroShotClassifier(None, head, tuple("abcde"))  # type: ignore[arg-type]


def embeddings(rows: int) -> Tensor:
    """Image embeddings (rows, DIM)."""
    return torch.randn(rows, DIM, generator=torch.Generator().manual_seed(13))


# -- the registry; an earlier one is more of a home ---------------------------------------------


def _pooled_and_tokens(output: Any) -> tuple[Tensor, ...]:
    return output.last_hidden_state, output.pooler_output


BACKBONES: dict[str, Tiny] = {
    tiny.name: tiny
    for tiny in (
        Tiny(
            "open_clip",
            open_clip,
            lambda rows: {"image": pixels(rows), "text": tokens(rows)},
            lambda output: output[:2],
        ),
        Tiny("hf_vit", hf_vit, lambda rows: {"pixel_values": pixels(rows)}, _pooled_and_tokens),
        Tiny(
            "hf_clip",
            hf_clip,
            lambda rows: {"pixel_values": pixels(rows), "input_ids": tokens(rows)},
            lambda output: (output.image_embeds, output.text_embeds),
        ),
        Tiny(
            "zero_shot_classifier",
            zero_shot_classifier,
            lambda rows: {"features": embeddings(rows)},
            lambda output: (output,),
        ),
        Tiny(
            "open_clip_custom_text",
            open_clip_custom_text,
            lambda rows: {"image": pixels(rows), "text": tokens(rows)},
            lambda output: output[:2],
        ),
        Tiny(
            "open_clip_vision",
            open_clip_vision,
            lambda rows: {"x": pixels(rows)},
            lambda output: (output,),
        ),
        Tiny(
            "hf_clip_vision",
            hf_clip_vision,
            lambda rows: {"pixel_values": pixels(rows)},
            _pooled_and_tokens,
        ),
        Tiny(
            "hf_clip_vision_projection",
            hf_clip_vision_projection,
            lambda rows: {"pixel_values": pixels(rows)},
            lambda output: (output.image_embeds, output.last_hidden_state),
        ),
        Tiny(
            "hf_vit_classifier",
            hf_vit_classifier,
            lambda rows: {"pixel_values": pixels(rows)},
            lambda output: (output.logits,),
        ),
    )
}
