"""The fused bottleneck as an operator of torch, so that compiling and exporting keep it whole.

`mmadapt::bottleneck` and `mmadapt::bottleneck_backward` know nothing of autograd: `Fused` stands
around them, which costs a fraction of an operator's own registration. Kernels compute them where
Triton reaches, or CUDA where it was chosen, `plain` elsewhere. Kept for backward are x, the
parameters, and two numbers a row.
"""

from __future__ import annotations

import contextlib
import importlib
from typing import Any

import torch
from torch import Tensor

from mmadapt.ops import choice, plain
from mmadapt.ops.folding import Parameters, fold, unfold
from mmadapt.ops.plain import Spec

_PARAMETERS = (
    "Tensor? norm_weight, Tensor? norm_bias, Tensor down, Tensor? down_bias, Tensor up, "
    "Tensor? up_bias, Tensor? scale"
)
_OPTIONS = "Tensor? ids, str activation, float factor, float eps, bool same, ScalarType operands"

library = torch.library.Library("mmadapt", "DEF")
library.define(
    f"bottleneck(Tensor? residual, Tensor x, {_PARAMETERS}, {_OPTIONS}) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)
library.define(
    f"bottleneck_backward(Tensor dy, Tensor x, Tensor statistics, {_PARAMETERS}, {_OPTIONS}, "
    "bool weights) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)


def _forward(residual: Any, x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    parameters, ids, spec, operands = _sorted(arguments)
    cluster = _cluster(residual, x, parameters, ids, spec, operands)
    with _plainly(x):
        added, rows = None if residual is None else _rows(residual), _rows(x)
        folded = fold(parameters, operands)
        if cluster:
            launch: Any = importlib.import_module("mmadapt.kernels.cuda.launch")
            y, statistics = launch.forward(added, rows, folded, spec, cluster)
        else:
            y, statistics = _backend(x).forward(added, rows, folded, spec, ids)
    return y.view(*x.shape[:-1], y.shape[-1]), statistics


def _backward(dy: Tensor, x: Tensor, statistics: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *arguments, weights = arguments  # type: ignore[assignment]
    parameters, ids, spec, operands = _sorted(arguments)
    with _plainly(x):
        folded = fold(parameters, operands)
        dx, sums = _backend(x).backward(_rows(dy), _rows(x), statistics, folded, spec, ids, weights)
        found: Any = (None,) * 7
        if weights:
            found = unfold(plain.Sums(*sums), parameters, spec.factor)
            if ids is None:  # one adapter's parameters have no axis in front
                found = [None if each is None else each[0] for each in found]
    # an operator returns as many tensors whatever it was asked for
    filled = [x.new_empty(0) if each is None else each.contiguous() for each in found]
    return (dx.view(x.shape), *filled)


def _sorted(arguments: Any) -> tuple[Parameters, Tensor | None, Spec, torch.dtype]:
    tensors: Any
    *tensors, ids, activation, factor, eps, same, operands = arguments
    if ids is None:
        tensors = [None if each is None else each[None] for each in tensors]
    spec = Spec(activation, factor, eps, tensors[0] is not None, same)
    return Parameters(*tensors), ids, spec, operands


def _rows(tensor: Tensor) -> Tensor:
    """(…, C) as (T, C), its last axis without gaps; views where that can be."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _backend(x: Tensor) -> Any:
    if x.numel() and choice.kernels_reach(x):
        return importlib.import_module("mmadapt.kernels.launch")
    return plain


def _cluster(
    residual: Tensor | None,
    x: Tensor,
    parameters: Parameters,
    ids: Tensor | None,
    spec: Spec,
    operands: torch.dtype,
) -> int:
    """Blocks of a cluster for the CUDA forward pass, 0 where another path computes it."""
    return choice.cluster_for(
        choice.Case(
            tokens=x.numel() // max(1, x.shape[-1]),
            channels_in=x.shape[-1],
            channels=parameters.up.shape[1],
            width=parameters.up.shape[2],
            dtype=x.dtype,
            operands=operands,
            device=x.device,
            norm=spec.norm,
            activation=spec.activation,
            mixed=ids is not None,
            residual=None if residual is None else residual.dtype,
        )
    )


def _plainly(x: Tensor) -> Any:
    """Without autocast: what is rounded is decided already."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return contextlib.nullcontext()


library.impl("bottleneck", _forward, "CompositeExplicitAutograd")
library.impl("bottleneck_backward", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("mmadapt::bottleneck", lib=library)
def _(residual: Any, x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    parameters, _, spec, _ = _sorted(arguments)
    channels = parameters.up.shape[1]
    torch._check(x.shape[-1] == parameters.down.shape[2])
    added = x if residual is None else residual
    y = x.new_empty(*x.shape[:-1], channels, dtype=added.dtype)
    rows = x.numel() // x.shape[-1]
    shape = (rows, 2) if spec.norm else (0,)
    return y, x.new_empty(shape, dtype=torch.promote_types(torch.float32, x.dtype))


@torch.library.register_fake("mmadapt::bottleneck_backward", lib=library)
def _(dy: Tensor, x: Tensor, statistics: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *arguments, weights = arguments  # type: ignore[assignment]
    found = [
        each.new_empty(each.shape) if weights and each is not None else x.new_empty(0)
        for each in arguments[:7]
    ]
    return (x.new_empty(x.shape), *found)


class Fused(torch.autograd.Function):
    """`mmadapt::bottleneck` with its gradient."""

    @staticmethod
    def forward(ctx: Any, residual: Any, x: Tensor, *arguments: Any) -> Any:
        y, statistics = torch.ops.mmadapt.bottleneck(residual, x, *arguments)
        ctx.save_for_backward(x, statistics, *arguments[:8])
        ctx.options = arguments[8:]
        ctx.residual = residual is not None
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, statistics, *tensors = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        weights = any(wanted[2:9])
        dx, *found = torch.ops.mmadapt.bottleneck_backward(
            dy, x, statistics, *tensors, *ctx.options, weights
        )
        gradients = [new if asked else None for new, asked in zip(found, wanted[2:9], strict=True)]
        own = dy if ctx.residual and wanted[0] else None
        return own, dx if wanted[1] else None, *gradients, *(None,) * 6
