"""How `cost.py` measures: CPU time of one thread in interleaved rounds, and resident memory."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any


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
