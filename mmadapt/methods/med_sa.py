"""Med-SA.

Wu et al. 2023, Medical SAM Adapter: Adapting Segment Anything Model for Medical Image Segmentation,
arXiv:2304.12620

    A(z) = act(z·Dᵀ + b_d)·Uᵀ + b_u
    block:  n = norm1(x),  a = attn(n),  x' = x + a + A_space(a) + A_depth(attn(n over depth))
            x'' = x' + mlp(norm2(x')) + s·A_mlp(norm2(x'))

Attention over depth is the block's own, on the D tokens that stand at one position of the D slices
of a volume. In the mask decoder (paper) a prompt p makes the matrices inside one bottleneck:

    e = z·Dᵀ + b_d,   e ← relu(norm(e·W_k)) with W_k = G_k·(R·p + r) + g_k,   z + e·Uᵀ + b_u

U and b_u start at zero, so that the layers start as the identity; everything else is drawn as torch's
linear layers draw it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmadapt.adapter import Bottleneck, Unlock
from mmadapt.core.layer import Layer, empty, fill_uniform
from mmadapt.errors import CheckError, SiteError
from mmadapt.methods.bottleneck import BottleneckLayer
from mmadapt.methods.conv_depth import slices
from mmadapt.methods.unlock import UnlockLayer
from mmadapt.ops.bottleneck import bottleneck
from mmadapt.ops.reference import linear
from mmadapt.ops.volume import depth_grid, to_columns, to_slices, windows

if TYPE_CHECKING:
    from mmadapt.adapter import MedSA
    from mmadapt.core.context import Context
    from mmadapt.core.site import SiteView


def layer_at(adapter: MedSA, site: SiteView, generator: torch.Generator) -> Layer:
    """What Med-SA has at a site: it depends on the role."""
    tower, word = site.role.partition(".")[0], site.role.rpartition(".")[2]
    if adapter.relative_positions == "zero" and word in ("rel_h", "rel_w"):
        return WithoutLayer()
    if site.port == "weight":
        return UnlockLayer(Unlock(), site, generator)
    if tower == "vision" and site.span.layout != "BHWC":
        raise SiteError(
            f"MedSA reads a grid of image tokens (BHWC), and {site.name} gives {site.span.layout}",
            "attach it to a SAM: transformers' SamModel, for example",
        )
    if word == "token_to_image":
        layer: Layer = HyperPromptLayer(adapter, site, generator)
    elif word == "attn" and tower == "vision" and adapter.depth and site.span.aligned:
        layer = SpaceDepthLayer(adapter, site, generator)
    else:
        beside = word == "mlp"
        layer = BottleneckLayer(
            Bottleneck(
                adapter.width_of(site.width),
                placement="parallel" if beside else "sequential",
                activation=adapter.activation or "relu",
                scale=adapter.scale if beside else 1.0,
            ),
            site,
            generator,
        )
    if adapter.start == "published":
        _draw(layer, generator)
    return layer


def _draw(layer: Layer, generator: torch.Generator) -> None:
    """Every projection and its bias as torch's linear layers draw them, from U(−1/√inputs, 1/√inputs)."""
    tensors = dict(layer.named_parameters())
    for name, tensor in tensors.items():
        if not name.endswith("_bias") and f"{name}_bias" in tensors:
            bound = 1 / math.sqrt(tensor.shape[-1])
            fill_uniform(tensor, bound, generator)
            fill_uniform(tensors[f"{name}_bias"], bound, generator)


class WithoutLayer(Layer):
    """Zeros in place of a tensor of the backbone. No parameters."""

    additive = False
    why_not_merge = "a checkpoint would lose the backbone's own tensor"

    def weight(self, weight: Tensor, context: Context, site: SiteView) -> Tensor:
        return torch.zeros_like(weight)


