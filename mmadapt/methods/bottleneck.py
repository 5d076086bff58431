"""Bottleneck adapters.

Houlsby et al. 2019, Parameter-Efficient Transfer Learning for NLP, arXiv:1902.00751
Pfeiffer et al. 2021, AdapterFusion, arXiv:2005.00247
He et al. 2022, Towards a Unified View of Parameter-Efficient Transfer Learning, arXiv:2110.04366
Chen et al. 2022, AdaptFormer, arXiv:2205.13535
Steitz and Roth 2024, Adapters Strike Back (Adapter+), arXiv:2406.06820

    y + s·(act(z·Dᵀ + b_d)·Uᵀ + b_u),   z = y (sequential), x (parallel), the residual stream r,
                                        or r + y, what the branch makes of it (joined)
    x + s·(act(x·Dᵀ + b_d)·Uᵀ + b_u)    at the `in` port, before a branch

with a LayerNorm on z, on the change or on both, and s a number, a trained number or one a channel. While
training, a row's whole change is dropped with a probability (stochastic depth, Adapter+). U and
both biases start at zero, so that the layer starts as the identity; D is drawn as torch's linear
layers draw it. The start "houlsby" draws D and U from N(0, 0.01²) within two deviations.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmadapt.core.layer import Layer, empty, fill_normal, fill_uniform, require_aligned
from mmadapt.errors import AdapterError
from mmadapt.ops.bottleneck import bottleneck, fuses, mixed_known
from mmadapt.ops.reference import (
    ACTIVATIONS,
    add_by_row,
    by_row,
    channel_axis,
    drop_rows,
    layer_norm,
)

if TYPE_CHECKING:
    from mmadapt.adapter import Bottleneck
    from mmadapt.core.context import Context
    from mmadapt.core.site import SiteView


class BottleneckLayer(Layer):
    """Parameters: down (H, C_in), down_bias (H,), up (C, H), up_bias (C,).

    With a trained scale also scale () or (C,), with a norm norm_weight and norm_bias, with both those of
    the one before, and after_weight and after_bias.
    """

    why_not_merge = "an activation stands between its two projections"

    def __init__(self, adapter: Bottleneck, site: SiteView, generator: torch.Generator) -> None:
        super().__init__()
        self.parallel = adapter.placement == "parallel"
        self.joined = adapter.placement == "joined"
        if adapter.placement in ("residual", "joined"):
            self.taps = ("residual",)  # type: ignore[misc]
        if self.parallel and site.span.layout == "BD":
            raise AdapterError(
                f"a parallel Bottleneck reads the input of {site.name}, which is not made of features",
                'use placement="sequential" there',
            )
        entering = site.port == "in"
        if entering and adapter.placement != "sequential":
            raise AdapterError(
                f"a Bottleneck before {site.name.rpartition(':')[0]} reads and changes its input, and "
                f"placement is {adapter.placement!r}",
                'use placement="sequential" there, or the `out` port',
            )
        if self.parallel:
            require_aligned(site, "a parallel Bottleneck")
        self.activation = adapter.activation
        self.dropout = float(adapter.dropout)
        self.drop_path = float(adapter.drop_path)
        self.norm = adapter.norm
        self.axis = channel_axis(site.span.layout)
        channels = site.width_in if self.parallel or entering else site.width
        outputs = site.width_in if entering else site.width
        width = adapter.width_of(channels)
        self.down = empty(site, width, channels)
        self.down_bias = empty(site, width)
        self.up = empty(site, outputs, width)
        self.up_bias = empty(site, outputs)
        nn.init.zeros_(self.down_bias)
        nn.init.zeros_(self.up_bias)
        if adapter.start == "houlsby":
            fill_normal(self.down, 0.01, generator, within=2.0)
            fill_normal(self.up, 0.01, generator, within=2.0)
        else:
            fill_uniform(self.down, 1 / math.sqrt(channels), generator)
            nn.init.zeros_(self.up)
        self.scale: Tensor | float = float(adapter.scale)
        if adapter.scale_kind != "fixed":
            del self.scale
            self.scale = empty(site, *(() if adapter.scale_kind == "learned" else (outputs,)))
            nn.init.constant_(self.scale, adapter.scale)
        if self.norm != "none":
            normed = outputs if self.norm == "after" else channels
            self.norm_weight, self.norm_bias = _fresh_norm(site, normed)
        if self.norm == "both":
            self.after_weight, self.after_bias = _fresh_norm(site, outputs)

    def before(self, x: Tensor, context: Context, site: SiteView) -> Tensor:
        return self._added(x, x)

    def after(self, acc: Tensor, y: Tensor, x: Tensor, context: Context, site: SiteView) -> Tensor:
        if self.taps:
            residual = context.read(site.taps["residual"])
            return self._added(acc, residual + y if self.joined else residual)
        return self._added(acc, x if self.parallel else y)

    def _added(self, acc: Tensor, z: Tensor) -> Tensor:
        """acc plus the change that is read from z."""
        if self.axis != -1:
            z = z.movedim(self.axis, -1)
        dropping = self.drop_path and self.training
        whole = self.axis == -1 and not self.norm_after and not dropping
        delta = bottleneck(
            acc if whole else None,
            z,
            self.down,
            self.down_bias,
            self.up,
            self.up_bias,
            self.activation,
            self.scale,
            self.dropout if self.training else 0.0,
            (self.norm_weight, self.norm_bias) if self.norm in ("before", "both") else None,
        )
        if whole:
            return delta
        if self.norm == "after":
            delta = layer_norm(delta, self.norm_weight, self.norm_bias)
        if self.norm == "both":
            delta = layer_norm(delta, self.after_weight, self.after_bias)
        if self.axis != -1:
            delta = delta.movedim(-1, self.axis)
        if dropping:
            delta = drop_rows(delta, self.drop_path)
        return acc + (delta if delta.dtype == acc.dtype else delta.to(acc.dtype))

    @property
    def norm_after(self) -> bool:
        """Whether the change itself is normed."""
        return self.norm in ("after", "both")

    @property
    def rowwise(self) -> bool:
        """Rows may choose where channels are the last axis, no change is normed and no tap is read."""
        return self.axis == -1 and not self.norm_after and not self.taps

    def fuses_rows(self, y: Tensor, x: Tensor) -> bool:
        if self.training and (self.dropout or self.drop_path):
            return False
        z, normed = x if self.parallel else y, self.norm == "before"
        return fuses(z, self.down, self.up, self.activation, normed)

    def after_stacked(
        self, tensors: dict[str, Tensor], ids: Tensor, acc: Tensor, y: Tensor, x: Tensor
    ) -> Tensor:
        t = tensors
        scale = t["scale"] if isinstance(self.scale, Tensor) else self.scale
        z = x if self.parallel else y
        weights = (t["down"], t["down_bias"], t["up"], t["up_bias"])
        norm = (t["norm_weight"], t["norm_bias"]) if self.norm == "before" else None
        return mixed_known(acc, z, ids, *weights, self.activation, scale, norm)

    def row_operands(self, tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
        t = tensors
        up, up_bias = t["up"].mT, t["up_bias"].unsqueeze(1)
        if isinstance(self.scale, Tensor):
            scale = t["scale"].view(len(up), 1, -1)
            up, up_bias = up * scale, up_bias * scale
        elif self.scale != 1.0:
            up, up_bias = up * self.scale, up_bias * self.scale
        norm = (
            (t["norm_weight"].unsqueeze(1), t["norm_bias"].unsqueeze(1))
            if self.norm != "none"
            else ()
        )
        return t["down"].mT, t["down_bias"].unsqueeze(1), up, up_bias, *norm

    def after_rows(self, operands: Any, acc: Tensor, y: Tensor, x: Tensor) -> Tensor:
        down, down_bias, up, up_bias, *norm = operands
        z = by_row(x if self.parallel else y, down.dtype)
        if norm:
            z = F.layer_norm(z, z.shape[-1:]) * norm[0] + norm[1]
        hidden = ACTIVATIONS[self.activation](torch.baddbmm(down_bias, z, down))
        if self.dropout and self.training:
            hidden = F.dropout(hidden, self.dropout)
        delta = torch.baddbmm(up_bias, hidden, up)
        if self.drop_path and self.training:
            delta = drop_rows(delta, self.drop_path)
        return add_by_row(acc, delta)

    def describe(self) -> dict[str, Any]:
        if not isinstance(self.scale, Tensor):
            return {}
        return {"scale": float(self.scale.detach().float().mean())}


def _fresh_norm(site: SiteView, channels: int) -> tuple[nn.Parameter, nn.Parameter]:
    weight, bias = empty(site, channels), empty(site, channels)
    nn.init.ones_(weight)
    nn.init.zeros_(bias)
    return weight, bias
