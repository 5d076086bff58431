"""Convpass.

Jie and Deng 2022, Convolutional Bypasses Are Better Vision Transformer Adapters, arXiv:2207.07039

    y + s·(g(conv(g(x·Dᵀ + b_d)))·Uᵀ + b_u),   g(z) = z·σ(1.702 z)

conv is 3 × 3 with zeros around, over the patches as an image; each token before them (class token,
registers) is an image of its own.
U and the biases start at zero, D is Xavier's, and the kernel is the identity or Xavier's.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmadapt.core.layer import Layer, empty, fill_uniform, require_aligned
from mmadapt.core.site import NO_GRID
from mmadapt.errors import AdapterError
from mmadapt.ops.reference import quick_gelu

if TYPE_CHECKING:
    from mmadapt.adapter import Convpass
    from mmadapt.core.context import Context
    from mmadapt.core.site import SiteView


class ConvpassLayer(Layer):
    """Parameters: down (H, C_in), down_bias (H,), kernel (H, H, 3, 3), kernel_bias (H,), up (C, H),
    up_bias (C,).
    """

    why_not_merge = "activations stand between its projections"

    def __init__(self, adapter: Convpass, site: SiteView, generator: torch.Generator) -> None:
        super().__init__()
        if site.span.layout not in ("BTC", "BHWC", "BCHW") or site.span.prefix == NO_GRID:
            raise AdapterError(
                f"Convpass convolves over image patches, and {site.name} has none",
                "choose a site such as 'vision.layers[*].mlp'",
            )
        require_aligned(site, "Convpass")
        self.layout = site.span.layout
        self.grid = adapter.grid
        self.scale = float(adapter.scale)
        self.dropout = float(adapter.dropout)
        width = adapter.width
        self.down, self.down_bias = empty(site, width, site.width_in), empty(site, width)
        self.kernel, self.kernel_bias = empty(site, width, width, 3, 3), empty(site, width)
        self.up, self.up_bias = empty(site, site.width, width), empty(site, site.width)
        fill_uniform(self.down, math.sqrt(6 / (site.width_in + width)), generator)
        nn.init.zeros_(self.kernel)
        if adapter.kernel == "xavier":
            fill_uniform(self.kernel, math.sqrt(6 / (2 * 9 * width)), generator)
        else:
            with torch.no_grad():
                self.kernel[:, :, 1, 1].fill_diagonal_(1.0)
        for parameter in (self.down_bias, self.kernel_bias, self.up, self.up_bias):
            nn.init.zeros_(parameter)

    def after(self, acc: Tensor, y: Tensor, x: Tensor, context: Context, site: SiteView) -> Tensor:
        if self.layout == "BCHW":
            x = x.movedim(1, -1)
        if x.dtype != self.down.dtype and not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.down.dtype)
        hidden = quick_gelu(F.linear(x, self.down, self.down_bias))
        hidden = quick_gelu(self._convolve(hidden, site))
        if self.dropout and self.training:
            hidden = F.dropout(hidden, self.dropout)
        delta = self.scale * F.linear(hidden, self.up, self.up_bias)
        if self.layout == "BCHW":
            delta = delta.movedim(-1, 1)
        return acc + (delta if delta.dtype == acc.dtype else delta.to(acc.dtype))

    def _convolve(self, z: Tensor, site: SiteView) -> Tensor:
        """The convolution over the patches of z (B, T, H) or (B, rows, columns, H)."""
        if z.ndim == 4:
            return self._over_image(z)
        first, rows, columns = patch_grid(z.shape[1], site.span.prefix, self.grid, site.name)
        patches = self._over_image(z[:, first:].unflatten(1, (rows, columns))).flatten(1, 2)
        if not first:
            return patches
        # of an image of one pixel, only the middle of the kernel sees anything
        alone = F.linear(z[:, :first], self.kernel[:, :, 1, 1], self.kernel_bias)
        return torch.cat([alone, patches], 1)

    def _over_image(self, image: Tensor) -> Tensor:
        maps = F.conv2d(image.movedim(-1, 1), self.kernel, self.kernel_bias, padding=1)
        return maps.movedim(1, -1)


def patch_grid(
    tokens: int, prefix: int | None, grid: tuple[int, int] | None, where: str
) -> tuple[int, int, int]:
    """How many of the tokens stand before the patches, and the patches' rows and columns.

    `prefix` is what the anatomy knows of the first number. Without it a square is looked for behind
    one class token or none; a `grid` decides, and has to fit what is known.
    """
    if grid is not None:
        first = tokens - grid[0] * grid[1]
        if first < 0 or (prefix is not None and first != prefix):
            before = f" behind {prefix} others" if prefix else ""
            raise AdapterError(
                f"Convpass: a grid of {grid[0]} × {grid[1]} does not fit the {tokens} tokens at "
                f"{where}{before}"
            )
        return first, *grid
    for first in (1, 0) if prefix is None else (prefix,):
        side = math.isqrt(max(tokens - first, 0))
        if side and side * side == tokens - first:
            return first, side, side
    before = "with or without a class token" if prefix is None else f"behind {prefix} others"
    raise AdapterError(
        f"Convpass: {tokens} tokens at {where} are no square of patches, {before}",
        "pass grid=(rows, columns), as images that are not square need it",
    )
