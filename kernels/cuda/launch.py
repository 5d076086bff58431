"""Launching the cluster kernel: the forward pass with the arguments of `mmadapt.ops.plain`'s."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmadapt.errors import OpsError

from ..settings import NUMBERS, PROCESSORS
from . import driver
from .instance import CHUNK, Arguments, instance_for, padded

_KINDS = {torch.bfloat16: "Bfloat16", torch.float16: "Float16"}


def forward(
    residual: Tensor | None, x: Tensor, folded: Any, spec: Any, cluster: int
) -> tuple[Tensor, Tensor]:
    """y, and mean and 1 / deviation of x's rows (T, 2) or, without a norm, nothing (0,)."""
    rows, channels = x.shape
    width = folded.down.shape[1]
    kind = "same" if spec.same else "none" if residual is None else "other"
    instance = instance_for(
        rows,
        channels,
        width,
        processors=_processors(x.device),
        number=_KINDS[x.dtype],
        norm=spec.norm,
        activation=NUMBERS[spec.activation],
        residual=kind,
        cluster=cluster,
    )
    if instance is None:
        raise OpsError(
            f"{channels} → {width} does not fit the shared memory of a block",
            "set MMADAPT_OPS to 'triton'",
        )
    y = torch.empty(rows, channels, dtype=x.dtype, device=x.device)
    statistics = torch.empty((rows, 2) if spec.norm else (0,), dtype=torch.float32, device=x.device)
    x, residual = _reachable(x), None if residual is None else _reachable(residual)
    down, up = packed(folded.down[0], folded.up[0])
    bias = None if folded.bias is None else _reachable(folded.bias)
    pointers = (x, residual, down, up, folded.slope, folded.shift, bias, folded.gain, y, statistics)
    arguments = Arguments(
        *(None if tensor is None else tensor.data_ptr() for tensor in pointers),
        x.stride(0),
        0 if residual is None else residual.stride(0),
        float(spec.factor),
        float(spec.eps),
        rows,
        width,
    )
    driver.start(instance, arguments, x.device)
    return y, statistics


def packed(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """down (H, C) and up (C, H) as the kernel's chunks: (C/64, H', 72) and (C/64, 64, H' + 8).

    H' is the next multiple of 16. Units beyond H are zero; what pads a row is never read.
    """
    width, channels = down.shape
    full, chunks = padded(width), channels // CHUNK
    make = down.new_empty if full == width else down.new_zeros
    to_down, to_up = make(chunks, full, CHUNK + 8), make(chunks, CHUNK, full + 8)
    to_down[:, :width, :CHUNK] = down.view(width, chunks, CHUNK).transpose(0, 1)
    to_up[:, :, :width] = up.view(chunks, CHUNK, width)
    return to_down, to_up


def _reachable(rows: Tensor) -> Tensor:
    """(T, C) whose rows begin at multiples of 16 bytes, as bulk copies want them; copied if need be."""
    step = rows.stride(0) * rows.element_size()
    return (
        rows
        if rows.data_ptr() % 16 == 0 and step % 16 == 0
        else rows.clone(memory_format=torch.contiguous_format)
    )


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count
