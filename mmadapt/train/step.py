"""One step of training: forward, backward, clip, update; what is not finite changes nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from mmadapt.errors import CheckError, DataError
from mmadapt.train.batches import Batch, on_device
from mmadapt.train.processes import holding_back, whole

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from mmadapt.train.processes import Processes


class Learner:
    """Accumulates gradients over batches, then changes what trains.

    `together` is a module whose call on a batch is the loss. With float16 the loss is scaled, and
    steps whose gradients overflow are passed over, as is usual.
    """

    def __init__(
        self,
        model: nn.Module,
        together: nn.Module,
        trained: Mapping[str, Tensor],
        optimiser: Optimizer,
        processes: Processes,
        autocast: torch.dtype | None,
        clip: float | None,
        accumulate: int,
    ) -> None:
        self.model = model
        self.together = together
        self.trained = list(trained.values())
        self.optimiser = optimiser
        self.processes = processes
        self.autocast = autocast
        self.clip = math.inf if clip is None else clip
        self.accumulate = accumulate
        self.device = self.trained[0].device
        self.scaler = GradScaler(self.device.type, enabled=autocast is torch.float16)
        self.divided = any(hasattr(tensor, "to_local") for tensor in self.trained)
        self.views = [tensor.detach() for tensor in self.trained]
        self.kept = [tensor.clone() for tensor in self._here()]
        self.seen: list[Batch] = []

    def learn(self, batch: Batch, step: int) -> float:
        """Add one batch's gradients, a share of the step's; returns its loss, over all processes."""
        self.seen.append(batch)
        last = len(self.seen) == self.accumulate
        with holding_back(self.together, self.model, last):
            with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
                value = self.together(on_device(batch.value, self.device))
            number = self._check(value, step)
            self.scaler.scale(value.reshape(()) / self.accumulate).backward()
        return number

    def _check(self, value: Any, step: int) -> float:
        if not isinstance(value, Tensor) or value.numel() != 1:
            shape = f"; its shape is {tuple(value.shape)}" if isinstance(value, Tensor) else ""
            raise DataError(
                f"loss returned {type(value).__name__}, expected a tensor with one number{shape}",
                "take its mean" if shape else "return a tensor, not a Python number",
            )
        if not value.requires_grad:
            raise CheckError(
                "the loss does not depend on anything that trains",
                "mmadapt.check(model, batch) tells which sites fire",
            )
        number = self.processes.mean(float(value.detach()))
        if not math.isfinite(number):
            raise CheckError(
                f"the loss is {number} at step {step}; nothing was changed by this step. It was "
                f"{self._where()}",
                "lower lr, or look at the data",
            )
        return number

    def _where(self) -> str:
        return " and ".join(map(str, self.seen[-4:]))

    def update(self, step: int) -> float:
        """Change what trains by the gradients gathered; returns their norm before clipping."""
        self.scaler.unscale_(self.optimiser)
        norm = float(whole(torch.nn.utils.clip_grad_norm_(self.trained, self.clip)))
        if not math.isfinite(norm) and not self._overflowed():
            raise CheckError(
                f"the gradient's norm is {norm} at step {step}; nothing was changed by this step. It "
                f"was {self._where()}",
                "look for a division by zero, or a root or logarithm at zero, in the loss",
            )
        _copy(self._here(), self.kept)
        try:
            self.scaler.step(self.optimiser)
            self.scaler.update()
            if self.processes.any(not _finite(self._here())):
                raise CheckError(
                    f"the update at step {step} left numbers that are not finite; those before it "
                    f"were put back. It was {self._where()}",
                    "lower lr",
                )
        except BaseException:
            _copy(self.kept, self._here())
            raise
        self.forget()
        return norm

    def _here(self) -> list[Tensor]:
        """What trains, or where it is sharded this process's part of it."""
        if not self.divided:
            return self.views
        with torch.no_grad():
            return [tensor.to_local() for tensor in self.trained]  # type: ignore[attr-defined]

    def _overflowed(self) -> bool:
        """Whether the scale of float16 gradients was too large, and can still fall."""
        return self.scaler.is_enabled() and self.scaler.get_scale() > 2**-10

    def forget(self) -> None:
        """Drop the gradients of a step that is over, or was cut short."""
        self.seen.clear()
        self.optimiser.zero_grad(set_to_none=True)


def _finite(tensors: list[Tensor]) -> bool:
    full = [tensor for tensor in tensors if tensor.numel()]  # a shard may be empty
    return not full or math.isfinite(float(torch.nn.utils.get_total_norm(full, math.inf)))


def _copy(values: list[Tensor], into: list[Tensor]) -> None:
    torch._foreach_copy_(into, values)  # type: ignore[attr-defined]
