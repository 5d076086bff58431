"""What a forward pass keeps for its backward pass, counted before a device runs out of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def kept_for_backward(model: nn.Module, call: Callable[[], Any]) -> int:
    """Bytes that the graph built by `call()` keeps for backward, beside the model's own tensors.

    Every storage counts once, whatever views of it are kept; a checkpointed region counts with what
    enters it. Under torch's `FakeTensorMode` nothing is computed and nothing allocated, and the
    number is the same:

        with FakeTensorMode():
            model = build()
            mm.attach(model, mm.LoRA(8))
            kept_for_backward(model, lambda: model(torch.empty(1, 3, 1024, 1024)))
    """
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, Any] = {}  # held, so that no address is given out twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()
    del result
    return sum(storage.nbytes() for storage in kept.values())
