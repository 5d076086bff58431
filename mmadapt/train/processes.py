"""One process or many: who I am, and what has to be agreed on.

Processes are started by `accelerate launch` or torchrun; nothing here starts any.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from mmadapt.errors import AttachError, MissingDependencyError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

#: methods of models, besides the call itself, that gather sharded weights before they run
_FORWARDS = ("encode_image", "encode_text", "get_image_features", "get_text_features", "generate")


class Processes:
    """The processes that train one model together: `rank` of `size`; `main` is the first.

    Joins the group a launcher has prepared (environment variables RANK and WORLD_SIZE), by way of
    accelerate where the program has not made one itself.
    """

    rank = 0
    size = 1

    def __init__(self) -> None:
        import torch
        from torch import distributed

        self.device: Any = None
        here = distributed.is_available() and distributed.is_initialized()
        if not here and {"RANK", "WORLD_SIZE"} <= set(os.environ):
            try:
                from accelerate import PartialState
            except ImportError:
                raise MissingDependencyError(
                    "training in several processes needs accelerate",
                    "pip install 'mmadapt[train]'",
                ) from None
            self.device = PartialState().device
            here = distributed.is_initialized()
        if here:
            self.rank, self.size = distributed.get_rank(), distributed.get_world_size()
            if self.device is None:
                own = torch.cuda.current_device() if distributed.get_backend() == "nccl" else "cpu"
                self.device = torch.device(own)

    @property
    def main(self) -> bool:
        """Whether this is the process that writes and shows."""
        return self.rank == 0

    # -- agreeing ---------------------------------------------------------------------------

    def mean(self, value: float) -> float:
        """The mean of a number over all processes."""
        if self.size == 1:
            return value
        import torch

        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(total)
        return float(total) / self.size

    def any(self, flag: bool) -> bool:
        """Whether a flag is up in any process."""
        return self.mean(float(flag)) > 0

    def broadcast(self, value: Any) -> Any:
        """The first process's value, in all of them."""
        if self.size == 1:
            return value
        import torch.distributed as distributed

        box = [value]
        distributed.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def own_chance(self, salt: int) -> None:
        """Give every process but the first a random state of its own."""
        if self.rank:
            import torch

            torch.manual_seed(int(torch.randint(2**40, ())) + 1_000_003 * self.rank + salt)

    def autocast(self, model: nn.Module) -> Any:
        """The precision asked of `accelerate launch --mixed_precision`, where FSDP does not see to it."""
        import torch

        asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
        if self.device is None or sharded(model):
            return None
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(asked)

    # -- the model --------------------------------------------------------------------------

    def place(self, model: nn.Module, make: Callable[[], Optimizer]) -> Optimizer:
        """Shard the model if the launcher asks for FSDP2, else put it on this process's device.

        Returns the optimiser that `make` makes of what trains then.
        """
        fsdp = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
        if self.size == 1 and not fsdp:
            return make()
        if self.device is not None and not sharded(model):
            if fsdp:
                from accelerate import Accelerator
                from accelerate.utils import DistributedType

                accelerator = Accelerator()
                if accelerator.distributed_type == DistributedType.FSDP:
                    if not accelerator.is_fsdp2:
                        raise AttachError(
                            "the launcher asks for FSDP 1, which flattens parameters and knows no "
                            "frozen ones among them",
                            "accelerate launch --use_fsdp --fsdp_version 2",
                        )
                    return _prepared(accelerator, model, make())
            model.to(self.device)
        return make()

    def together(self, model: nn.Module, loss: Callable[..., Tensor]) -> nn.Module:
        """A module whose call is the loss, and whose backward pass leaves the mean gradient everywhere."""
        step = _loss_module(model, loss)
        if self.size == 1 or sharded(model):
            return step
        from torch.nn.parallel import DistributedDataParallel

        # the loss may pass by some adapters (a tower it does not use), in each step others
        return DistributedDataParallel(step, broadcast_buffers=False, find_unused_parameters=True)


def reshard(model: nn.Module) -> None:
    """Divide again what a forward pass without a backward pass left gathered."""
    if "torch.distributed.fsdp" not in sys.modules:
        return
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def sharded(model: nn.Module) -> bool:
    """Whether FSDP2 has sharded the tensors that train.

    Raises `AttachError` where it has sharded the backbone only: the adapters came after it.
    """
    if "torch.distributed.tensor" not in sys.modules:
        return False
    from torch.distributed.tensor import DTensor

    from mmadapt.core.bank import backbone_parameters

    kinds = {isinstance(p, DTensor) for p in model.parameters() if p.requires_grad}
    if kinds == {True}:
        return True
    if True in kinds or any(isinstance(p, DTensor) for _, p in backbone_parameters(model)):
        raise AttachError(
            "the backbone is sharded and (part of) what trains is not, so gradients would differ "
            "between processes",
            "attach first, then fully_shard(model)",
        )
    return False


def holding_back(step: nn.Module, model: nn.Module, last: bool) -> AbstractContextManager[Any]:
    """While gradients accumulate, processes exchange them with the last batch only."""
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(last)  # type: ignore[operator]
        return nullcontext()
    if hasattr(step, "no_sync") and not last:
        return step.no_sync()  # type: ignore[operator]
    return nullcontext()


def whole(tensor: Any) -> Any:
    """A sharded tensor gathered from all processes, any other as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def like(value: Tensor, tensor: Any) -> Tensor:
    """A whole tensor divided as `tensor` is."""
    if not hasattr(tensor, "full_tensor"):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(tensor.device), tensor.device_mesh, tensor.placements)


def _prepared(accelerator: Any, model: nn.Module, optimiser: Optimizer) -> Optimizer:
    from torch.distributed.fsdp import register_fsdp_forward_method

    _, wrapped = accelerator.prepare(model, optimiser)
    for name in _FORWARDS:
        if callable(getattr(model, name, None)):
            register_fsdp_forward_method(model, name)
    return wrapped.optimizer


def _loss_module(model: nn.Module, loss: Callable[..., Tensor]) -> nn.Module:
    from torch import nn

    class Loss(nn.Module):
        """Calls the loss, so that wrappers meet all of it and the loss meets the bare model."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, batch: Any) -> Any:
            return loss(self.model, batch)

    return Loss()
