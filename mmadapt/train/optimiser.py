"""How the trained numbers change: parameter groups, learning rates over time, clipping."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmadapt.errors import AttachError, DataError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

#: parts of a tensor's name that tell what is not decayed, besides tensors with fewer than two axes
UNDECAYED = {"bias", "norm", "ln", "layernorm", "batchnorm", "gate", "scale", "shift", "gain"}

#: share of the way done -> factor of the rate, after the warm-up
SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)) * 0.99 + 0.01,
    "linear": lambda done: 1 - done,
    "constant": lambda done: 1.0,
}


@dataclass(frozen=True)
class Optimiser:
    """AdamW, or another optimiser, with a schedule of its rates and clipped gradients.

    `weight_decay` acts on matrices and kernels; gates, norms, scales, biases and whatever has fewer
    than two axes are left alone. `schedule` is "cosine" (to a hundredth), "linear" (to zero),
    "constant", or a function of the share of steps done, in [0, 1), that returns a factor of the
    rate; the rate rises over the first `warmup` share of steps. Gradients are clipped to the total
    norm `clip`; None leaves them alone.

    `build` is a function from parameter groups (which hold their decay, and `lr` where `fit` is given
    one) to a `torch.optim.Optimizer`; or an optimiser made after `attach`, whose own groups count.

        mm.Optimiser(build=lambda groups: torch.optim.SGD(groups, lr=0.1), schedule="constant")
    """

    weight_decay: float = 0.01
    schedule: str | Callable[[float], float] = "cosine"
    warmup: float = 0.1
    clip: float | None = 1.0
    build: Callable[[list[dict[str, Any]]], Optimizer] | Optimizer | None = None

    def __post_init__(self) -> None:
        if isinstance(self.schedule, str) and self.schedule not in SCHEDULES:
            raise DataError(
                f"schedule is {self.schedule!r}, expected a function or a known name",
                did_you_mean(self.schedule, SCHEDULES),
            )
        if not 0 <= self.warmup <= 1:
            raise DataError(f"warmup is {self.warmup!r}, expected a share of the steps, 0 to 1")
        if self.clip is not None and not self.clip > 0:
            raise DataError(f"clip is {self.clip!r}, expected a norm above 0, or None")

    def make(self, trained: Mapping[str, Tensor], lr: float | None) -> Optimizer:
        """An optimiser over the tensors that train; every group keeps its full rate as "peak"."""
        from torch.optim import AdamW, Optimizer

        if isinstance(self.build, Optimizer):
            if lr is not None:
                raise DataError(
                    f"lr={lr} was given beside an optimiser that has rates of its own",
                    "set the rate where the optimiser is made, or pass Optimiser(build=a function)",
                )
            optimiser = self.build
        else:
            groups = parameter_groups(trained, self.weight_decay)
            if lr is not None or self.build is None:
                groups = [{**group, "lr": 1e-3 if lr is None else lr} for group in groups]
            optimiser = AdamW(groups) if self.build is None else self.build(groups)
            if not isinstance(optimiser, Optimizer):
                raise DataError(
                    f"build returned {type(optimiser).__name__}, expected a torch.optim.Optimizer"
                )
        require_held(optimiser, trained)
        for group in optimiser.param_groups:
            group.setdefault("peak", float(group["lr"]))
        return optimiser

    def set_rates(self, optimiser: Optimizer, step: int, steps: int) -> float:
        """Give every group its rate for `step` of `steps`; returns the first group's."""
        schedule = SCHEDULES[self.schedule] if isinstance(self.schedule, str) else self.schedule
        rise = max(1.0, self.warmup * steps)
        factor = min(1.0, (step + 1) / rise) * schedule(step / steps)
        for group in optimiser.param_groups:
            group["lr"] = group["peak"] * factor
        return optimiser.param_groups[0]["lr"]


def parameter_groups(trained: Mapping[str, Tensor], weight_decay: float) -> list[dict[str, Any]]:
    """Two groups of named tensors: those that decay, and gates, norms, scales and biases that do not."""
    decayed = [tensor for name, tensor in trained.items() if decays(name, tensor)]
    kept = [tensor for name, tensor in trained.items() if not decays(name, tensor)]
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def decays(name: str, tensor: Tensor) -> bool:
    """Whether weight decay acts on a tensor: by its axes, and by its own and its module's names."""
    if tensor.ndim < 2:
        return False
    words = {word for part in name.split(".")[-2:] for word in part.lower().split("_")}
    return not any(word.rstrip("0123456789") in UNDECAYED for word in words)


def require_held(optimiser: Optimizer, trained: Mapping[str, Tensor]) -> None:
    """Every tensor that trains has to be in the optimiser, or it would silently stay as it is."""
    held = {id(tensor) for group in optimiser.param_groups for tensor in group["params"]}
    absent = [name for name, tensor in trained.items() if id(tensor) not in held]
    if absent:
        raise AttachError(
            f"the optimiser lacks {len(absent)} of the {len(trained)} tensors that train, first "
            f"{absent[0]!r}; it was made before attach, or of another model",
            "make it after attach from attachment.parameters(), or leave it to fit",
        )
