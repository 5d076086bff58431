"""Which path computes a bottleneck: the reference, or a fused kernel where it fits and is faster.

What a kernel can compute at all is known; from where on it is the faster one is measured on each kind
of device by `kernels/bench`. Without a measurement the reference computes. `MMADAPT_OPS` forces a
path: `reference`, `triton`, or `cuda`, which this version does not have.
"""

from __future__ import annotations

import functools
import html
import importlib.util
import os
import warnings
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from mmadapt.errors import OpsError
from mmadapt.ops.reference import ACTIVATIONS

PATHS = ("reference", "triton", "cuda")
#: what MMADAPT_OPS asked for when mmadapt was imported
FORCED: str | None = os.environ.get("MMADAPT_OPS") or None

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: the widest bottleneck whose tiles fit a kernel's registers
WIDEST = 128


@dataclass(frozen=True)
class Thresholds:
    """From where on the kernels are the faster path on one kind of device, as measured there."""

    #: tokens · channels · width, at least
    work: float
    #: bottleneck widths, at most: without gradients, with them, and of float32 without TF32
    width: int
    width_training: int
    width_float32: int
    #: the file with the measurement
    measured: str


#: by compute capability. UNMEASURED: no GPU has run the kernels, so none is chosen by itself.
#: Arithmetic alone suggests 2e7, 128, 96 and 32 on an H200 (docs/kernels.md).
MEASURED: dict[tuple[int, int], Thresholds] = {}


class Choice(NamedTuple):
    """The path and why."""

    path: str
    why: str


class Case(NamedTuple):
    """What is to be computed, as far as the choice depends on it."""

    tokens: int
    channels_in: int
    channels: int
    width: int
    dtype: torch.dtype
    operands: torch.dtype
    device: torch.device
    norm: bool = False
    activation: str = "gelu"
    training: bool = True
    dropout: float = 0.0
    last_contiguous: bool = True
    functorch: bool = False


def choose(case: Case) -> Choice:
    """The path for this case, a forced one first."""
    if FORCED is not None and FORCED not in PATHS:
        raise OpsError(
            f"MMADAPT_OPS is {FORCED!r}, expected {', '.join(PATHS)} or nothing",
            "set it before mmadapt is imported, or unset it",
        )
    if FORCED == "cuda":
        raise OpsError(
            "MMADAPT_OPS is 'cuda', and this version has kernels in Triton only",
            "set it to 'triton' or 'reference', or unset it",
        )
    if FORCED == "reference":
        return Choice("reference", "MMADAPT_OPS asks for it")
    unfit = _unfit(case)
    if FORCED == "triton":
        if unfit:
            _say_once(unfit)
            return Choice("reference", f"MMADAPT_OPS asks for triton, but {unfit}")
        return Choice("triton", "MMADAPT_OPS asks for it")
    if unfit:
        return Choice("reference", unfit)
    slower = _slower(case)
    return Choice("reference", slower) if slower else Choice("triton", "it fits and is faster")


def _unfit(case: Case) -> str | None:
    """Why no kernel can compute this, or None."""
    if not kernels_reach_device(case.device):
        return _why_not_reached(case.device)
    if case.functorch:
        return "a transform of torch.func is at work"
    if case.dropout:
        return "dropout acts inside the bottleneck"
    if case.activation not in ACTIVATIONS:
        return f"the kernels have no activation {case.activation!r}"
    if not case.tokens:
        return "there is nothing to compute"
    for what, dtype in (("x is", case.dtype), ("its operands are", case.operands)):
        if dtype not in _DTYPES:
            return f"{what} {_name(dtype)}, and the kernels take {', '.join(map(_name, _DTYPES))}"
    if case.norm and case.dtype != case.operands:
        return f"{_name(case.dtype)} is normed before autocast rounds it to {_name(case.operands)}"
    if case.width > WIDEST:
        return f"the bottleneck is {case.width} wide, and the kernels' registers hold {WIDEST}"
    if case.channels_in % 8 or case.channels % 8:
        return "the channels are no multiple of 8, which loads of 16 bytes need"
    if not case.last_contiguous:
        return "channels do not lie side by side in memory"
    return None


