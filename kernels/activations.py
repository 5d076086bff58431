"""Activations of the bottleneck and their derivatives, in Triton; each equals the reference's.

To add one: a number in `settings.NUMBERS`, a branch in both functions and in `cuda/activations.cuh`,
and a case in `tests/interpreted.py` runs it against float64 by itself.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _sigmoid(u):
    return 1.0 / (1.0 + tl.exp(-u))


@triton.jit
def _tanh(u):
    # the quotient loses digits near zero, where the series has them
    square = u * u
    series = u * (1.0 + square * (-0.3333333333 + square * (0.1333333333 - square * 0.0539682540)))
    return tl.where(square < 0.04, series, 2.0 * _sigmoid(2.0 * u) - 1.0)


@triton.jit
def activate(u, ACTIVATION: tl.constexpr):
    """act(u) in float32."""
    if ACTIVATION == 1:
        h = tl.where(u < 0.0, 0.0, u)  # a maximum would make zero of a NaN
    elif ACTIVATION == 2:
        h = 0.5 * u * (1.0 + tl.erf(u * 0.7071067811865476))
    elif ACTIVATION == 3:  # (1 + tanh z) / 2 is the sigmoid of 2z
        h = u * _sigmoid(1.5957691216057308 * (u + 0.044715 * u * u * u))
    elif ACTIVATION == 4:
        h = u * _sigmoid(u)
    elif ACTIVATION == 5:
        h = u * _sigmoid(1.702 * u)
    elif ACTIVATION == 6:
        h = _tanh(u)
    else:
        h = u
    return h


@triton.jit
def slope(u, ACTIVATION: tl.constexpr):
    """act'(u) in float32."""
    if ACTIVATION == 1:
        d = tl.where(u > 0.0, 1.0, tl.where(u <= 0.0, 0.0, u))
    elif ACTIVATION == 2:
        d = 0.5 * (1.0 + tl.erf(u * 0.7071067811865476))
        d += u * 0.3989422804014327 * tl.exp(-0.5 * u * u)
    elif ACTIVATION == 3:
        s = _sigmoid(1.5957691216057308 * (u + 0.044715 * u * u * u))
        d = s + u * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * u * u)
    elif ACTIVATION == 4:
        s = _sigmoid(u)
        d = s * (1.0 + u * (1.0 - s))
    elif ACTIVATION == 5:
        s = _sigmoid(1.702 * u)
        d = s + u * 1.702 * s * (1.0 - s)
    elif ACTIVATION == 6:
        t = _tanh(u)
        d = 1.0 - t * t
    else:
        d = u * 0.0 + 1.0
    return d
