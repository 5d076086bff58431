"""Train and eval flags: the backbone evaluates, the active adapters train."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any

from mmadapt.core.backbone import unwrap_model

if TYPE_CHECKING:
    from torch import nn


class train_mode:
    """The right flags for a plain loop: backbone in eval mode, active adapters in train mode.

    Acts when called; as a context manager it gives the flags back, and meanwhile holds them against
    loops that call `model.train()` before each step, as transformers' Trainer does. `model.eval()`
    is respected. A model without attachments is put into train mode whole. Layers of transformers that
    were told to recompute in backward do so, although they evaluate.

        with mm.train_mode(model):
            trainer.train()
    """

    def __init__(self, m: Any) -> None:
        self._model = unwrap_model(m)
        self._before = [(module, module.training) for module in self._model.modules()]
        self._handle: Any = None
        self._set()

    def _set(self) -> None:
        from mmadapt.core.bank import bank_of
        from mmadapt.train.recompute import recompute

        bank = bank_of(self._model)
        if bank is None:
            self._model.train()
            return
        self._model.eval()
        bank.train_only(bank.active.names)
        recompute(self._model)

    def _hold(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if module.training:  # only model.train() puts an adapted root into train mode
            self._set()

    def __enter__(self) -> None:
        from mmadapt.core.bank import bank_of
        from mmadapt.core.compiled import first_before

        if bank_of(self._model) is not None:
            self._handle = first_before(self._model, self._hold)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        from mmadapt.train.recompute import as_before

        if self._handle is not None:
            self._handle.remove()
        as_before(self._model)
        for module, training in self._before:
            module.training = training


class eval_mode:
    """Every module in eval mode inside the block, without gradients, drawing no random numbers.

    The flags and the random state after it are those before it, whatever the block does.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __enter__(self) -> None:
        import torch

        from mmadapt.train.chance import random_state

        self._before = [(module, module.training) for module in self._model.modules()]
        self._random = random_state()
        self._grad = torch.no_grad()
        self._grad.__enter__()
        self._model.eval()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        from mmadapt.train.chance import set_random_state

        self._grad.__exit__(kind, error, trace)
        for module, training in self._before:
            module.training = training
        set_random_state(self._random)
