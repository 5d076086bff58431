"""A bottleneck that convolves along the depth of a stack of slices.

Chen et al. 2023, MA-SAM: Modality-agnostic SAM Adaptation for 3D Medical Image Segmentation,
arXiv:2309.08842

    x + gelu(conv(norm(x)·Dᵀ))·Uᵀ

conv takes adjacent slices at one position, its zeros standing before the first slice of a volume and
behind the last. U starts at zero; D and the kernel are drawn as torch draws theirs. The second place is
the stream between attention and MLP: x there is r + a, the residual and what the attention gives.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn import functional as F

from mmadapt.core.layer import Layer, empty, fill_uniform, require_aligned
from mmadapt.errors import AdapterError, CheckError, SiteError
from mmadapt.ops.reference import channel_axis, layer_norm, linear
from mmadapt.ops.volume import from_windows, through_depth, windows

if TYPE_CHECKING:
    import torch

    from mmadapt.adapter import ConvDepth
    from mmadapt.core.context import Context
    from mmadapt.core.site import SiteView


def layer_at(adapter: ConvDepth, site: SiteView, generator: torch.Generator) -> Layer:
    """What MA-SAM has at a site: behind an attention the second of its adapters, where it is wanted."""
    if adapter.second and site.role.endswith(".attn"):
        return BetweenLayer(adapter, site, generator)
    return ConvDepthLayer(adapter, site, generator)


class ConvDepthLayer(Layer):
    """Parameters: down (H, C), kernel (H, H, taps), kernel_bias (H,), up (C, H).

    With the norm also norm_weight and norm_bias (C,).
    """

    facts = ("depth",)
    why_not_merge = "an activation stands between its projections"

    def __init__(self, adapter: ConvDepth, site: SiteView, generator: torch.Generator) -> None:
        super().__init__()
        self._check(site)
        channels = site.width_in if site.port == "in" else site.width
        width, taps = adapter.width, adapter.kernel
        self.axis = channel_axis(site.span.layout)
        if adapter.norm:
            self.norm_weight, self.norm_bias = empty(site, channels), empty(site, channels)
            nn.init.ones_(self.norm_weight)
            nn.init.zeros_(self.norm_bias)
        self.norm = adapter.norm
        self.down = empty(site, width, channels)
        self.kernel, self.kernel_bias = empty(site, width, width, taps), empty(site, width)
        self.up = empty(site, channels, width)
        fill_uniform(self.down, 1 / math.sqrt(channels), generator)
        fill_uniform(self.kernel, 1 / math.sqrt(taps * width), generator)
        nn.init.zeros_(self.kernel_bias)
        nn.init.zeros_(self.up)

    def _check(self, site: SiteView) -> None:
        if site.span.rows != "one" or site.span.layout in ("BD", "BK"):
            raise AdapterError(
                f"ConvDepth needs one row for every slice, and {site.name} has "
                + ("windows or prompts" if site.span.rows != "one" else "no positions"),
                "choose a site such as 'vision.layers[*]' or 'vision.layers[*].mlp'",
            )

    def before(self, x: Tensor, context: Context, site: SiteView) -> Tensor:
        return x + self._change(x, slices(context, x.shape[0], site))

    def after(self, acc: Tensor, y: Tensor, x: Tensor, context: Context, site: SiteView) -> Tensor:
        return acc + self._change(y, slices(context, y.shape[0], site))

    def _change(self, z: Tensor, depth: int) -> Tensor:
        last = z if self.axis == -1 else z.movedim(self.axis, -1)
        normed = layer_norm(last, self.norm_weight, self.norm_bias) if self.norm else last
        hidden = linear(normed.reshape(len(z), -1, last.shape[-1]), self.down, None)
        hidden = through_depth(hidden, self.kernel.to(hidden.dtype), self._bias(hidden), depth)
        change = linear(F.gelu(hidden), self.up, None).view(last.shape).to(z.dtype)
        return change if self.axis == -1 else change.movedim(-1, self.axis)

    def _bias(self, hidden: Tensor) -> Tensor:
        return self.kernel_bias.to(hidden.dtype)


class BetweenLayer(ConvDepthLayer):
    """The same on the residual stream behind an attention, whose output may be windows of the grid."""

    taps = ("residual",)

    def _check(self, site: SiteView) -> None:
        if site.span.layout != "BHWC" or not site.role.startswith("vision."):
            raise SiteError(
                f"ConvDepth(second=True) reads a grid of image tokens (BHWC), and {site.name} gives "
                f"{site.span.layout}",
                "attach it to a SAM, or leave second out",
            )
        require_aligned(site, "ConvDepth(second=True)")

    def after(self, acc: Tensor, y: Tensor, x: Tensor, context: Context, site: SiteView) -> Tensor:
        residual = context.read(site.taps["residual"])  # the whole grid, (B·D, H, W, C)
        stream = residual + from_windows(y, *residual.shape[1:3])
        change = self._change(stream, slices(context, residual.shape[0], site))
        return acc + windows(change, *y.shape[1:3])


def slices(context: Context, rows: int, site: SiteView) -> int:
    """How many slices a volume has in this forward pass, whose batch has so many rows."""
    depth = context.get("depth")
    if depth is None:
        raise CheckError(
            f"the layer at {site.name} was not told how many slices a volume has",
            "with mmadapt.context(model, depth=slices): model(batch), or depth=1 for single images",
        )
    if not isinstance(depth, int) or isinstance(depth, bool) or depth < 1 or rows % depth:
        raise CheckError(
            f"depth is {depth!r} at {site.name}, and the batch has {rows} rows",
            "depth is a whole number of slices that divides the rows: volumes · depth rows",
        )
    return depth
