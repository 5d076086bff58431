"""Trained tokens in every block.

Jia et al. 2022, Visual Prompt Tuning, arXiv:2203.12119

    block(x) becomes the part of block([x, P]) that belongs to x

so each block sees its own tokens P, and those of the block before are dropped. They stand behind all
others, which a block without positions of its own cannot tell from the authors' place.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mmadapt.core.layer import Layer, empty, fill_uniform
from mmadapt.errors import AdapterError, CheckError

if TYPE_CHECKING:
    from mmadapt.adapter import DeepPrompts
    from mmadapt.core.context import Context
    from mmadapt.core.site import SiteView

_PATCH_VALUES = 3 * 16**2  # the authors' bound counts those of one image patch


class DeepPromptsLayer(Layer):
    """Parameters: prompt (K, C)."""

    additive = False  # who stands in for a call adds nothing to it
    why_not_merge = "its tokens are attended to"

    def __init__(self, adapter: DeepPrompts, site: SiteView, generator: torch.Generator) -> None:
        super().__init__()
        if not site.span.more_tokens:
            raise AdapterError(
                f"DeepPrompts adds tokens to a block, and {site.name} cannot be given more: positions "
                "are part of its attention, or the anatomy does not say that they are not",
                "choose whole blocks of AST or wav2vec 2.0, 'audio.layers[*]', or mmadapt.Bottleneck",
            )
        self.prompt = empty(site, adapter.length, site.width)
        fill_uniform(self.prompt, math.sqrt(6 / (_PATCH_VALUES + site.width)), generator)

    def around(
        self,
        call: Callable[..., Any],
        args: tuple,
        kwargs: dict[str, Any],
        context: Context,
        site: SiteView,
    ) -> Any:
        position, _, keyword = site.span.x.partition("|")
        by_place = len(args) > int(position)
        x = args[int(position)] if by_place else kwargs[keyword]
        tokens, added = x.shape[1], self.prompt.shape[0]
        wider = torch.cat([x, self.prompt.to(x.dtype).expand(len(x), -1, -1)], 1)
        places = [_widened(value, tokens, added, site) for value in args]
        words = {word: _widened(value, tokens, added, site) for word, value in kwargs.items()}
        if by_place:
            places[int(position)] = wider
        else:
            words[keyword] = wider
        output = call(*places, **words)
        if isinstance(output, Tensor):
            return output[:, :tokens]
        y: Any = site.span.y
        return (*output[:y], output[y][:, :tokens], *output[y + 1 :])


def _widened(value: Any, tokens: int, added: int, site: SiteView) -> Any:
    """An attention mask (B, 1, T, T), or (B, T), that lets every token see those that are added."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if not isinstance(value, Tensor):
        raise CheckError(
            f"{site.name} was called with a {type(value).__name__}, and DeepPrompts cannot tell whether "
            "it speaks of tokens",
            'use attn_implementation="sdpa"',
        )
    if value.shape[-1] != tokens or value.ndim not in (2, 4):
        return value
    open_ = 0.0 if value.is_floating_point() else 1
    wider = F.pad(value, (0, added), value=open_)
    if value.ndim == 2:
        return wider
    return torch.cat([wider, wider[..., :1, :].expand(-1, -1, added, -1)], -2)
