"""Every method on the same shots, in one table."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from mmadapt.core.backbone import Backbone
from mmadapt.core.table import Table, count, line
from mmadapt.errors import DataError, did_you_mean
from mmadapt.tasks.few_shot.classifier import as_backbone, zero_shot
from mmadapt.tasks.few_shot.data import Augment, Labelled, sample, vary
from mmadapt.tasks.few_shot.features import embed, features
from mmadapt.tasks.few_shot.methods import METHODS, Outcome, Problem
from mmadapt.tasks.few_shot.score import Score, score

_COLUMNS = (
    "shots",
    "method",
    "accuracy %",
    "95 %",
    "trained",
    "seconds",
    "source on",
    "source off",
)
_WIDTHS = (5, 20, 12, 13, 8, 7, 9, 10)
_RIGHT = (True, False, True, True, True, True, True, True)


@dataclass(frozen=True)
class Result:
    """One method at one number of shots, over all seeds."""

    shots: int
    method: str
    outcomes: tuple[Outcome, ...]

    @property
    def accuracies(self) -> list[float]:
        """Test accuracy of each seed."""
        return [outcome.test.accuracy for outcome in self.outcomes]

    @property
    def accuracy(self) -> float:
        """Mean test accuracy over seeds."""
        return statistics.fmean(self.accuracies)

    @property
    def spread(self) -> float:
        """Sample standard deviation over seeds; 0 with one seed."""
        return statistics.stdev(self.accuracies) if len(self.outcomes) > 1 else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of one seed's test size, around the mean."""
        total = self.outcomes[0].test.total
        return Score(round(self.accuracy * total), total).interval

    def source(self, which: str) -> float | None:
        """Mean source accuracy with the adaptation "on" or "off"."""
        scores = [getattr(outcome, f"source_{which}") for outcome in self.outcomes]
        found = [item.accuracy for item in scores if item is not None]
        return statistics.fmean(found) if found else None

    def row(self, original: float | None) -> tuple[Any, ...]:
        """The result as a row of the table; an untouched backbone keeps the original's number."""
        first, (low, high) = self.outcomes[0], self.interval
        spread = f" ± {100 * self.spread:.1f}" if len(self.outcomes) > 1 else ""
        on = original if first.untouched else self.source("on")
        off = original if first.untouched else self.source("off")
        return (
            self.shots,
            self.method,
            f"{100 * self.accuracy:.1f}{spread}",
            f"{100 * low:.1f}–{100 * high:.1f}",
            count(first.parameters) if first.parameters else "0",
            f"{statistics.fmean(o.seconds for o in self.outcomes):.1f}",
            _percent(on),
            _percent(off),
        )


@dataclass
class Comparison:
    """All results, as a table, as records, and as a picture."""

    results: list[Result] = field(default_factory=list)
    original: float | None = None
    seeds: tuple[int, ...] = ()
    test_images: int = 0

    @property
    def table(self) -> Table:
        """One row a method and number of shots."""
        table = Table(_COLUMNS, [result.row(self.original) for result in self.results])
        table.title = (
            f"few-shot: {self.test_images} test images, seeds {', '.join(map(str, self.seeds))}"
        )
        table.notes = [
            "accuracy: mean over seeds ± standard deviation; 95 %: Wilson interval of the test size",
            "source: zero-shot accuracy on what the backbone was trained for, adaptation on and off "
            "(full fine-tuning has no off)",
        ]
        return table

    def find(self, method: str, shots: int) -> Result:
        """The result of one method at one number of shots."""
        for result in self.results:
            if (result.method, result.shots) == (method, shots):
                return result
        raise DataError(
            f"no result for {method!r} at {shots} shots",
            did_you_mean(method, {result.method for result in self.results}),
        )

    def to_json(self) -> dict[str, Any]:
        """Plain numbers: what a committed result file holds."""
        return {
            "seeds": list(self.seeds),
            "test_images": self.test_images,
            "source_original": self.original,
            "results": [
                {
                    "shots": result.shots,
                    "method": result.method,
                    "accuracy": [round(value, 4) for value in result.accuracies],
                    "parameters": result.outcomes[0].parameters,
                    "seconds": [round(outcome.seconds, 2) for outcome in result.outcomes],
                    "source_on": result.source("on"),
                    "source_off": result.source("off"),
                }
                for result in self.results
            ],
        }

    def plot(self) -> Any:
        """A matplotlib figure: accuracy over shots with a line a method, or bars at one number."""
        from mmadapt.tasks.few_shot.figure import accuracy_figure

        return accuracy_figure(self)

    def __repr__(self) -> str:
        return str(self.table)

    def _repr_html_(self) -> str:
        return self.table._repr_html_()


