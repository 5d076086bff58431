"""open_clip's vision transformer written out in straight lines, to compare hooks with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import functional as F

#: (layer index, y of the mlp, its input x, what norm1 returned) -> what leaves the mlp
Branch = Callable[[int, Tensor, Tensor, Tensor], Tensor]


def bare(i: int, y: Tensor, x: Tensor, norm1: Tensor) -> Tensor:
    """The backbone's own branch."""
    return y


def vision(model: Any, pixels: Tensor, branch: Branch = bare) -> Tensor:
    """What `open_clip.transformer.VisionTransformer` returns, with each mlp's output replaced.

    Sub-modules are called by `forward`, past every hook.
    """
    x = model._embeds(pixels)
    for i, block in enumerate(model.transformer.resblocks):
        norm1 = block.ln_1.forward(x)
        x = x + block.attn.forward(norm1, norm1, norm1, need_weights=False)[0]
        norm2 = block.ln_2.forward(x)
        x = x + branch(i, block.mlp.forward(norm2), norm2, norm1)
    pooled, _ = model._pool(x)
    return pooled @ model.proj


def delta(layer: Any, z: Tensor) -> Tensor:
    """What a gelu bottleneck adds."""
    return F.gelu(z @ layer.down.T + layer.down_bias) @ layer.up.T + layer.up_bias


def at_mlp(attachment: Any, index: int, adapter: int = 0) -> Any:
    return attachment.layers[f"{adapter}/vision.layers[{index}].mlp:out"]
