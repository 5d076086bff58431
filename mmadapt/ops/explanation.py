"""Which path a bottleneck takes, and why, for reading."""

from __future__ import annotations

import html
from dataclasses import dataclass, field

import torch

from mmadapt.ops import choice
from mmadapt.ops.choice import REASONS, Case, choose, name, thresholds_on, unfit, unfit_for_cuda


@dataclass(frozen=True)
class Explanation:
    """Which path a bottleneck takes and why; a table in a notebook, lines elsewhere."""

    path: str
    why: str
    facts: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        width = max(map(len, self.facts))
        lines = [f"  {name.ljust(width)}  {value}" for name, value in self.facts.items()]
        return "\n".join([f"{self.path}: {self.why}", *lines])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{html.escape(name)}</td><td>{html.escape(value)}</td></tr>"
            for name, value in self.facts.items()
        )
        said = f"<b>{html.escape(self.path)}</b>: {html.escape(self.why)}"
        return f"<div>{said}</div><table>{rows}</table>"


def explain(
    tokens: int,
    channels: int,
    width: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    norm: bool = False,
    activation: str = "gelu",
    training: bool = True,
    channels_in: int | None = None,
) -> Explanation:
    """Which path a bottleneck of `channels` → `width` → `channels` over `tokens` takes, and why.

    `dtype` is that of the hidden states. `channels_in` differs where a parallel bottleneck reads
    other channels than it writes.
    """
    place = torch.device(device)
    case = Case(
        tokens=tokens,
        channels_in=channels_in or channels,
        channels=channels,
        width=width,
        dtype=dtype,
        operands=dtype,
        device=place,
        norm=norm,
        activation=activation,
        training=training,
    )
    chosen, against, limits = choose(case), unfit(case), thresholds_on(place)
    moved = tokens * (case.channels_in + channels) * dtype.itemsize
    work = 2 * tokens * width * (case.channels_in + channels)
    against_cuda = unfit_for_cuda(case)
    facts = {
        "x": f"{name(dtype)}[{tokens:,}, {case.channels_in:,}] on {place}",
        "bottleneck": f"{case.channels_in:,} → {width} → {channels:,}, {activation}"
        + (", norm" if norm else ""),
        "forced": choice.FORCED or "no",
        "Triton here": REASONS[against](case) if against else "fits",
        "CUDA here": REASONS[against_cuda](case) if against_cuda else "fits, forward",
        "thresholds": limits.measured if limits else "unmeasured on this device",
        "forward": f"{moved / 1e6:.1f} MB at least, {work / 1e9:.2g} GFLOP",
    }
    return Explanation(chosen.path, chosen.why(case), facts)
