"""What has been done to a backbone before it came: quantised, sharded or offloaded weights.

Ports that meet a module's call work with all of them. Weights can be replaced and merged into only
where they are plain tensors in memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Iterator


def why_not_plain(weight: Tensor) -> str:
    """ "" for a plain tensor in memory, else what it is instead."""
    if weight.device.type == "meta":
        return "its values are offloaded or were never loaded"
    kind = type(weight)
    if kind in (Tensor, nn.Parameter):
        return "" if weight.is_floating_point() else f"it holds packed {weight.dtype} values"
    if kind.__name__ == "DTensor":
        return "it is sharded over processes"
    return f"it is quantised ({kind.__name__})"


def execution_device(weight: Tensor, *modules: nn.Module | None) -> torch.device:
    """Where a site computes: its weight's device, or for offloaded weights what accelerate says."""
    if weight.device.type != "meta":
        return weight.device
    return next(_announced(modules), weight.device)


def _announced(modules: tuple[nn.Module | None, ...]) -> Iterator[torch.device]:
    for top in modules:
        for module in () if top is None else top.modules():
            device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
            if device is not None:
                yield torch.device(device)
