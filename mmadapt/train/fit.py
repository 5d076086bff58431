"""A small training loop for what requires a gradient, and the flags a plain loop needs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any

from mmadapt.core.backbone import unwrap_model
from mmadapt.errors import AttachError, CheckError, DataError
from mmadapt.train.progress import Progress, curve_svg

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class History:
    """What a training run did: the loss of every step, its seconds, and whether it was interrupted."""

    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    steps: int = 0
    parameters: int = 0
    interrupted: bool = False

    def __repr__(self) -> str:
        if not self.losses:
            return "History(no step was made)"
        tail = self.losses[-max(1, len(self.losses) // 10) :]
        state = f"interrupted after {len(self.losses)} of" if self.interrupted else "finished"
        return (
            f"History({state} {self.steps} steps, {self.parameters:,} parameters, loss "
            f"{self.losses[0]:.4g} → {sum(tail) / len(tail):.4g}, {self.seconds:.1f} s)"
        )

    def _repr_html_(self) -> str:
        return f"{curve_svg(self.losses)}<code>{self!r}</code>"


def fit(
    m: Any,
    data: Any,
    *,
    loss: Callable[..., Tensor],
    steps: int = 300,
    lr: float = 1e-3,
    batch_size: int = 32,
    weight_decay: float = 0.01,
    warmup: float = 0.1,
    seed: int = 0,
    progress: bool = True,
    label: str = "fit",
) -> History:
    """Train whatever of `m` requires a gradient: the active adapters, or a whole model.

    `data` is a tensor or a tuple of tensors with one first dimension, from which batches of `batch_size` rows
    are drawn epoch by epoch (shuffled by a private generator), or an iterable of batches, which is
    run through again and again. `loss(model, *batch)` returns a scalar; a batch that is a
    dictionary is passed as one argument. AdamW; the rate rises over the first `warmup` share of
    steps and falls to a hundredth along a cosine; gradients are clipped to norm 1.

    The backbone is in eval mode and the active adapters in train mode meanwhile; all flags are as
    before afterwards. Interrupting the cell keeps what was learned and returns the history so far.
    Raises `CheckError` at a loss that is not finite, before that step changes anything.
    """
    import torch

    model = unwrap_model(m)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise AttachError(
            "nothing to train: no parameter requires a gradient",
            "attach an adapter with trained tensors, or make one active with set_active",
        )
    if not isinstance(steps, int) or steps < 1:
        raise DataError(f"steps is {steps!r}, expected a whole number of at least 1")
    if not isinstance(batch_size, int) or batch_size < 1:
        raise DataError(f"batch_size is {batch_size!r}, expected a whole number of at least 1")
    batches = _batches(data, batch_size, seed)
    optimiser = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
    history = History(steps=steps, parameters=sum(parameter.numel() for parameter in parameters))
    started = time.perf_counter()
    try:
        with train_mode(m), Progress(label, steps, progress) as shown, torch.enable_grad():
            for step, batch in zip(range(steps), batches, strict=False):
                for group in optimiser.param_groups:
                    group["lr"] = lr * _schedule(step, steps, warmup)
                value = loss(model, *batch)
                _check_loss(value, step)
                optimiser.zero_grad(set_to_none=True)
                value.backward()
                norm = float(torch.nn.utils.clip_grad_norm_(parameters, 1.0))
                if not math.isfinite(norm):
                    raise CheckError(
                        f"the gradient's norm is {norm} at step {step}; nothing was changed by this step",
                        "look for a division by zero, or a root or logarithm at zero, in the loss",
                    )
                optimiser.step()
                history.losses.append(float(value.detach()))
                shown.update(step + 1, f"loss {history.losses[-1]:.4g}", history.losses)
    except KeyboardInterrupt:
        history.interrupted = True
    finally:
        optimiser.zero_grad(set_to_none=True)
    history.seconds = time.perf_counter() - started
    return history


def _schedule(step: int, steps: int, warmup: float) -> float:
    rise = max(1.0, warmup * steps)
    return min(1.0, (step + 1) / rise) * (
        0.5 * (1 + math.cos(math.pi * step / steps)) * 0.99 + 0.01
    )


def _check_loss(value: Any, step: int) -> None:
    from torch import Tensor

    if not isinstance(value, Tensor) or value.numel() != 1:
        raise DataError(f"loss returned {type(value).__name__}, expected a tensor with one number")
    if not value.requires_grad:
        raise CheckError(
            "the loss does not depend on anything that trains",
            "mmadapt.check(model, batch) tells which sites fire",
        )
    if not math.isfinite(float(value.detach())):
        raise CheckError(
            f"the loss is {float(value.detach())} at step {step}; nothing was changed by this step",
            "lower lr, or look at the data",
        )


def _batches(data: Any, batch_size: int, seed: int) -> Iterator[tuple]:
    from torch import Tensor

    if isinstance(data, Tensor):
        data = (data,)
    if isinstance(data, tuple) and data and all(isinstance(part, Tensor) for part in data):
        sizes = {part.shape[0] for part in data}
        if len(sizes) != 1 or 0 in sizes:
            raise DataError(f"data tensors have {sorted(sizes)} rows, expected one number above 0")
        return _drawn(tuple(data), batch_size, seed)
    if not isinstance(data, Iterable):
        raise DataError(
            f"data is a {type(data).__name__}, expected tensors or an iterable of batches"
        )
    return _cycled(data)


def _drawn(data: tuple[Tensor, ...], batch_size: int, seed: int) -> Iterator[tuple]:
    import torch

    generator = torch.Generator(device="cpu").manual_seed(seed)
    rows = data[0].shape[0]
    size = min(batch_size, rows)
    while True:
        order = torch.randperm(rows, generator=generator, device="cpu")
        for start in range(0, rows - size + 1, size):
            chosen = order[start : start + size]
            yield tuple(part[chosen.to(part.device)] for part in data)


def _cycled(data: Iterable[Any]) -> Iterator[tuple]:
    while True:
        empty = True
        for batch in data:
            empty = False
            yield tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)
        if empty:
            raise DataError(
                "data ran out of batches",
                "pass a list or a DataLoader, which start over, or fewer steps",
            )


class train_mode:
    """The right flags for a plain loop: backbone in eval mode, active adapters in train mode.

    Acts when called; as a context manager it gives the flags back. A model without attachments is
    put into train mode whole.
    """

    def __init__(self, m: Any) -> None:
        from mmadapt.core.bank import bank_of

        model = unwrap_model(m)
        self._before = [(module, module.training) for module in model.modules()]
        bank = bank_of(model)
        if bank is None:
            model.train()
            return
        model.eval()
        bank.train_only(bank.active.names)

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for module, training in self._before:
            module.training = training
