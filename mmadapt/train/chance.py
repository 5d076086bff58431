"""The random state of a process, as plain numbers and tensors that a file can hold."""

from __future__ import annotations

import random
from typing import Any


def random_state() -> dict[str, Any]:
    """The global states of torch (CPU and every CUDA device in use), numpy and Python."""
    import numpy
    import torch

    state: Any = numpy.random.get_state()
    kind, keys, *rest = state
    version, numbers, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "numpy": [kind, torch.tensor(keys.astype("int64")), *rest],
        "python": [version, torch.tensor(numbers), gauss],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Bring back what `random_state` returned; devices that are not here are passed over."""
    import numpy
    import torch

    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available():
        for device, one in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(one, device)
    kind, keys, *rest = state["numpy"]
    numpy.random.set_state((kind, keys.numpy().astype("uint32"), *rest))
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers.tolist()), gauss))
