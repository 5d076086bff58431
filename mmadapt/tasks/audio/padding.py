"""Padding kept out of the convolutions of a Wav2Vec2-Conformer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmadapt.core.backbone import unwrap_model
from mmadapt.errors import BackboneError

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle


def fix_conformer_padding(m: Any) -> PaddingFix:
    """Zero padded frames before the depth-wise convolutions of a Wav2Vec2-Conformer of transformers.

    Without it a clip's frames depend on how far it is padded, since nothing keeps padding out of those
    convolutions. This changes what the bare backbone computes for padded batches, so it is asked for,
    not done unasked: ask for it before training and again before an adapter that was trained with it
    is used. `PaddingFix.remove()` ends it; `with fix_conformer_padding(model):` ends it with the block.
    Wav2Vec2-BERT and Parakeet keep padding out themselves. A front end with a group norm still leaks.
    """
    model = unwrap_model(m)
    prefix = getattr(model, "base_model_prefix", "")
    encoder = getattr(getattr(model, prefix, model), "encoder", None)
    if getattr(getattr(model, "config", None), "model_type", "") != "wav2vec2-conformer":
        raise BackboneError(
            f"{type(model).__name__} is no Wav2Vec2-Conformer, whose convolutions alone need this",
            "Wav2Vec2-BERT and Parakeet are given an attention_mask and keep padding out themselves",
        )
    assert encoder is not None  # every class of the family has one
    for block in encoder.layers:
        hooks = block.self_attn._forward_pre_hooks.values()
        if any(isinstance(getattr(hook, "__self__", None), _Frames) for hook in hooks):
            raise BackboneError(
                f"padding is kept out of the convolutions of this {type(model).__name__} already",
                "call it once; remove() of what it returned ends it",
            )
    fix = PaddingFix()
    for block in encoder.layers:
        frames = _Frames()
        fix.handles += [
            block.self_attn.register_forward_pre_hook(frames.note, with_kwargs=True),
            block.conv_module.depthwise_conv.register_forward_pre_hook(frames.zero),
            block.conv_module.register_forward_hook(frames.forget, always_call=True),
        ]
    return fix


class PaddingFix:
    """What `fix_conformer_padding` installed."""

    def __init__(self) -> None:
        self.handles: list[RemovableHandle] = []

    def remove(self) -> None:
        """Give the backbone its own convolutions back."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def __enter__(self) -> PaddingFix:
        return self

    def __exit__(self, *error: Any) -> None:
        self.remove()


class _Frames:
    """Which frames are none of a clip's, as a block's attention is told before its convolution runs.

    Both run again where a block is recomputed, which hooks on the block itself do not.
    """

    def __init__(self) -> None:
        self.padding: Tensor | None = None

    def note(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        self.padding = None if mask is None else ~_valid(mask)

    def zero(self, module: Any, args: tuple) -> tuple | None:
        if self.padding is None:
            return None
        return (args[0].masked_fill(self.padding[:, None], 0.0),)

    def forget(self, module: Any, args: tuple, output: Any) -> None:
        self.padding = None

    def __getstate__(self) -> dict[str, Any]:
        return {"padding": None}


def _valid(mask: Any) -> Tensor:
    """Frames (B, T) that attention may read: bool or additive masks (B, 1, T, T), or masks (B, T)."""
    if not isinstance(mask, Tensor) or mask.ndim not in (2, 4):
        raise BackboneError(
            f"the blocks were given a {type(mask).__name__} as their mask, which does not say which "
            "frames are padding",
            'load the model with attn_implementation="sdpa" or "eager"',
        )
    seen = mask[:, 0, -1] if mask.ndim == 4 else mask
    if seen.is_floating_point() and mask.ndim == 4:
        return seen == 0
    return seen.to(torch.bool)
