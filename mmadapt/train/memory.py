"""What to do when memory runs out, with the numbers of this run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from mmadapt.core.bank import bank_of
from mmadapt.core.check import tensors_in
from mmadapt.core.table import shape_of
from mmadapt.errors import MmadaptError

if TYPE_CHECKING:
    from torch import nn


class OutOfMemoryError(MmadaptError, torch.OutOfMemoryError):
    """Memory ran out in a step; still a `torch.OutOfMemoryError` for those who catch that one."""


def ran_out(error: BaseException) -> bool:
    """Whether an exception says that memory ran out: on an accelerator, in torch's CPU allocator or Python."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def out_of_memory(
    error: BaseException, model: nn.Module, batch: Any, step: int, accumulate: int, autocast: Any
) -> OutOfMemoryError:
    """The same failure with the batch's size, the memory in use and the ways out."""
    tensors = list(tensors_in(batch))
    rows = tensors[0].shape[0] if tensors and tensors[0].ndim else 1
    ways = []
    if rows > 1:
        ways.append(
            f"batch_size={-(-rows // 2)} with accumulate={2 * accumulate} learns the same from half "
            "the memory"
        )
    if autocast is None:
        ways.append("autocast=torch.bfloat16 halves most of it")
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")  # new and old
    asked = next((name for name in names if hasattr(model, name)), None)
    if asked:
        ways.append(f"model.{asked}() trades it for time")
    bank = bank_of(model)
    acting = [name for name, hook in bank.hooks.items() if hook.plan] if bank else []
    if len(acting) > 1:
        ways.append(
            f"an adapter at later sites only (now {len(acting)}, from {acting[0]} on) needs no "
            "activations of the layers before"
        )
    reason = (str(error).strip().splitlines() or ["memory ran out"])[0]
    return OutOfMemoryError(
        f"out of memory at step {step}, with a batch of {rows} rows "
        f"({', '.join(shape_of(tensor) for tensor in tensors[:4]) or 'no tensors'}){_in_use(model)}: "
        f"{reason[:300]}",
        "; ".join(ways) or "free what other cells and programs hold",
    )


def _in_use(model: nn.Module) -> str:
    device = next(model.parameters()).device
    if device.type != "cuda":
        return ""
    free, total = torch.cuda.mem_get_info(device)
    peak = torch.cuda.max_memory_allocated(device)
    return (
        f"; this process held up to {peak / 2**30:.2f} GiB of {device}'s {total / 2**30:.2f} GiB, "
        f"{free / 2**30:.2f} GiB are free now"
    )
