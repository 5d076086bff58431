"""Looking at the model while it trains, and stopping when it gets no better."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmadapt.errors import DataError
from mmadapt.train.flags import eval_mode
from mmadapt.train.processes import reshard

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mmadapt.train.history import History
    from mmadapt.train.processes import Processes


@dataclass(frozen=True)
class Evaluation:
    """A function of the model, called every so many steps and after the last.

    `function(model)` returns a number, or several by name of which the first is watched; it runs in
    eval mode, without gradients, and draws from a random state of its own. With `patience`, training
    stops after so many evaluations without improvement, and the best adapter seen is what remains.
    `higher` tells whether more is better.

        mm.Evaluation(lambda model: accuracy(model, held_out), every=20, patience=5)
    """

    function: Callable[[Any], float | Mapping[str, float]]
    every: int = 50
    patience: int | None = None
    higher: bool = True

    def __post_init__(self) -> None:
        for name, value in (("every", self.every), ("patience", self.patience)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise DataError(f"{name} is {value!r}, expected a whole number of at least 1")


class Watch:
    """Carries out an `Evaluation`: records values, keeps the best tensors, says when to stop."""

    def __init__(
        self, evaluation: Evaluation, trained: Mapping[str, Tensor], processes: Processes
    ) -> None:
        self.evaluation = evaluation
        self.trained = trained
        self.processes = processes
        self.since = 0
        self.value = -math.inf
        self.best: dict[str, Tensor] = {}

    def look(self, model: nn.Module, history: History) -> dict[str, float]:
        """Evaluate now; several processes take the mean of their values."""
        with eval_mode(model):
            found = self.evaluation.function(model)
        reshard(model)
        named = found if isinstance(found, Mapping) else {"value": found}
        try:
            values = {str(name): self.processes.mean(float(value)) for name, value in named.items()}
        except (TypeError, ValueError) as error:
            raise DataError(
                f"the evaluation returned {found!r:.80}, expected a number or numbers by name: {error}"
            ) from None
        if not values:
            raise DataError("the evaluation returned no value", "return a number, or some by name")
        history.evaluations.append((len(history.losses), values))
        first = next(iter(values.values()))
        score = first if self.evaluation.higher else -first
        self.since += 1
        if score > self.value:  # never true of NaN
            self.value, self.since, history.best = score, 0, len(history.losses)
            if self.evaluation.patience is not None:
                self.best = {name: t.detach().clone() for name, t in self.trained.items()}
        return values

    @property
    def done(self) -> bool:
        """Whether patience is at its end."""
        return self.evaluation.patience is not None and self.since >= self.evaluation.patience

    def bring_back(self) -> None:
        """Give the trained tensors the values that were best."""
        import torch

        with torch.no_grad():
            for name, value in self.best.items():
                self.trained[name].copy_(value)
