"""The bottleneck that every modality calls: one definition, and the path that computes it.

    residual + scale·(act(LN(x)·downᵀ + down_bias)·upᵀ + up_bias)

On a CPU the reference computes it and nothing is asked; elsewhere `choice` decides. Letters as in
`reference`: C channels, H bottleneck width, N adapters, `…` any leading axes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmadapt.errors import OpsError
from mmadapt.ops import choice
from mmadapt.ops.reference import bottleneck as change
from mmadapt.ops.reference import layer_norm, mixed_bottleneck

EPS = 1e-5


def bottleneck(
    residual: Tensor | None,  # (…, C), or None for the change alone
    x: Tensor,  # (…, C_in)
    down: Tensor,  # (H, C_in)
    down_bias: Tensor | None,  # (H,)
    up: Tensor,  # (C, H)
    up_bias: Tensor | None,  # (C,)
    activation: str,
    scale: Tensor | float,  # a number, () or (C,)
    dropout: float = 0.0,
    norm: tuple[Tensor, Tensor] | None = None,  # weight and bias, (C_in,) each
) -> Tensor:
    """The bottleneck's output, (…, C) in the dtype of the residual, else of x.

    A `dropout` other than 0 always acts: training is the caller's business.
    """
    if choice.FORCED is None and x.is_cpu:  # nothing to choose, and a call more can be felt
        if not x.is_floating_point():
            _refuse_integers(x)
    else:
        check(residual, x, norm, down, up)
        fits = case(residual, x, down, up, activation, norm is not None, dropout)
        if choice.choose(fits).path != "reference":
            tensors = (*(norm or (None, None)), down, down_bias, up, up_bias)
            return _fused(residual, x, tensors, scale, None, activation)
    z = x if norm is None else layer_norm(x, *norm)
    delta = change(z, down, down_bias, up, up_bias, activation, scale, dropout)
    if residual is None:
        return delta if delta.dtype == x.dtype else delta.to(x.dtype)
    return residual + (delta if delta.dtype == residual.dtype else delta.to(residual.dtype))


def mixed(
    residual: Tensor | None,  # (B, …, C)
    x: Tensor,  # (B, …, C_in)
    ids: Tensor | list[int],  # (B,) whole numbers from −1, no adapter, to N − 1
    down: Tensor,  # (N, H, C_in)
    down_bias: Tensor | None,  # (N, H)
    up: Tensor,  # (N, C, H)
    up_bias: Tensor | None,  # (N, C)
    activation: str,
    scale: Tensor | float,  # a number, (N,) or (N, C)
    norm: tuple[Tensor, Tensor] | None = None,  # (N, C_in) each
) -> Tensor:
    """The bottleneck with an adapter of every row's own; rows without one pass bit for bit.

    Tokens that share no row, such as packed segments, come as (T, C) with an id each. Ids that are on
    a GPU are checked there: one out of range ends the stream's work, without waiting for it.
    """
    places = checked_ids(ids, x, len(down))
    return mixed_known(residual, x, places, down, down_bias, up, up_bias, activation, scale, norm)


def mixed_known(
    residual: Tensor | None,
    x: Tensor,
    ids: Tensor,
    down: Tensor,
    down_bias: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    activation: str,
    scale: Tensor | float,
    norm: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """`mixed` with ids that are known to lie on x's device and in their range."""
    check(residual, x, norm, down[0], up[0])
    fits = case(residual, x, down[0], up[0], activation, norm is not None, 0.0, mixed=True)
    if choice.choose(fits).path != "reference":
        tensors = (*(norm or (None, None)), down, down_bias, up, up_bias)
        return _fused(residual, x, tensors, scale, ids, activation)
    return mixed_bottleneck(residual, x, ids, down, down_bias, up, up_bias, activation, scale, norm)


def couple(
    z: Tensor,  # (…, C)
    f: tuple[Tensor, Tensor, Tensor, Tensor],  # down, its bias, up, its bias
    g: tuple[Tensor, Tensor, Tensor, Tensor],
    activation: str,
    inverse: bool,
) -> Tensor:
    """The additive coupling y1 = x1 + f(x2), y2 = x2 + g(y1) of both halves of z, or its inverse."""
    wide = z.to(f[0].dtype)
    first, second = wide.split((f[2].shape[0], g[2].shape[0]), dim=-1)
    if inverse:
        second = second - bottleneck(None, first, *g, activation, 1.0)
        first = first - bottleneck(None, second, *f, activation, 1.0)
    else:
        first = bottleneck(first, second, *f, activation, 1.0)
        second = bottleneck(second, first, *g, activation, 1.0)
    # in z's own memory layout: another one makes the backbone's kernels round otherwise
    return torch.empty_like(z).copy_(torch.cat((first, second), dim=-1))


