"""Where a run's numbers go while it runs."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mmadapt.errors import DataError

#: called after each step: steps made so far, and numbers by name
Log = Callable[[int, Mapping[str, float]], object]


def logger(log: Any, made: int) -> Log:
    """A function from a path (CSV), a TensorBoard-like writer, a function, or None.

    `made` steps lie behind a resumed run; lines of a CSV file beyond them are dropped.
    """
    if log is None:
        return lambda step, values: None
    if isinstance(log, (str, Path)):
        return CsvLog(Path(log).expanduser(), made)
    add = getattr(log, "add_scalar", None)
    if callable(add):
        return lambda step, values: (
            [add(name, value, step) for name, value in values.items()] and None
        )
    if callable(log):
        return log
    raise DataError(
        f"log is a {type(log).__name__}, expected a path, a writer with add_scalar or a function",
        "log='run.csv', or log=torch.utils.tensorboard.SummaryWriter(), or log=f with "
        "f(step, values)",
    )


class CsvLog:
    """Appends "step,name,value" lines, so that a name may come up at any time."""

    def __init__(self, path: Path, made: int) -> None:
        self.path = path
        lines = [["step", "name", "value"]]
        if made and path.is_file():
            with path.open(newline="") as file:
                lines += [line for line in list(csv.reader(file))[1:] if int(line[0]) <= made]
        path.parent.mkdir(parents=True, exist_ok=True)
        self._write("w", lines)

    def __call__(self, step: int, values: Mapping[str, float]) -> None:
        self._write("a", [[step, name, value] for name, value in values.items()])

    def _write(self, mode: str, lines: list[list[Any]]) -> None:
        with self.path.open(mode, newline="") as file:
            csv.writer(file).writerows(lines)