def _slower(case: Case) -> str | None:
    """Why the kernels are not known to be faster here, or None."""
    capability = torch.cuda.get_device_capability(case.device)
    limits = MEASURED.get(capability)
    if limits is None:
        known = f"no run on compute capability {capability[0]}.{capability[1]} has measured them"
        return f"the kernels fit, but {known}; MMADAPT_OPS=triton runs them"
    wide = case.operands == torch.float32 and not torch.backends.cuda.matmul.allow_tf32
    most = limits.width_training if case.training else limits.width
    most = min(most, limits.width_float32) if wide else most
    if case.width > most:
        return f"at width {case.width} the products bind, not the memory (from {most} on)"
    work = case.tokens * max(case.channels_in, case.channels) * case.width
    if work < limits.work:
        return f"tokens · channels · width = {work:.2g} is below {limits.work:.2g}, where launching binds"
    return None


def kernels_reach(x: Tensor) -> bool:
    """Whether the kernels run where this tensor lies, and take its dtype."""
    return x.dtype in _DTYPES and kernels_reach_device(x.device)


@functools.cache
def kernels_reach_device(device: torch.device) -> bool:
    """Whether Triton is there and computes on this device; on a CPU where it interprets."""
    if importlib.util.find_spec("triton") is None:
        return False
    if device.type == "cpu":
        return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
    return (
        device.type == "cuda"
        and torch.version.cuda is not None
        and torch.cuda.is_available()
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def _why_not_reached(device: torch.device) -> str:
    if device.type == "cpu":
        return "on a CPU torch's own operations are the fast path"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device.type == "cuda" and torch.cuda.is_available() and torch.version.cuda is not None:
        return "the kernels need compute capability 8.0 or above"
    return f"the kernels are for NVIDIA's devices, not for {device.type!r}"


@functools.cache
def _say_once(reason: str) -> None:
    warnings.warn(
        f"MMADAPT_OPS=triton, but the reference computes: {reason}", UserWarning, stacklevel=2
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# -- showing it ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Explanation:
    """Which path a bottleneck takes and why; a table in a notebook, lines elsewhere."""

    path: str
    why: str
    facts: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        width = max(map(len, self.facts))
        lines = [f"  {name.ljust(width)}  {value}" for name, value in self.facts.items()]
        return "\n".join([f"{self.path}: {self.why}", *lines])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{html.escape(name)}</td><td>{html.escape(value)}</td></tr>"
            for name, value in self.facts.items()
        )
        said = f"<b>{html.escape(self.path)}</b>: {html.escape(self.why)}"
        return f"<div>{said}</div><table>{rows}</table>"


def explain(
    tokens: int,
    channels: int,
    width: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    norm: bool = False,
    activation: str = "gelu",
    training: bool = True,
    channels_in: int | None = None,
) -> Explanation:
    """Which path a bottleneck of `channels` → `width` → `channels` over `tokens` takes, and why.

    `dtype` is that of the hidden states. `channels_in` differs where a parallel bottleneck reads
    other channels than it writes.
    """
    place = torch.device(device)
    case = Case(
        tokens=tokens,
        channels_in=channels_in or channels,
        channels=channels,
        width=width,
        dtype=dtype,
        operands=dtype,
        device=place,
        norm=norm,
        activation=activation,
        training=training,
    )
    path, why = choose(case)
    moved = tokens * (case.channels_in + channels) * dtype.itemsize
    limits = None
    if place.type == "cuda" and torch.cuda.is_available():
        limits = MEASURED.get(torch.cuda.get_device_capability(place))
    facts = {
        "x": f"{_name(dtype)}[{tokens:,}, {case.channels_in:,}] on {place}",
        "bottleneck": f"{case.channels_in:,} → {width} → {channels:,}, {activation}"
        + (", norm" if norm else ""),
        "forced": FORCED or "no",
        "kernels here": _unfit(case) or "fit",
        "thresholds": limits.measured if limits else "unmeasured on this device",
        "least traffic": f"{moved / 1e6:.1f} MB forward, "
        f"{4 * tokens * width * channels / 1e9:.2g} GFLOP",
    }
    return Explanation(path, why, facts)
