"""What was heard in one clip, as a value that can be heard and seen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy

from mmadapt.core.table import Table
from mmadapt.tasks.audio.clip import Audio


@dataclass(frozen=True, eq=False)
class Tags:
    """Probabilities of a clip (K,), and of each window in it (W, K), `seconds` long from `starts`."""

    clip: Audio
    names: tuple[str, ...]
    probabilities: numpy.ndarray
    starts: tuple[float, ...]
    seconds: float
    each: numpy.ndarray

    @property
    def best(self) -> str:
        """The most likely class."""
        return self.names[int(self.probabilities.argmax())]

    def over(self, threshold: float = 0.5) -> list[str]:
        """Every class that is more likely than `threshold`, the likeliest first."""
        order = numpy.argsort(-self.probabilities)
        return [self.names[k] for k in order if self.probabilities[k] > threshold]

    def top(self, count: int = 5) -> Table:
        """The likeliest classes, and the window in which each is likeliest."""
        table = Table(("class", "probability", "likeliest at"))
        for k in numpy.argsort(-self.probabilities)[:count]:
            at = self.starts[int(self.each[:, k].argmax())]
            where = f"{at:.2f}–{at + self.seconds:.2f} s"
            table.rows.append((self.names[k], float(self.probabilities[k]), where))
        return table

    def figure(self, count: int = 6) -> Any:
        """The wave over the probabilities of the likeliest classes along time, as a matplotlib figure."""
        from mmadapt.tasks.tagging.figure import timeline

        return timeline(self, count)

    def __repr__(self) -> str:
        windows = f", {len(self.starts)} windows" if len(self.starts) > 1 else ""
        found = ", ".join(
            f"{self.names[k]} {self.probabilities[k]:.2f}"
            for k in numpy.argsort(-self.probabilities)[:3]
        )
        return f"{found} ({self.clip.seconds:.2f} s{windows})"

    def _repr_html_(self) -> str:
        return self.clip._repr_html_() + self.top()._repr_html_()
