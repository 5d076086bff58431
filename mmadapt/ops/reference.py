"""The readable definition of each operation.

Letters: C channels, H bottleneck width, R rank, O outputs; `…` any leading axes. Inputs of another
dtype than the parameters are computed in the parameters' dtype and returned in their own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def quick_gelu(x: Tensor) -> Tensor:
    """x · sigmoid(1.702 x), the activation of OpenAI's CLIP."""
    return x * torch.sigmoid(1.702 * x)


def _identity(x: Tensor) -> Tensor:
    return x


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "quick_gelu": quick_gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "identity": _identity,
}


def bottleneck(
    z: Tensor,  # (…, C)
    down: Tensor,  # (H, C)
    down_bias: Tensor | None,  # (H,)
    up: Tensor,  # (C, H)
    up_bias: Tensor | None,  # (C,)
    activation: str,
    scale: float,
) -> Tensor:
    """scale · (act(z·downᵀ + down_bias)·upᵀ + up_bias), shaped as z."""
    dtype = z.dtype
    if dtype != down.dtype and not torch.is_autocast_enabled(z.device.type):
        z = z.to(down.dtype)
    delta = F.linear(ACTIVATIONS[activation](F.linear(z, down, down_bias)), up, up_bias)
    if scale != 1.0:
        delta = delta * scale
    return delta if delta.dtype == dtype else delta.to(dtype)


def low_rank(x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale · (x·aᵀ)·bᵀ for x (…, C), a (R, C), b (O, R)."""
    dtype = x.dtype
    if dtype != a.dtype and not torch.is_autocast_enabled(x.device.type):
        x = x.to(a.dtype)
    delta = F.linear(F.linear(x, a), b)
    if scale != 1.0:
        delta = delta * scale
    return delta if delta.dtype == dtype else delta.to(dtype)


def low_rank_weight(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """weight + scale · b·a for weight (O, C), a (R, C), b (O, R)."""
    if weight.dtype == a.dtype:
        return torch.addmm(weight, b, a, alpha=scale)
    return (weight.to(a.dtype) + scale * (b @ a)).to(weight.dtype)


def clip_adapter(features: Tensor, first: Tensor, second: Tensor, ratio: Tensor | float) -> Tensor:
    """The change ratio · (relu(relu(f·firstᵀ)·secondᵀ) − f), for f (…, D)."""
    f = features.to(first.dtype)
    mixed = F.relu(F.linear(F.relu(F.linear(f, first)), second))
    return (ratio * (mixed - f)).to(features.dtype)


def cache_votes(
    features: Tensor,  # (B, D), any length
    keys: Tensor,  # (N, D)
    labels: Tensor,  # (N,), −1 for an empty slot
    classes: int,
    sharpness: Tensor | float,
) -> Tensor:
    """Σ_i exp(−sharpness·(1 − f̂·keys_i)) at class labels_i, (B, classes); empty slots do not vote.

    Equals the product with one-hot labels, without building them.
    """
    unit = F.normalize(features.to(keys.dtype), dim=-1)
    affinity = torch.exp(-sharpness * (1 - F.linear(unit, keys)))  # (B, N)
    filled = labels >= 0
    affinity = affinity * filled.to(affinity.dtype)
    votes = affinity.new_zeros(affinity.shape[0], classes)
    return votes.index_add(1, labels.clamp(min=0), affinity).to(features.dtype)
