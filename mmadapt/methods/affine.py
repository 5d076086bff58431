"""Scales and shifts of a site's output.

Lian et al. 2022, Scaling & Shifting Your Features: A New Baseline for Efficient Model Tuning,
arXiv:2210.08823

    y' = γ ⊙ y + β,   behind a linear or norm: W' = γ ⊙ W, b' = γ ⊙ b + β

Fu et al. 2022, AdapterBias: Parameter-efficient Token-dependent Representation Shift for Adapters in
NLP Tasks, arXiv:2205.00305

    y' = y + (w·z + b)·v,   z: input of the MLP's second linear, v zero at the start

with (w, b) of its own at each layer, or one for all.

Gao et al. 2023, LLaMA-Adapter V2: Parameter-Efficient Visual Instruction Model, arXiv:2304.15010

    y' = s ⊙ (W·x + b), or as its authors released it W·(s ⊙ x) + b
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mmadapt.core.layer import Layer, empty, fill_normal, fill_uniform, require_aligned
from mmadapt.errors import AdapterError
from mmadapt.ops.reference import channel_axis, directed_shift, scale_shift

if TYPE_CHECKING:
    from mmadapt.adapter import AdapterBias, BiasScale, ScaleShift
    from mmadapt.core.context import Context
    from mmadapt.core.site import SiteView


class ScaleShiftLayer(Layer):
    """Parameters: scale (C,), shift (C,)."""

    additive = False

    def __init__(self, adapter: ScaleShift, site: SiteView, generator: torch.Generator) -> None:
        super().__init__()
        trailing = len(site.span.layout) - 2 if channel_axis(site.span.layout) == 1 else 0
        self.shape = (-1, *(1 for _ in range(trailing)))  # how γ lies along the channels of y
        self.scale, self.shift = empty(site, site.width), empty(site, site.width)
        nn.init.zeros_(self.scale)
        nn.init.zeros_(self.shift)
        if adapter.start == "published":
            fill_normal(self.scale, 0.02, generator)
            fill_normal(self.shift, 0.02, generator)
        with torch.no_grad():
            self.scale += 1

    def after(self, acc: Tensor, y: Tensor, x: Tensor, context: Context, site: SiteView) -> Tensor:
        return scale_shift(y, self.scale.view(self.shape), self.shift.view(self.shape))

    def fold(
        self, weight: Tensor, bias: Tensor | None, site: SiteView
    ) -> tuple[Tensor, Tensor | None] | None:
        rows = self.scale.view(-1, *(1 for _ in weight.shape[1:]))
        changed = (weight.to(rows.dtype) * rows).to(weight.dtype)
        if bias is None:
            return changed, self.shift.to(weight.dtype)
        return changed, scale_shift(bias, self.scale, self.shift)


class AdapterBiasGate(Layer):
    """What all sites share with `shared_gate`. Parameters: gate (I,), gate_bias ()."""

    def __init__(
        self, adapter: AdapterBias, sites: Sequence[SiteView], generator: torch.Generator
    ) -> None:
        super().__init__()
        widths = {site.width_in: site.name for site in sites}
        if len(widths) > 1:
            (one, here), (other, there), *_ = widths.items()
            raise AdapterError(
                f"AdapterBias cannot share one gate: {here} has {one} inputs and {there} has {other}",
                "choose sites of one width with at=, or shared_gate=False",
            )
        self.gate, self.gate_bias = _gate(sites[0], generator)


class AdapterBiasLayer(Layer):
    """Parameters: direction (O,); gate (I,), gate_bias () where they are not shared."""

    why_not_merge = "its shift depends on the token"

    def __init__(self, adapter: AdapterBias, site: SiteView, generator: torch.Generator) -> None:
        super().__init__()
        if site.span.layout == "BD" or channel_axis(site.span.layout) != -1:
            raise AdapterError(
                f"AdapterBias reads features along the last axis of the input, which {site.name} "
                "does not have",
                "choose a site such as '*.layers[*].mlp.down'",
            )
        require_aligned(site, "AdapterBias")
        if not adapter.shared_gate:
            self.gate, self.gate_bias = _gate(site, generator)
        self.direction = empty(site, site.width)
        nn.init.zeros_(self.direction)

    def after(self, acc: Tensor, y: Tensor, x: Tensor, context: Context, site: SiteView) -> Tensor:
        own = self if self.shared is None else self.shared
        return acc + directed_shift(x, own.gate, own.gate_bias, self.direction)


def _gate(site: SiteView, generator: torch.Generator) -> tuple[nn.Parameter, nn.Parameter]:
    """w (I,) and b (), drawn as torch's linear layers draw theirs."""
    gate, gate_bias = empty(site, site.width_in), empty(site)
    fill_uniform(gate, 1 / math.sqrt(site.width_in), generator)
    fill_uniform(gate_bias, 1 / math.sqrt(site.width_in), generator)
    return gate, gate_bias


class BiasScaleLayer(Layer):
    """Parameters: at `in` scale (C_in,); at `out` bias (C,), and scale (C,) where it acts there."""

    def __init__(self, adapter: BiasScale, site: SiteView, generator: torch.Generator) -> None:
        super().__init__()
        if not site.parameter or channel_axis(site.span.layout) != -1:
            raise AdapterError(
                f"BiasScale changes a linear, and {site.name} stands for none",
                "choose sites such as '*.layers[*].attn.q'",
            )
        scales = site.port == "in" or adapter.scale == "output"
        self.additive = not scales  # type: ignore[misc]
        if scales:
            self.scale = empty(site, site.width_in if site.port == "in" else site.width)
            nn.init.ones_(self.scale)
        if site.port == "out":
            self.bias = empty(site, site.width)
            nn.init.zeros_(self.bias)

    def before(self, x: Tensor, context: Context, site: SiteView) -> Tensor:
        return (x.to(self.scale.dtype) * self.scale).to(x.dtype)

    def after(self, acc: Tensor, y: Tensor, x: Tensor, context: Context, site: SiteView) -> Tensor:
        if self.additive:
            return acc + self.bias.to(acc.dtype)
        return ((y.to(self.scale.dtype) + self.bias) * self.scale).to(acc.dtype)

    def fold(
        self, weight: Tensor, bias: Tensor | None, site: SiteView
    ) -> tuple[Tensor, Tensor | None] | None:
        if site.port == "in":
            return (weight.to(self.scale.dtype) * self.scale).to(weight.dtype), bias
        moved = self.bias if bias is None else bias.to(self.bias.dtype) + self.bias
        if self.additive:
            return weight, moved.to(weight.dtype)
        changed = weight.to(self.scale.dtype) * self.scale[:, None]
        return changed.to(weight.dtype), (moved * self.scale).to(weight.dtype)