class SpaceDepthLayer(Layer):
    """Both branches behind one attention of the encoder.

    Parameters, for space and for depth: down (H, C), down_bias (H,), up (C, H), up_bias (C,).
    """

    taps = ("norm1",)
    facts = ("depth",)
    why_not_merge = "activations stand between its projections"

    def __init__(self, adapter: MedSA, site: SiteView, generator: torch.Generator) -> None:
        super().__init__()
        self.activation = adapter.activation or "relu"
        self.line = adapter.depth_layout == "line"
        width = adapter.width_of(site.width)
        for branch in ("space", "depth"):
            down, down_bias = empty(site, width, site.width), empty(site, width)
            up, up_bias = empty(site, site.width, width), empty(site, site.width)
            fill_uniform(down, 1 / math.sqrt(site.width), generator)
            for tensor in (down_bias, up, up_bias):
                nn.init.zeros_(tensor)
            named = {"down": down, "down_bias": down_bias, "up": up, "up_bias": up_bias}
            for name, tensor in named.items():
                self.register_parameter(f"{branch}_{name}", tensor)

    def after(self, acc: Tensor, y: Tensor, x: Tensor, context: Context, site: SiteView) -> Tensor:
        normed = context.read(site.taps["norm1"])  # the whole grid, where x may be its windows
        depth = slices(context, normed.shape[0], site)
        acc = self._bottleneck(acc, y, "space")
        if depth == 1:
            return acc
        along = self._along_depth(normed, depth, site)
        return acc + windows(along, *y.shape[1:3]).to(acc.dtype)

    def _along_depth(self, normed: Tensor, depth: int, site: SiteView) -> Tensor:
        """The depth branch's change to the grid (B·D, H, W, C)."""
        rows, columns = (1, depth) if self.line else depth_grid(depth)
        # its own forward, not a call: what stands at the attention must not act within itself
        attended: Any = site.module.forward(to_columns(normed, rows, columns))
        if not isinstance(attended, Tensor):
            attended = attended[site.span.y]
        return to_slices(self._bottleneck(None, attended, "depth"), *normed.shape[1:3])

    def _bottleneck(self, residual: Tensor | None, z: Tensor, branch: str) -> Tensor:
        down, down_bias, up, up_bias = (
            getattr(self, f"{branch}_{name}") for name in ("down", "down_bias", "up", "up_bias")
        )
        return bottleneck(residual, z, down, down_bias, up, up_bias, self.activation, 1.0)


class HyperPromptLayer(Layer):
    """A bottleneck of the mask decoder whose inner matrices are made from the prompt.

    Parameters: down (L, C), down_bias (L,), reduce (P, C), reduce_bias (P,), generate (K, L·L, P),
    generate_bias (K, L·L), up (C, L), up_bias (C,).
    """

    facts = ("prompt",)
    why_not_merge = "what it does depends on the prompt"

    def __init__(self, adapter: MedSA, site: SiteView, generator: torch.Generator) -> None:
        super().__init__()
        if site.span.layout not in ("BPTC", "BTC"):
            raise SiteError(f"{site.name} has no tokens of a mask decoder")
        inner, numbers, layers = adapter.hyper_width, adapter.prompt_width, adapter.hyper_layers
        self.down, self.down_bias = empty(site, inner, site.width), empty(site, inner)
        self.reduce, self.reduce_bias = empty(site, numbers, site.width), empty(site, numbers)
        self.generate = empty(site, layers, inner * inner, numbers)
        self.generate_bias = empty(site, layers, inner * inner)
        self.up, self.up_bias = empty(site, site.width, inner), empty(site, site.width)
        _draw(self, generator)
        nn.init.zeros_(self.up)
        nn.init.zeros_(self.up_bias)

    def after(self, acc: Tensor, y: Tensor, x: Tensor, context: Context, site: SiteView) -> Tensor:
        prompt = context.get("prompt")
        if prompt is None:  # a mask alone, or nothing: there is no token to take the mean of
            prompt = y.new_zeros(*y.shape[:-2], 1, y.shape[-1])
        if prompt.shape[:-2] != y.shape[:-2] or prompt.shape[-1] != y.shape[-1]:
            raise CheckError(
                f"the prompt is {tuple(prompt.shape)} and the tokens at {site.name} are "
                f"{tuple(y.shape)}",
                "call the mask decoder with the prompt encoder's own output for the same batch",
            )
        inner = self.down.shape[0]
        numbers = linear(prompt.mean(dim=-2), self.reduce, self.reduce_bias)  # (…, P)
        hidden = linear(y, self.down, self.down_bias)  # (…, N, L)
        for weight, bias in zip(self.generate, self.generate_bias, strict=True):
            made = linear(numbers, weight, bias).unflatten(-1, (inner, inner))  # (…, L, L)
            mixed = hidden @ made
            hidden = F.relu(F.layer_norm(mixed.to(self.down.dtype), (inner,)))
        return acc + linear(hidden, self.up, self.up_bias).to(acc.dtype)
