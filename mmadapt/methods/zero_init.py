"""Zero-initialised attention.

Zhang et al. 2023, LLaMA-Adapter: Efficient Fine-tuning of Language Models with Zero-init Attention,
arXiv:2303.16199

    heads' = heads + g(gate)·softmax(q·(P·W_k)ᵀ·s)·(P·W_v),   gate zero at the start

q are the backbone's queries where they meet its keys, so after their rotation; P·W_k is not rotated;
the softmax is over the tokens P alone. heads' goes through the backbone's output projection. For
images P + V stands for P, V being their projected features (Gao et al. 2023, LLaMA-Adapter V2,
arXiv:2304.15010, lets V alone stand for it in the first layer).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmadapt.core.layer import Layer, empty, fill_normal, fill_uniform
from mmadapt.errors import AdapterError, CheckError
from mmadapt.ops.attention import attend, without_queries
from mmadapt.ops.reference import ACTIVATIONS, linear

if TYPE_CHECKING:
    from mmadapt.adapter import ZeroInitAttention
    from mmadapt.core.context import Context
    from mmadapt.core.site import Attention, SiteView


class VisualProjection(Layer):
    """What all sites share where features come in. Parameters: matrix (C, V), bias (C,)."""

    def __init__(
        self, adapter: ZeroInitAttention, sites: Sequence[SiteView], generator: torch.Generator
    ) -> None:
        super().__init__()
        assert adapter.features is not None
        width = _attention(sites[0]).width
        self.matrix, self.bias = empty(sites[0], width, adapter.features), empty(sites[0], width)
        fill_uniform(self.matrix, 1 / math.sqrt(adapter.features), generator)
        nn.init.zeros_(self.bias)


class ZeroInitAttentionLayer(Layer):
    """Parameters: prompt (K, C) unless the features are the tokens; gate (heads,) or (1,)."""

    taps = ("q",)
    why_not_merge = "its tokens are attended to anew for every query"

    def __init__(
        self, adapter: ZeroInitAttention, site: SiteView, generator: torch.Generator
    ) -> None:
        super().__init__()
        attention = _attention(site)
        absent = [head for head in adapter.heads or () if head >= attention.heads]
        if absent:
            raise AdapterError(
                f"{type(adapter).__name__}: heads names head {absent[0]}, and {site.name} has "
                f"{attention.heads} heads, 0 to {attention.heads - 1}"
            )
        self.heads, self.activation, self.visual = adapter.heads, adapter.activation, adapter.visual
        if self.visual != "none":
            self.facts = ("visual",)  # type: ignore[misc]
            self.features = adapter.features
            if not adapter.projected and adapter.features != attention.width:
                raise AdapterError(
                    f"{type(adapter).__name__}: features is {adapter.features}, and without a "
                    f"projection {site.name} needs {attention.width}",
                    "leave projected=True, or project them yourself",
                )
        if self.visual != "tokens":
            self.prompt = empty(site, adapter.length, attention.width)
            fill_normal(self.prompt, 1.0, generator)
        gates = 1 if adapter.gate == "layer" else len(adapter.heads or range(attention.heads))
        self.gate = empty(site, gates)
        nn.init.zeros_(self.gate)
        self._kept: tuple[tuple, tuple[Tensor, Tensor, Tensor | None]] | None = None

    def before(self, x: Tensor, context: Context, site: SiteView) -> Tensor:
        attention = _attention(site)
        q = context.read(site.taps["q"])
        return x + attend(q, *self._source(attention, x, context), attention.scale).to(x.dtype)

    def _source(
        self, attention: Attention, x: Tensor, context: Context
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """What queries meet; kept between calls while nothing behind it can change."""
        if self.visual != "none":
            return self._gated(attention, self._seen(x, context).to(x.dtype))
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or _adapted(attention):
            return self._gated(attention, self.prompt[None].to(x.dtype))
        behind = [self.prompt, self.gate, *attention.k.parameters(), *attention.v.parameters()]
        if attention.k_norm is not None:
            behind += attention.k_norm.parameters()
        # autocast computes them in its own dtype
        low = torch.is_autocast_enabled(x.device.type) and torch.get_autocast_dtype(x.device.type)
        key = (x.dtype, x.device, low, *((id(t), t._version, t.data_ptr()) for t in behind))
        if self._kept is None or self._kept[0] != key:
            self._kept = (key, self._gated(attention, self.prompt[None].to(x.dtype)))
        return self._kept[1]

    def _gated(self, attention: Attention, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values of tokens (B or 1, K, width), and the gate of every head."""
        gate = ACTIVATIONS[self.activation](self.gate)
        if self.heads is not None:
            places = torch.tensor(self.heads, device=gate.device)
            gate = gate.new_zeros(attention.heads).index_copy(0, places, gate)
        k, v = attention.keys_and_values(tokens)
        return without_queries(k, v, gate, attention.scale, attention.heads)

    def _seen(self, x: Tensor, context: Context) -> Tensor:
        """The tokens of every row (B, K, C), with the features that came with this forward pass."""
        features = context.get("visual")
        width = self.features
        if features is None:
            raise CheckError(
                "this adapter sees images, and the forward pass was given no features of any",
                "with mmadapt.context(model, visual=features): …, features being (B, "
                f"{width}) or (B, N, {width})",
            )
        if features.ndim not in (2, 3) or features.shape[-1] != width:
            raise CheckError(
                f"the visual features are {tuple(features.shape)}, expected (B, {width}) "
                f"or (B, N, {width})"
            )
        if x.shape[0] % features.shape[0]:
            raise CheckError(
                f"visual features of {features.shape[0]} rows cannot be shared among the "
                f"{x.shape[0]} rows of this batch",
                "give features for every row; beams and several answers to one row share theirs",
            )
        seen = features
        if self.shared is not None:
            seen = linear(features, self.shared.matrix, self.shared.bias)
        seen = seen[:, None] if seen.ndim == 2 else seen
        seen = seen.repeat_interleave(x.shape[0] // features.shape[0], dim=0)
        if self.visual == "tokens":
            return seen
        if seen.shape[1] not in (1, self.prompt.shape[0]):
            raise CheckError(
                f"{seen.shape[1]} visual features a row cannot be added to {self.prompt.shape[0]} "
                "tokens",
                "give one a row, or as many as there are tokens",
            )
        return self.prompt + seen

    def describe(self) -> dict[str, Any]:
        gate = ACTIVATIONS[self.activation](self.gate.detach().float()).abs()
        return {"gate": float(gate.mean()), "largest gate": float(gate.max())}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}


def _attention(site: SiteView) -> Attention:
    if site.attention is None:
        raise AdapterError(
            f"zero-initialised attention needs the backbone's own projections, and the anatomy says "
            f"of {site.name} nothing about them",
            "choose '*.layers[*].attn.heads', or give the Span its attention=",
        )
    return site.attention


def _adapted(attention: Attention) -> bool:
    """Whether hooks may change what the projections give without their parameters telling."""
    modules = (attention.k, attention.v, attention.k_norm)
    return any(m is not None and (m._forward_hooks or m._forward_pre_hooks) for m in modules)
