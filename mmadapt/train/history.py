"""What a training run did."""

from __future__ import annotations

import csv
import html
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mmadapt.core.figure import GREY, drawn, new_figure
from mmadapt.core.svg import curve_svg
from mmadapt.core.table import Table


@dataclass
class History:
    """The loss, rate and gradient norm of every step made, evaluations by step, and how it ended.

    `steps` were asked for; `seconds` include runs that this one resumed. `evaluations` holds (steps
    made, {name: value}). `best` is the number of steps after which the watched value was best.
    `plot()`, `table()` and `to_csv(path)` show it all.
    """

    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    steps: int = 0
    parameters: int = 0
    interrupted: bool = False
    stopped: bool = False
    rates: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    evaluations: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    best: int | None = None
    notes: list[str] = field(default_factory=list)

    def table(self, rows: int = 10) -> Table:
        """Mean loss, last rate and last evaluation of `rows` stretches of equal length."""
        names = list(dict.fromkeys(name for _, found in self.evaluations for name in found))
        table = Table(("steps", "loss", "rate", *names), title=repr(self), notes=list(self.notes))
        length = max(1, -(-len(self.losses) // rows))
        for start in range(0, len(self.losses), length):
            part = self.losses[start : start + length]
            end = start + len(part)
            inside = [found for step, found in self.evaluations if start < step <= end]
            last = inside[-1] if inside else {}
            cells = [sum(part) / len(part), self.rates[end - 1], *(last.get(n) for n in names)]
            table.rows.append((f"{start + 1}–{end}", *cells))
        return table

    @drawn
    def plot(self) -> Any:
        """A matplotlib figure: the loss of each step, and every evaluated value below it."""
        names = list(dict.fromkeys(name for _, found in self.evaluations for name in found))
        figure = new_figure(7.5, 2.6 * (1 + bool(names)))
        axes = figure.subplots(1 + bool(names), sharex=True, squeeze=False)[:, 0]
        axes[0].plot(range(1, len(self.losses) + 1), self.losses)
        axes[0].set_ylabel("loss")
        for name in names:
            points = [(step, found[name]) for step, found in self.evaluations if name in found]
            axes[1].plot(*zip(*points, strict=True), marker=".", label=name)
        if names:
            axes[1].legend()
        if self.best is not None:
            axes[-1].axvline(self.best, color=GREY, linewidth=0.8, linestyle=":")
        axes[-1].set_xlabel("step")
        return figure

    def to_csv(self, path: str | Path) -> Path:
        """Write one line a step (step, loss, rate, norm, evaluated values) and return the path."""
        path = Path(path).expanduser()
        found = dict(self.evaluations)
        names = list(dict.fromkeys(name for values in found.values() for name in values))
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["step", "loss", "rate", "norm", *names])
            for step, row in enumerate(zip(self.losses, self.rates, self.norms, strict=True), 1):
                values = found.get(step, {})
                writer.writerow([step, *row, *(values.get(name, "") for name in names)])
        return path

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers, texts, lists and dictionaries."""
        return asdict(self)

    def __repr__(self) -> str:
        if not self.losses:
            return "History(no step was made)"
        made = len(self.losses)
        tail = self.losses[-max(1, made // 10) :]
        state = "finished"
        if self.interrupted:
            state = f"interrupted after {made} of"
        elif self.stopped:
            state = f"stopped early after {made} of"
        best = "" if self.best is None else f", best after {self.best}"
        return (
            f"History({state} {self.steps} steps, {self.parameters:,} parameters, loss "
            f"{self.losses[0]:.4g} → {sum(tail) / len(tail):.4g}{best}, {self.seconds:.1f} s)"
        )

    def _repr_html_(self) -> str:
        last = [
            f"{name} {value:.4g}" for name, value in (self.evaluations or [(0, {})])[-1][1].items()
        ]
        lines = [
            repr(self),
            *([f"last evaluation: {', '.join(last)}"] if last else []),
            *self.notes,
        ]
        said = "".join(f"<div><code>{html.escape(text)}</code></div>" for text in lines)
        return curve_svg(self.losses) + said
