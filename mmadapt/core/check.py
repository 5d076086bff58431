"""Checks on demand: does the attachment really act and train, does a method keep the laws?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mmadapt.core.attached import require_bank
from mmadapt.core.table import Table
from mmadapt.errors import CheckError

if TYPE_CHECKING:
    from torch import Tensor

    from mmadapt.adapter import Adapter


def check(m: Any, batch: Any) -> Table:
    """Run one forward and one backward pass and verify what is active.

    Every active site fires, every adapter tensor is reached by the gradient, no backbone tensor is.
    `batch` is what the model takes: a tensor, a tuple of arguments, or a dictionary of keywords.
    Flags, gradients and the random state are left as they were. Raises `CheckError`, else returns
    one row per site; "zero" is a gradient that is exactly zero, as it is for one of two factors at
    an identity start.
    """
    import torch

    model, bank = require_bank(m)
    if not bank.active.names:
        raise CheckError(
            "no attachment is active", f"set_active(model, {next(iter(bank.records))!r})"
        )
    leaking = [name for name, p in _backbone(model) if p.requires_grad]
    if leaking:
        raise CheckError(
            f"{len(leaking)} backbone tensors require a gradient, first {leaking[0]!r}",
            "freeze them: model.get_parameter(name).requires_grad_(False)",
        )
    hooks = [hook for hook in bank.hooks.values() if hook.plan]
    fired = {hook.site.name: hook.fired for hook in hooks}
    for hook in hooks:
        hook.fired = False
    tensors = [(key, name, p) for key, name, p in _adaptertensors_in(bank)]
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]), torch.enable_grad():
        loss = total(call(model, outside_inference(batch)))
        silent = [hook.site.name for hook in hooks if not hook.fired]
        for hook in hooks:
            hook.fired = hook.fired or fired[hook.site.name]
        if silent:
            raise CheckError(
                f"{len(silent)} sites did not fire: {', '.join(silent[:6])}",
                "the batch does not reach them, or their modules are never called",
            )
        gradients = (
            torch.autograd.grad(loss, [p for *_, p in tensors], allow_unused=True)
            if tensors and loss.requires_grad
            else [None] * len(tensors)
        )
    rows: dict[str, list[str]] = {}
    unreached = []
    for (key, name, _), gradient in zip(tensors, gradients, strict=True):
        if gradient is None:
            unreached.append(f"{key}.{name}")
            continue
        size = float(gradient.abs().max())
        rows.setdefault(key, []).append(f"{name} {size:.2g}" if size else f"{name} zero")
    if unreached:
        raise CheckError(
            f"{len(unreached)} adapter tensors get no gradient, first {unreached[0]!r}",
            "the output does not depend on them",
        )
    table = Table(("site", "fired", "largest gradient"))
    table.rows = [(key.partition("/")[2], True, "  ".join(parts)) for key, parts in rows.items()]
    seen = {key.partition("/")[2] for key in rows}
    table.rows += [
        (hook.site.name, True, "nothing to train") for hook in hooks if hook.site.name not in seen
    ]
    table.title = f"{len(hooks)} sites fire, {len(tensors)} tensors train, the backbone does not"
    return table


def check_laws(
    m: Any, adapter: Adapter, batch: Any, at: str | Sequence[str] | None = None
) -> Table:
    """Verify on copies of a model that an adapter keeps the laws; one row a law.

    `batch` is what the model takes, as in `check`: a tensor, a tuple of arguments or a dictionary of
    keywords, with at least two rows. Take a small model of the class that is meant: some ten copies
    are made of it, in eval mode and without what may be attached to it; `m` itself is not touched.
    Raises `CheckError` that names every law that does not hold, and what was seen instead.

        clip = mm.load("tiny/clip")
        mm.check_laws(clip, mm.Bottleneck(4), torch.randn(3, 3, 32, 32), at="vision.layers[*].mlp")
    """
    from mmadapt.core.laws import verify

    return verify(m, adapter, batch, at)


def _backbone(model: Any):
    from mmadapt.core.bank import backbone_parameters

    return backbone_parameters(model)


def _adaptertensors_in(bank: Any):
    for name in bank.active.names:
        for key, layer in bank.tensors_of(name):
            for tensor, parameter in layer.named_parameters():
                yield key, tensor, parameter


def outside_inference(batch: Any) -> Any:
    """`batch` with copies of the tensors that inference mode made, which no graph may hold."""
    import torch
    from torch.utils import _pytree

    def plain(value: Any) -> Any:
        inference = isinstance(value, torch.Tensor) and value.is_inference()
        return value.clone() if inference else value

    return _pytree.tree_map(plain, batch)


def call(model: Any, batch: Any) -> Any:
    """The model called with a batch: a dictionary of keywords, a tuple of arguments, or one argument."""
    if isinstance(batch, dict) or hasattr(batch, "keys"):
        return model(**batch)
    if isinstance(batch, (tuple, list)):
        return model(*batch)
    return model(batch)


def total(output: Any) -> Tensor:
    """A scalar that depends on every floating tensor of the output, normalised ones too."""
    import torch

    parts = [
        (t.float().flatten() * torch.arange(t.numel(), device=t.device).cos()).sum()
        for t in tensors_in(output)
        if t.is_floating_point()
    ]
    if not parts:
        raise CheckError("the model returned no floating-point tensor to differentiate")
    return torch.stack(parts).sum()


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested mappings, tuples and lists, in order."""
    from torch import Tensor

    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