@dataclass(frozen=True, eq=False)
class Source:
    """What the backbone was trained for: labelled images, and the templates of its class names."""

    data: Labelled
    templates: tuple[str, ...]


def compare(
    m: Backbone,
    train: Labelled,
    test: Labelled,
    *,
    templates: Sequence[str] = ("a photo of a {}",),
    shots: Sequence[int] = (4,),
    seeds: Sequence[int] = (1, 2, 3),
    methods: Sequence[str] | Mapping[str, Callable[[Problem], Outcome]] | None = None,
    source: Source | None = None,
    augment: Augment | None = None,
    views: int = 16,
    steps: int = 200,
    show: Callable[[str], None] | None = print,
    progress: bool = False,
) -> Comparison:
    """Run methods on the same shots and test images; `show` gets a line as each is done.

    `augment` takes uint8 images (N, H, W, 3) and a seed and returns variations of them; every method
    but the raw pixels then learns from the shots and `views` − 1 variations of each. `steps` is the
    length of training inside the image tower. Hyper-parameters are chosen on validation images
    drawn beside the shots, never on `test`. The backbone is left as it came. Raises `DataError` before anything runs when a class has too few
    images, a method is unknown, or train and test name other classes.
    """
    backbone = as_backbone(m)
    chosen = _chosen(methods)
    if train.names != test.names:
        raise DataError(f"train and test name other classes: {train.names} and {test.names}")
    draws = {(k, seed): sample(train, k, seed) for k in shots for seed in seeds}
    classifier = zero_shot(backbone, train.names, templates)
    source_head = zero_shot(backbone, source.data.names, source.templates) if source else None

    def source_score(adapted_backbone: Backbone) -> Score | None:
        if source is None or source_head is None:
            return None
        with torch.no_grad():
            logits = source_head(embed(adapted_backbone, source.data.images))
        return score(logits, torch.from_numpy(source.data.labels))

    original = source_score(backbone)
    comparison = Comparison([], original.accuracy if original else None, tuple(seeds), len(test))
    test_features = features(backbone, test.images)
    if show:
        show(line(_COLUMNS, _WIDTHS, _RIGHT))
    for k in shots:
        problems = []
        for seed in seeds:
            support, validation = draws[k, seed]
            varied = vary(support, augment, views, seed) if augment else support
            problems.append(
                Problem(
                    backbone,
                    classifier,
                    support,
                    validation,
                    test,
                    seed,
                    varied,
                    features(backbone, varied.images),
                    features(backbone, support.images),
                    features(backbone, validation.images),
                    test_features,
                    source_score,
                    progress,
                    steps,
                )
            )
        for name, method in chosen.items():
            result = Result(k, name, tuple(method(problem) for problem in problems))
            comparison.results.append(result)
            if show:
                row = result.row(comparison.original)
                show(line([str(cell) for cell in row], _WIDTHS, _RIGHT))
    return comparison


def _chosen(methods: Any) -> dict[str, Callable[[Problem], Outcome]]:
    if methods is None:
        return dict(METHODS)
    if isinstance(methods, Mapping):
        return dict(methods)
    for name in methods:
        if name not in METHODS:
            raise DataError(f"unknown method {name!r}", did_you_mean(str(name), METHODS))
    return {name: METHODS[name] for name in methods}


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"
