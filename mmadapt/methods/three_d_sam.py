"""3DSAM-adapter: what it puts into SAM's blocks, and how volumes enter.

Gong et al. 2023, 3DSAM-adapter: Holistic Adaptation of SAM from 2D to 3D for Promptable Tumor
Segmentation, arXiv:2306.13465

    block:  x ← x + relu(conv(relu(x·Dᵀ + b_d)))·Uᵀ + b_u,   conv 3 × 3 × 3, depth-wise
            x ← x + attn(norm1(x) in cubes),   x ← x + mlp(norm2(x))
    attn:   softmax(q·kᵀ/√c + q·(R_d + R_h + R_w))·v in every cube

R_h and R_w are the backbone's, R_d starts as their mean. In the released variant the bottleneck ends
in another relu; there U has to be drawn, since a relu at zero lets no gradient through.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmadapt.adapter import Unlock
from mmadapt.core.layer import Layer, empty
from mmadapt.core.site import parse_role
from mmadapt.errors import AdapterError, CheckError
from mmadapt.methods.drawn import Drawn
from mmadapt.methods.unlock import UnlockLayer
from mmadapt.ops.volume import cube_attention, cubes, cubes_apart, from_cubes, windows

if TYPE_CHECKING:
    from mmadapt.adapter import ThreeDSAM
    from mmadapt.core.context import Context
    from mmadapt.core.parts import GridAttention
    from mmadapt.core.site import SiteView


def layer_at(adapter: ThreeDSAM, site: SiteView, generator: torch.Generator) -> Layer:
    """What 3DSAM-adapter has at a site: it depends on the role."""
    from mmadapt.methods import three_d_sam_ends as ends
    from mmadapt.methods.three_d_sam_inputs import EntryLayer

    if site.port == "weight":
        return UnlockLayer(Unlock(), site, generator)
    if site.port == "in":
        return SpatialLayer(adapter, site, generator)
    roles: dict[str, Any] = {
        "model": EntryLayer,
        "vision": ends.VolumeEncoderLayer,
        "prompt": ends.ClickLayer,
        "decoder": ends.VolumeMaskLayer,
    }
    return roles.get(site.role, CubeAttentionLayer)(adapter, site, generator)


class SpatialLayer(Drawn):
    """The bottleneck before a block.

    Parameters: down (H, C), down_bias (H,), kernel (H, 1, 3, 3, 3), kernel_bias (H,), up (C, H),
    up_bias (C,).
    """

    why_not_merge = "activations stand between its projections"

    def __init__(self, adapter: ThreeDSAM, site: SiteView, generator: torch.Generator) -> None:
        super().__init__()
        width = adapter.width_of(site.width_in)
        self.released = adapter.variant == "released"
        self.draw(site, generator, "down", (width, site.width_in))
        self.draw(site, generator, "kernel", (width, 1, 3, 3, 3))
        self.draw(site, generator, "up", (site.width_in, width))
        if not self.released:
            nn.init.zeros_(self.get_parameter("up"))
            nn.init.zeros_(self.get_parameter("up_bias"))

    def before(self, x: Tensor, context: Context, site: SiteView) -> Tensor:
        volume = x.unflatten(0, (-1, planes_of(context, site)))  # (B, D, H, W, C)
        hidden = F.relu(self.project(volume, "down")).movedim(-1, 1)
        kernel, bias = self.get_parameter("kernel"), self.get_parameter("kernel_bias")
        kernel, bias = kernel.to(hidden.dtype), bias.to(hidden.dtype)
        hidden = F.relu(F.conv3d(hidden, kernel, bias, padding=1, groups=len(kernel)))
        change = self.project(hidden.movedim(1, -1), "up")
        if self.released:
            change = F.relu(change)
        return x + change.flatten(0, 1).to(x.dtype)


class CubeAttentionLayer(Layer):
    """Attention within cubes, by the block's own projections.

    Parameters: depth (L, c), relative positions along the depth, where the backbone has any.
    """

    taps = ("norm1",)
    additive = False
    why_not_merge = "it computes attention over other tokens"

    def __init__(self, adapter: ThreeDSAM, site: SiteView, generator: torch.Generator) -> None:
        super().__init__()
        self.window = adapter.window
        self.shifts = (parse_role(site.role)[1][1] or 0) % 2 == 0  # vision.layers[i].attn
        parts: GridAttention = site.span.parts(site.module)  # type: ignore[misc]
        self.depth: nn.Parameter | None = None
        if parts.rows is not None and parts.columns is not None:
            if parts.rows.shape != parts.columns.shape:
                raise AdapterError(
                    f"the tables of relative positions at {site.name} are "
                    f"{tuple(parts.rows.shape)} and {tuple(parts.columns.shape)}, expected equal ones"
                )
            self.depth = empty(site, *parts.rows.shape)
            with torch.no_grad():
                self.depth.copy_((parts.rows + parts.columns) / 2)

    def around(
        self,
        call: Callable[..., Any],
        args: tuple,
        kwargs: dict[str, Any],
        context: Context,
        site: SiteView,
    ) -> Any:
        parts: GridAttention = site.span.parts(site.module)  # type: ignore[misc]
        normed = context.read(site.taps["norm1"])  # the whole grid, where x may be its windows
        x = args[0] if args else next(iter(kwargs.values()))
        volume = normed.unflatten(0, (-1, planes_of(context, site)))
        attended = self._attend(volume, parts).flatten(0, 1)
        y = windows(attended, *x.shape[1:3])
        return (y, None) if parts.pair else y

    def _attend(self, volume: Tensor, parts: GridAttention) -> Tensor:
        grid = volume.shape[1:4]
        size = [min(self.window, length) for length in grid]
        shift = [
            side // 2 if self.shifts and side < length else 0
            for side, length in zip(size, grid, strict=True)
        ]
        over = [-length % side for side, length in zip(size, grid, strict=True)]
        padded = F.pad(volume, (0, 0, 0, over[2], 0, over[1], 0, over[0]))
        whole = padded.shape[1:4]
        apart = cubes_apart(grid, size, shift, volume.device)
        if any(shift):
            padded = torch.roll(padded, [-by for by in shift], (1, 2, 3))
        fused = parts.qkv(cubes(padded, size))  # (B·n, N, 3·C)
        q, k, v = fused.unflatten(-1, (3, parts.heads, -1)).permute(2, 0, 3, 1, 4)
        found = cube_attention(q, k, v, size, (self.depth, parts.rows, parts.columns), apart)
        attended = from_cubes(parts.proj(found.transpose(1, 2).flatten(2)), size, whole)
        if any(shift):
            attended = torch.roll(attended, shift, (1, 2, 3))
        return attended[:, : grid[0], : grid[1], : grid[2]]


def planes_of(context: Context, site: SiteView) -> int:
    """How many planes of tokens a volume has in this forward pass."""
    planes = context.get("planes")
    if planes is None:
        raise CheckError(
            f"{site.name} was reached by a call that did not begin with a volume",
            "call the model, or its image encoder, with pixel_values (B, C, D, H, W)",
        )
    return planes
