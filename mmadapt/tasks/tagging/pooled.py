"""An encoder of sound with one vector a clip: the mean of its frames, padding left out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmadapt.core.backbone import unwrap_model
from mmadapt.errors import BackboneError


class MeanOverTime(nn.Module):
    """Hidden states (B, T, C) to (B, C): the mean over frames, those of `mask` (B, T) where given."""

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is None:
            return hidden.mean(1)
        kept = torch.where(mask.bool()[..., None], hidden, hidden.new_zeros(()))
        return kept.sum(1) / mask.sum(1, keepdim=True).clamp(min=1).to(hidden.dtype)


class PooledEncoder(nn.Module):
    """A bare AST, wav2vec 2.0, HuBERT, WavLM … of transformers that gives one vector a clip, (B, C).

    The frames of padding, as the `attention_mask` tells, are no part of the mean. Sites are those of
    the encoder, and `audio.pooled`, where a `Head` makes logits of it:

        speech = tagging.PooledEncoder(Wav2Vec2Model.from_pretrained(…))
        mm.attach(speech, [mm.Bottleneck.audio(), mm.Head(names=names, at="audio.pooled")])
    """

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        encoder = unwrap_model(encoder)
        if (
            not hasattr(encoder, "config")
            or hasattr(encoder, "classifier")
            or hasattr(encoder, "lm_head")
        ):
            raise BackboneError(
                f"expected a bare encoder of transformers, got {type(encoder).__name__}",
                "a classifier of transformers pools by itself; a Head takes its logits' place",
            )
        self.encoder = encoder
        self.pool = MeanOverTime()

    @property
    def config(self) -> Any:
        """The encoder's."""
        return self.encoder.config

    def forward(self, input_values: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        known = {} if attention_mask is None else {"attention_mask": attention_mask}
        hidden = self.encoder(input_values, **known).last_hidden_state
        return self.pool(hidden, self._frames(hidden, attention_mask))

    def _frames(self, hidden: Tensor, mask: Tensor | None) -> Tensor | None:
        """The mask over hidden states, of one over samples, or over tokens already."""
        if mask is None or mask.shape[1] == hidden.shape[1]:
            return mask
        return self.encoder._get_feature_vector_attention_mask(hidden.shape[1], mask)