def fuses(x: Tensor, down: Tensor, up: Tensor, activation: str, norm: bool) -> bool:
    """Whether a kernel would compute mixed rows by matrices like these, (H, C_in) and (C, H), on x."""
    if choice.FORCED is None and x.is_cpu:
        return False
    return (
        choice.choose(case(x, x, down, up, activation, norm, 0.0, mixed=True)).path != "reference"
    )


def fused(
    residual: Tensor | None,
    x: Tensor,
    tensors: tuple[
        Tensor | None, ...
    ],  # norm's weight and bias, down and its bias, up and its bias
    scale: Tensor | float,
    ids: Tensor | None,
    activation: str,
    operands: torch.dtype,
) -> Tensor:
    """The registered operator with its gradient, whatever the path; matrices rounded to `operands`."""
    from mmadapt.ops.registered import Fused

    factor, trained = (1.0, scale) if isinstance(scale, Tensor) else (float(scale), None)
    same = residual is x
    added = None if same else residual
    return Fused.apply(added, x, *tensors, trained, ids, activation, factor, EPS, same, operands)  # pyright: ignore[reportReturnType]


def _fused(
    residual: Tensor | None,
    x: Tensor,
    tensors: tuple[Tensor | None, ...],
    scale: Tensor | float,
    ids: Tensor | None,
    activation: str,
) -> Tensor:
    return fused(residual, x, tensors, scale, ids, activation, operands_of(x))


def operands_of(x: Tensor) -> torch.dtype:
    """What the products are taken in: autocast's dtype, else that of x."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def case(
    residual: Tensor | None,
    x: Tensor,
    down: Tensor,
    up: Tensor,
    activation: str,
    norm: bool,
    dropout: float,
    mixed: bool = False,
) -> choice.Case:
    """What the choice depends on. down (H, C_in), up (C, H)."""
    return choice.Case(
        tokens=x.numel() // max(1, x.shape[-1]),
        channels_in=x.shape[-1],
        channels=up.shape[0],
        width=down.shape[0],
        dtype=x.dtype,
        operands=operands_of(x),
        device=x.device,
        norm=norm,
        activation=activation,
        training=torch.is_grad_enabled(),
        dropout=dropout,
        last_contiguous=x.stride(-1) == 1,
        functorch=torch._C._are_functorch_transforms_active(),
        mixed=mixed,
        residual=None if residual is None else residual.dtype,
    )


def check(
    residual: Tensor | None,
    x: Tensor,
    norm: tuple[Tensor, Tensor] | None,
    down: Tensor,
    up: Tensor,
) -> None:
    """Refuse what no path has an answer for."""
    if not x.is_floating_point():
        _refuse_integers(x)
    if x.shape[-1] != down.shape[-1]:
        raise OpsError(
            f"x has {x.shape[-1]} channels and the bottleneck reads {down.shape[-1]}",
            "attach the adapter to a backbone of the width it was made for",
        )
    if residual is not None and residual.shape != (*x.shape[:-1], up.shape[0]):
        raise OpsError(
            f"the residual is {tuple(residual.shape)}, expected {(*x.shape[:-1], up.shape[0])}",
            "a bottleneck adds to as many positions as it reads",
        )
    devices = {t.device for t in (residual, x, down, up, *(norm or ())) if t is not None}
    if len(devices) > 1:
        raise OpsError(
            f"a bottleneck's tensors lie on {', '.join(sorted(map(str, devices)))}",
            "move the model, its adapters and its input to one device",
        )


def checked_ids(ids: Tensor | list[int], x: Tensor, adapters: int) -> Tensor:
    """ids on x's device; refused here if they are known here, else on the device."""
    given = torch.as_tensor(ids)
    if given.is_floating_point() or given.dtype == torch.bool or given.shape != x.shape[:1]:
        raise OpsError(
            f"ids are {str(given.dtype).removeprefix('torch.')}{list(given.shape)}, expected a whole "
            f"number for each of {x.shape[0]} rows",
            "give the place of each row's adapter, and −1 for none",
        )
    if given.is_cpu and not torch.compiler.is_compiling():
        if given.numel() and not (int(given.min()) >= -1 and int(given.max()) < adapters):
            raise OpsError(
                f"ids reach from {int(given.min())} to {int(given.max())}, and there are {adapters} adapters",
                f"use −1, no adapter, to {adapters - 1}",
            )
        return given.to(x.device, non_blocking=True)
    inside = ((given >= -1) & (given < adapters)).all()
    torch.ops.aten._assert_async.msg(inside, "an id of a mixed batch is out of range")
    return given.to(x.device)


def _refuse_integers(x: Tensor) -> None:
    raise OpsError(
        f"x is {str(x.dtype).removeprefix('torch.')}, and a bottleneck is for hidden states",
        "choose a site that gives floating-point numbers, or convert them",
    )
