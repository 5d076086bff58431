"""A small training run, as several files of tests need one."""

from __future__ import annotations

from typing import Any

import torch
from handmade import hidden, small
from torch import Tensor
from torch.nn import functional as F

import mmadapt as mm

TARGETS = torch.randn(8, 5, 4, generator=torch.Generator().manual_seed(4))
INPUTS = hidden(8)


def adapted(adapter: Any = None) -> tuple[mm.Backbone, Any]:
    """A small backbone with an adapter in each block."""
    backbone = small()
    adapter = mm.Bottleneck(4) if adapter is None else adapter
    return backbone, mm.attach(backbone, adapter, at="layers[*].mlp")


def distance(model: Any, batch: Any) -> Tensor:
    inputs, targets = batch
    return F.mse_loss(model(inputs), targets)


def at_call(number: int, act: Any) -> Any:
    """The loss, with something happening in the given call, counted from 1."""
    calls: list[int] = []

    def loss(model: Any, batch: Any) -> Tensor:
        calls.append(1)
        value = distance(model, batch)
        return act(value) if len(calls) == number else value

    return loss


def interrupt(value: Tensor) -> Tensor:
    raise KeyboardInterrupt


def copies(attachment: Any) -> tuple[Tensor, ...]:
    return tuple(p.detach().clone() for p in attachment.parameters())


def fit(m: Any, data: Any = None, **options: Any) -> mm.History:
    data = (INPUTS, TARGETS) if data is None else data
    defaults = {"loss": distance, "steps": 5, "batch_size": 4, "progress": False}
    return mm.fit(m, data, **{**defaults, **options})


def pictures(**options: Any) -> Any:
    """transformers' image classifier for images (B, 3, 8, 8) in three classes."""
    import transformers

    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=8,
        patch_size=4,
        num_labels=3,
        **options,
    )
    return transformers.ViTForImageClassification(config)
