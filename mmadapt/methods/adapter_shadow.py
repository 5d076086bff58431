"""AdapterShadow.

Jie and Zhang 2023, AdapterShadow: Adapting Segment Anything Model for Shadow Detection,
arXiv:2311.08891

    y + s·(gelu(z·Dᵀ + b_d)·Uᵀ + b_u),   z = y behind attention (s = 1), x beside the MLP or the block

With branches, D and U have a block for each group of channels and nothing between groups; with a rank
each of the blocks is a product of two. U, or the second of its factors, and the biases start at zero.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmadapt.adapter import Bottleneck
from mmadapt.core.layer import Layer, empty, fill_uniform, require_aligned
from mmadapt.errors import AdapterError, SiteError
from mmadapt.methods.bottleneck import BottleneckLayer

if TYPE_CHECKING:
    from mmadapt.adapter import AdapterShadow
    from mmadapt.core.context import Context
    from mmadapt.core.site import SiteView


def layer_at(adapter: AdapterShadow, site: SiteView, generator: torch.Generator) -> Layer:
    """What AdapterShadow has at a site: it depends on the role."""
    if site.span.layout != "BHWC":
        raise SiteError(
            f"AdapterShadow reads a grid of image tokens (BHWC), and {site.name} gives "
            f"{site.span.layout}",
            "attach it to a SAM: transformers' SamModel, for example",
        )
    behind, beside = site.role.endswith(".attn"), site.role.endswith(".mlp")
    scale = adapter.scale if beside else 1.0
    if adapter.branches > 1 or adapter.rank is not None:
        return FactoredLayer(adapter, site, generator, not behind, scale)
    plain = Bottleneck(
        adapter.width_of(site.width),
        placement="sequential" if behind else "parallel",
        activation="gelu",
        scale=scale,
    )
    return BottleneckLayer(plain, site, generator)


class FactoredLayer(Layer):
    """Parameters, for G branches: down (G, H/G, C/G), down_bias (H,), up (G, C/G, H/G), up_bias (C,).

    With a rank R down_first (G, R, C/G) and down_second (G, H/G, R) stand for down, likewise for up.
    """

    why_not_merge = "an activation stands between its projections"
    down_bias: Tensor

    def __init__(
        self,
        adapter: AdapterShadow,
        site: SiteView,
        generator: torch.Generator,
        parallel: bool,
        scale: float,
    ) -> None:
        super().__init__()
        if parallel:
            require_aligned(site, "AdapterShadow")
        channels, branches = site.width, adapter.branches
        if channels % branches:
            raise AdapterError(
                f"AdapterShadow: {branches} branches do not divide the {channels} channels at "
                f"{site.name}",
                "choose a divisor",
            )
        self.parallel, self.scale = parallel, float(scale)
        width = adapter.width_of(channels)
        sizes = {"down": (channels, width), "up": (width, channels)}
        for word, (inputs, outputs) in sizes.items():
            inputs, outputs, rank = inputs // branches, outputs // branches, adapter.rank
            if rank is None:
                shapes = {word: (outputs, inputs)}
            else:
                shapes = {f"{word}_first": (rank, inputs), f"{word}_second": (outputs, rank)}
            for name, shape in shapes.items():
                self.register_parameter(name, empty(site, branches, *shape))
                fill_uniform(getattr(self, name), 1 / math.sqrt(shape[-1]), generator)
            bias = empty(site, branches * outputs)
            nn.init.zeros_(bias)
            self.register_parameter(f"{word}_bias", bias)
        nn.init.zeros_(getattr(self, "up" if adapter.rank is None else "up_second"))
        self.factors = ("",) if adapter.rank is None else ("_first", "_second")

    def after(self, acc: Tensor, y: Tensor, x: Tensor, context: Context, site: SiteView) -> Tensor:
        z = x if self.parallel else y
        z = z.to(self.down_bias.dtype)
        change = self.scale * self._project(F.gelu(self._project(z, "down")), "up")
        return acc + change.to(acc.dtype)

    def _project(self, z: Tensor, word: str) -> Tensor:
        """z (…, I), group by group, to (…, O)."""
        bias = getattr(self, f"{word}_bias")
        for factor in self.factors:
            matrix = getattr(self, word + factor)  # (G, O/G, I/G)
            groups = z.unflatten(-1, (len(matrix), -1))
            z = torch.einsum("...gi,goi->...go", groups, matrix).flatten(-2)
        return z + bias
