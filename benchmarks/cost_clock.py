"""How `cost.py` measures: CPU time of one thread in interleaved rounds, and bytes kept for backward."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


def quartiles(values: Iterable[float]) -> list[float]:
    """[first quartile, median, third quartile], four digits each."""
    kept = sorted(values)
    found = statistics.quantiles(kept, n=4, method="inclusive") if len(kept) > 1 else kept * 3
    return [float(f"{value:.4g}") for value in found]


def interleaved(
    calls: dict[str, Callable[[], Any]], rounds: int, repeat: int, warm: bool = True
) -> dict[str, list[float]]:
    """CPU milliseconds a call of every case, one number a round: the median of `repeat` calls.

    Every round meets all cases, so that what else the machine does falls on all alike; the order is
    rotated. `warm` calls once more, untimed, before each timing.
    """
    names = list(calls)
    for call in calls.values():
        call()
    found: dict[str, list[float]] = {name: [] for name in names}
    gc.disable()
    try:
        for turn in range(rounds):
            gc.collect()
            at = turn % len(names)
            for name in names[at:] + names[:at]:
                call = calls[name]
                if warm:
                    call()
                several = []
                for _ in range(repeat):
                    start = time.process_time()
                    call()
                    several.append(1000 * (time.process_time() - start))
                found[name].append(statistics.median(several))
    finally:
        gc.enable()
    return found


def ratios(times: list[float], base: list[float]) -> list[float]:
    """Each round's time by the bare backbone's in the same round."""
    return [own / bare for own, bare in zip(times, base, strict=True)]


@contextmanager
def saved_bytes(model: torch.nn.Module) -> Iterator[list[int]]:
    """Bytes that the graph built inside keeps for backward, in the list's only element.

    Every storage counts once, whatever views of it are saved; the model's own tensors do not count.
    """
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}
    total = [0]

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield total
    total[0] = sum(kept.values())


def peak_increase(step: Callable[[], Any]) -> int | None:
    """Bytes by which the resident memory rises during `step`; None where Linux does not tell."""
    clear = Path("/proc/self/clear_refs")
    if not clear.exists():
        return None
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # else memory freed before serves, and nothing rises
    clear.write_text("5")
    before = _status("VmRSS")
    step()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise LookupError(f"/proc/self/status has no {field}")
