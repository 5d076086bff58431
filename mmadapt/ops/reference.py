"""The readable definition of each operation.

Letters: C channels, H bottleneck width, R rank, O outputs; `…` any leading axes. Inputs of another
dtype than the parameters are computed in the parameters' dtype and returned in their own.
"""

from __future__ import annotations

import functools
import itertools
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def quick_gelu(x: Tensor) -> Tensor:
    """x · sigmoid(1.702 x), the activation of OpenAI's CLIP."""
    return x * torch.sigmoid(1.702 * x)


def gelu_new(x: Tensor) -> Tensor:
    """GELU in its tanh approximation, as BERT's first code and the T5 family have it."""
    return F.gelu(x, approximate="tanh")


def _identity(x: Tensor) -> Tensor:
    return x


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": gelu_new,
    "quick_gelu": quick_gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "identity": _identity,
}


def channel_axis(layout: str) -> int:
    """Where the channels are in a tensor of this layout: 1 where they lead (BCHW), else −1."""
    return 1 if layout.startswith("BC") and len(layout) > 2 else -1


def bottleneck(
    z: Tensor,  # (…, C)
    down: Tensor,  # (H, C)
    down_bias: Tensor | None,  # (H,)
    up: Tensor,  # (C, H)
    up_bias: Tensor | None,  # (C,)
    activation: str,
    scale: Tensor | float,  # a number, () or (C,)
    dropout: float = 0.0,
) -> Tensor:
    """scale · (dropout(act(z·downᵀ + down_bias))·upᵀ + up_bias), shaped as z.

    A `dropout` other than 0 always acts: training is the caller's business.
    """
    dtype = z.dtype
    if dtype != down.dtype and not torch.is_autocast_enabled(z.device.type):
        z = z.to(down.dtype)
    hidden = ACTIVATIONS[activation](F.linear(z, down, down_bias))
    if dropout:
        hidden = F.dropout(hidden, dropout)
    delta = F.linear(hidden, up, up_bias)
    if isinstance(scale, Tensor) or scale != 1.0:
        delta = delta * scale
    return delta if delta.dtype == dtype else delta.to(dtype)


