"""Which path computes a bottleneck: the reference, or a fused kernel where it fits and is faster.

What a kernel can compute at all is known; from where on it is the faster one is measured on each kind
of device by `kernels/bench`. Without a measurement the reference computes. `MMADAPT_OPS` forces a
path: `reference`, `triton`, or `cuda`, whose forward pass is written for clusters of thread blocks and
which leaves to Triton what it does not compute, every backward pass among it.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mmadapt.errors import OpsError
from mmadapt.kernels.cuda import compiler, driver  # pyright: ignore[reportMissingImports]
from mmadapt.kernels.cuda.instance import (  # pyright: ignore[reportMissingImports]
    ARCHITECTURES,
    CHUNK,
    fits,
)
from mmadapt.kernels.settings import WIDEST  # pyright: ignore[reportMissingImports]
from mmadapt.ops.reference import ACTIVATIONS

PATHS = ("reference", "triton", "cuda")
#: what MMADAPT_OPS asked for when mmadapt was imported
FORCED: str | None = os.environ.get("MMADAPT_OPS") or None

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_HALVES = (torch.float16, torch.bfloat16)
#: blocks of a cluster where the CUDA forward is asked for and nothing was measured
CLUSTER = 4


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
    #: blocks of a cluster where the CUDA forward took at most 1 / 1.15 of Triton's time; 0: nowhere
    cluster: int = 0


#: by compute capability. UNMEASURED: no GPU has run the kernels, so none is chosen by itself.
#: Arithmetic alone suggests 2e7, 128, 96 and 32 on an H200 (docs/kernels.md).
MEASURED: dict[tuple[int, int], Thresholds] = {}


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
    #: whether each row picks an adapter
    mixed: bool = False
    #: of the residual, where there is one
    residual: torch.dtype | None = None


class Choice(NamedTuple):
    """The path, whether it was forced, and what speaks against the kernels: a key of `REASONS`.

    With the path forced to "cuda" and found to be another, it is what speaks against that one.
    """

    path: str
    forced: bool
    against: str | None

    def why(self, case: Case) -> str:
        """One sentence."""
        against = REASONS[self.against](case) if self.against else None
        if not self.forced:
            return against or "it fits, and was measured to be faster"
        asked = f"MMADAPT_OPS asks for {FORCED}"
        return f"{asked}, but {against}" if against else asked


#: what may speak against the kernels, in words
REASONS: dict[str, Callable[[Case], str]] = {
    "cpu": lambda case: "on a CPU torch's own operations are the fast path",
    "triton": lambda case: "Triton is not installed",
    "old": lambda case: "the kernels need compute capability 8.0 or above",
    "no cuda": lambda case: _missing_for_cuda() or "",
    "no clusters": lambda case: (
        "the CUDA kernel is for clusters of compute capability 9.0 and 10.0"
    ),
    "mixed": lambda case: "each row picks an adapter",
    "halves": lambda case: (
        f"the CUDA kernel computes bfloat16 or float16 throughout, not {name(case.dtype)} in products "
        f"of {name(case.operands)} to {name(case.residual or case.dtype)}"
    ),
    "chunks": lambda case: (
        f"the CUDA kernel goes from channels to as many, in chunks of {CHUNK}, not from "
        f"{case.channels_in} to {case.channels}"
    ),
    "memory": lambda case: (
        f"16 rows of {case.channels} channels do not fit the shared memory of a block"
    ),
    "device": lambda case: f"the kernels are for NVIDIA's devices, not for {case.device.type!r}",
    "functorch": lambda case: "a transform of torch.func is at work",
    "dropout": lambda case: "dropout acts inside the bottleneck",
    "activation": lambda case: f"the kernels have no activation {case.activation!r}",
    "empty": lambda case: "there is nothing to compute",
    "dtype": lambda case: (
        f"{name(case.dtype)} in products of {name(case.operands)} is not among "
        f"{', '.join(map(name, _DTYPES))}"
    ),
    "rounding": lambda case: (
        f"{name(case.dtype)} is normed before autocast rounds it to {name(case.operands)}"
    ),
    "width": lambda case: (
        f"the bottleneck is {case.width} wide, and the kernels' registers hold {WIDEST}"
    ),
    "channels": lambda case: (
        f"{case.channels_in} or {case.channels} channels are no multiple of 8, which loads of 16 "
        "bytes need"
    ),
    "layout": lambda case: "channels do not lie side by side in memory",
    "unmeasured": lambda case: (
        "the kernels fit, but no run on a device like this one has measured them; MMADAPT_OPS=triton "
        "runs them"
    ),
    "products": lambda case: f"at width {case.width} the products bind, not the memory",
    "launch": lambda case: f"for {case.tokens} tokens launching binds, not the memory",
}


def choose(case: Case) -> Choice:
    """The path for this case; a forced one wherever it can compute it."""
    if FORCED is not None and FORCED not in PATHS:
        raise OpsError(
            f"MMADAPT_OPS is {FORCED!r}, expected {', '.join(PATHS)} or nothing",
            "set it before mmadapt is imported, or unset it",
        )
    if FORCED == "reference":
        return Choice("reference", True, None)
    if FORCED is None:
        against = unfit(case) or _slower(case)
        path = "reference" if against else "cuda" if cluster_for(case) else "triton"
        return Choice(path, False, against)
    against = unfit(case) if FORCED == "triton" else unfit_for_cuda(case)
    if against is None:
        return Choice(FORCED, True, None)
    other = "triton" if FORCED == "cuda" and unfit(case) is None else "reference"
    choice = Choice(other, True, against)
    if against != "empty" and not torch.compiler.is_compiling():
        _say_once(other, choice.why(case))
    return choice


def cluster_for(case: Case) -> int:
    """Blocks of a cluster for the CUDA forward pass of this case, or 0 where another path has it."""
    limits = thresholds_on(case.device)
    measured = limits.cluster if limits else 0
    if FORCED == "cuda":
        measured = measured or CLUSTER
    elif FORCED is not None:
        return 0
    return measured if measured and unfit_for_cuda(case) is None else 0


def unfit(case: Case) -> str | None:
    """Why no Triton kernel can compute this, or None."""
    unreached = unreached_on(case.device)
    if unreached:
        return unreached
    return _unfit_for_any(case)


def unfit_for_cuda(case: Case) -> str | None:
    """Why the CUDA kernel cannot compute this forward pass, or None."""
    unreached = cuda_unreached_on(case.device) or _unfit_for_any(case)
    if unreached:
        return unreached
    if case.mixed:
        return "mixed"
    if case.dtype not in _HALVES or {case.operands, case.residual or case.dtype} != {case.dtype}:
        return "halves"
    if case.channels_in != case.channels or case.channels % CHUNK:
        return "chunks"
    return None if fits(case.channels, case.width) else "memory"


def _unfit_for_any(case: Case) -> str | None:
    if case.functorch:
        return "functorch"
    if case.dropout:
        return "dropout"
    if case.activation not in ACTIVATIONS:
        return "activation"
    if not case.tokens:
        return "empty"
    if case.dtype not in _DTYPES or case.operands not in _DTYPES:
        return "dtype"
    if case.norm and case.dtype != case.operands:
        return "rounding"
    if case.width > WIDEST:
        return "width"
    if case.channels_in % 8 or case.channels % 8:
        return "channels"
    return None if case.last_contiguous else "layout"


def _slower(case: Case) -> str | None:
    """Why the kernels are not known to be faster here, or None."""
    limits = thresholds_on(case.device)
    if limits is None:
        return "unmeasured"
    wide = case.operands == torch.float32 and not torch.backends.cuda.matmul.allow_tf32
    most = limits.width_training if case.training else limits.width
    if case.width > (min(most, limits.width_float32) if wide else most):
        return "products"
    work = case.tokens * max(case.channels_in, case.channels) * case.width
    return "launch" if work < limits.work else None


# devices do not change while a process lives, so compiled code may take these answers as constants


@torch.compiler.assume_constant_result
def unreached_on(device: torch.device) -> str | None:
    """Why the kernels do not run on this device, or None; on a CPU they do where Triton interprets."""
    return _unreached_on(device)


@torch.compiler.assume_constant_result
def thresholds_on(device: torch.device) -> Thresholds | None:
    """What was measured on devices like this one."""
    return MEASURED.get(_capability(device)) if device.type == "cuda" else None


@functools.cache
def _unreached_on(device: torch.device) -> str | None:
    triton = importlib.util.find_spec("triton") is not None
    if device.type == "cpu":
        interpreted = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
        return None if triton and interpreted else "cpu"
    if device.type != "cuda" or torch.version.cuda is None:
        return "device"
    if not triton:
        return "triton"
    return None if _capability(device) >= (8, 0) else "old"


@torch.compiler.assume_constant_result
def cuda_unreached_on(device: torch.device) -> str | None:
    """Why the CUDA kernel does not run on this device, or None."""
    if device.type != "cuda" or torch.version.cuda is None:
        return "cpu" if device.type == "cpu" else "device"
    if _capability(device) not in ARCHITECTURES:
        return "no clusters"
    return "no cuda" if _missing_for_cuda() else None


@functools.cache
def _missing_for_cuda() -> str | None:
    return compiler.missing() or driver.missing()


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if torch.cuda.is_available() else (0, 0)


def kernels_reach(x: Tensor) -> bool:
    """Whether the kernels run where this tensor lies, and take its dtype."""
    return x.dtype in _DTYPES and unreached_on(x.device) is None


@functools.cache
def _say_once(path: str, why: str) -> None:
    computes = "Triton computes" if path == "triton" else "the reference computes"
    warnings.warn(f"{computes} a bottleneck: {why}", UserWarning, stacklevel=2)


def name(dtype: torch.dtype) -> str:
    """As torch says it, without its own name in front."""
    return str(dtype).removeprefix("torch.")