def layer_norm(z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Zero mean and unit variance over the last axis (…, C), times weight (C,), plus bias (C,).

    Returned in the parameters' dtype, since it stands inside a layer.
    """
    return F.layer_norm(z.to(weight.dtype), weight.shape, weight, bias)


def mixed_bottleneck(
    residual: Tensor | None,  # (B, …, C), or None for the change alone
    x: Tensor,  # (B, …, C_in)
    ids: Tensor,  # (B,) whole numbers; −1 for no adapter
    down: Tensor,  # (N, H, C_in)
    down_bias: Tensor | None,  # (N, H)
    up: Tensor,  # (N, C, H)
    up_bias: Tensor | None,  # (N, C)
    activation: str,
    scale: Tensor | float,  # a number, (N,) or (N, C)
    norm: tuple[Tensor, Tensor] | None = None,  # weight and bias, (N, C_in) each
) -> Tensor:
    """residual + what each row's own bottleneck, of N, makes of it; rows without one pass as they are."""
    if residual is None:
        residual = x.new_zeros(*x.shape[:-1], up.shape[1])
    y = residual
    for n in range(len(down)):
        rows = (ids == n).nonzero()[:, 0]
        z = x[rows] if norm is None else layer_norm(x[rows], norm[0][n], norm[1][n])
        biases = [None if bias is None else bias[n] for bias in (down_bias, up_bias)]
        own = scale[n] if isinstance(scale, Tensor) else scale
        delta = bottleneck(z, down[n], biases[0], up[n], biases[1], activation, own)
        y = y.index_copy(0, rows, residual[rows] + delta.to(residual.dtype))
    return y


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x·weightᵀ + bias for x (…, C), weight (O, C); in the parameters' dtype, or autocast's."""
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        x = x.to(weight.dtype)
    return F.linear(x, weight, bias)


def drop_rows(delta: Tensor, probability: float) -> Tensor:
    """delta (B, …) with whole rows set to zero at random, the others divided by 1 − probability.

    Always acts: training is the caller's business. The mean over the draws is delta.
    """
    kept = torch.rand(delta.shape[0], device=delta.device) >= probability
    factor = kept.to(delta.dtype) / (1 - probability)
    return delta * factor.view(-1, *(1 for _ in delta.shape[1:]))


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
    """weight + scale · b·a for weight (O, …), a (R, …) with the same trailing axes, b (O, R)."""
    if weight.ndim > 2:
        return low_rank_weight(weight.flatten(1), a.flatten(1), b, scale).view_as(weight)
    if weight.dtype == a.dtype:
        return torch.addmm(weight, b, a, alpha=scale)
    return (weight.to(a.dtype) + scale * (b @ a)).to(weight.dtype)


_CONVOLUTIONS = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


def low_rank_convolution(
    x: Tensor,  # (B, I, …)
    a: Tensor,  # (R, I, taps …)
    b: Tensor,  # (O, R)
    scale: float,
    stride: Any,
    padding: Any,
    dilation: Any,
) -> Tensor:
    """scale · what the kernel Σ_r b[:, r]·a[r] makes of x, (B, O, …)."""
    dtype = x.dtype
    if dtype != a.dtype and not torch.is_autocast_enabled(x.device.type):
        x = x.to(a.dtype)
    convolve = _CONVOLUTIONS[a.ndim]
    hidden = convolve(x, a, None, stride, padding, dilation)
    delta = scale * convolve(hidden, b.view(*b.shape, *(1 for _ in a.shape[2:])))
    return delta if delta.dtype == dtype else delta.to(dtype)


def scale_shift(y: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """y · scale + shift in y's dtype, for scale and shift that broadcast over y."""
    changed = y.to(scale.dtype) * scale + shift
    return changed if changed.dtype == y.dtype else changed.to(y.dtype)


def directed_shift(z: Tensor, gate: Tensor, gate_bias: Tensor, direction: Tensor) -> Tensor:
    """(z·gate + gate_bias)·direction for z (…, I), gate (I,), gate_bias (), direction (O,)."""
    dtype = z.dtype
    if dtype != gate.dtype and not torch.is_autocast_enabled(z.device.type):
        z = z.to(gate.dtype)
    amount = F.linear(z, gate[None]) + gate_bias  # (…, 1)
    return (amount * direction).to(dtype)


def kronecker_sum(a: Tensor, b: Tensor) -> Tensor:
    """Σ_i a_i ⊗ b_i, (P·R, Q·S), for a (N, P, Q) and b (N, R, S)."""
    blocks = torch.einsum("npq,nrs->prqs", a, b)
    return blocks.reshape(a.shape[1] * b.shape[1], a.shape[2] * b.shape[2])


@functools.cache
def normal_codes(bits: int) -> tuple[float, ...]:
    """2^bits codes for a standard normal variable, ascending.

    Each is the median of the values nearer to it than to any other, which makes the mean absolute
    error least: ±0.6745 for one bit, ±0.3778 and ±1.2657 for two.
    """
    normal, count = statistics.NormalDist(), 2**bits
    codes = [normal.inv_cdf((i + 0.5) / count) for i in range(count)]
    change = 1.0
    while change > 1e-12:
        edges = [normal.cdf((low + high) / 2) for low, high in itertools.pairwise(codes)]
        bounds = [0.0, *edges, 1.0]
        medians = [normal.inv_cdf((p + q) / 2) for p, q in itertools.pairwise(bounds)]
        change = max(abs(new - old) for new, old in zip(medians, codes, strict=True))
        codes = medians
    return tuple(codes)


def standardised(weight: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """(weight − mean) / (deviation + 1e-5); mean and deviation ()."""
    return (weight - mean) / (deviation + 1e-5)


def nearest_codes(standard: Tensor, codes: tuple[float, ...]) -> Tensor:
    """Which of the ascending `codes` is nearest to each element, int64 of the same shape."""
    index = torch.zeros_like(standard, dtype=torch.int64)
    for low, high in itertools.pairwise(codes):
        index += standard > (low + high) / 2
    return index


def low_bit(
    weight: Tensor,
    codes: tuple[float, ...],
    mean: Tensor | None = None,
    deviation: Tensor | None = None,
) -> Tensor:
    """code · deviation + mean, the code being the nearest to each standardised element.

    Mean and deviation are the weight's own unless given. The gradient takes the choice of the code
    for the identity, and goes through mean and deviation.
    """
    mean = weight.mean() if mean is None else mean
    deviation = weight.std() if deviation is None else deviation
    standard = standardised(weight, mean, deviation)
    with torch.no_grad():
        code = standard.new_tensor(codes)[nearest_codes(standard, codes)]
    # adding the difference, which is zero, leaves the code's own bits: files reproduce the value
    return (code + (standard - standard.detach())) * deviation + mean


def pack_bits(values: Tensor, bits: int) -> Tensor:
    """Whole numbers below 2^bits, any shape, as uint8 (⌈values·bits / 8⌉,), lowest bits first."""
    flags = (values.reshape(-1, 1) >> torch.arange(bits, device=values.device)) & 1
    eights = F.pad(flags.flatten(), (0, -flags.numel() % 8)).view(-1, 8)
    return (eights << torch.arange(8, device=values.device)).sum(1).to(torch.uint8)


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` numbers of `pack_bits`, int64 (count,)."""
    flags = (packed.to(torch.int64)[:, None] >> torch.arange(8, device=packed.device)) & 1
    values = flags.flatten()[: count * bits].view(count, bits)
    return (values << torch.arange(bits, device=packed.device)).sum(1)


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
    return votes(F.linear(unit, keys), labels, classes, sharpness).to(features.dtype)


def votes(cosines: Tensor, labels: Tensor, classes: int, sharpness: Tensor | float) -> Tensor:
    """The same from cosines (B, N) between features and keys."""
    affinity = torch.exp(-sharpness * (1 - cosines))
    filled = labels >= 0
    affinity = affinity * filled.to(affinity.dtype)
    found = affinity.new_zeros(affinity.shape[0], classes)
    return found.index_add(1, labels.clamp(min=0), affinity)


def by_row(z: Tensor, dtype: torch.dtype) -> Tensor:
    """z (B, …, C) as (B, N, C), so that a batch of matrices can act on the rows of the batch."""
    if z.ndim != 3:
        z = z.reshape(z.shape[0], -1, z.shape[-1])
    return z if z.dtype == dtype else z.to(dtype)


def add_by_row(acc: Tensor, delta: Tensor) -> Tensor:
    """acc (B, …, C) plus delta (B, N, C), in acc's shape and dtype."""
    if delta.dtype != acc.dtype:
        delta = delta.to(acc.dtype)
    return acc + (delta if delta.shape == acc.shape else delta.view(acc.shape))


def gated_attention(
    q: Tensor,  # (B, H, T, d)
    k: Tensor,  # (B, G, K, d); B may be 1, and G divides H
    v: Tensor,  # (B, G, K, d)
    gate: Tensor,  # (H,) or (1,)
    scale: float,
) -> Tensor:
    """gate · softmax(scale · q·kᵀ)·v for H heads side by side, (B, T, H·d).

    The softmax is taken in float32, whatever the dtype of the queries.
    """
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    weights = torch.softmax(torch.matmul(q, k.mT.to(q.dtype)) * scale, dim=-1, dtype=torch.float32)
    weights = gate.view(-1, 1, 1) * weights
    return torch.matmul(weights.to(v.dtype), v).transpose(1, 2).flatten(2)
