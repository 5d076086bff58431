"""Few-shot classification over cached embeddings, while sliders are moved."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mmadapt.core.figure import BLUE, GREY, cells, drawn, new_figure
from mmadapt.core.table import Table
from mmadapt.errors import DataError
from mmadapt.ui.base import ipywidgets
from mmadapt.ui.settings import Settings, Value

if TYPE_CHECKING:
    import numpy
    from torch import Tensor

    from mmadapt.core.attachment import Attachment
    from mmadapt.tasks.few_shot.classifier import ZeroShotClassifier
    from mmadapt.tasks.few_shot.score import Score

_RESIDUALS = (0.0, *(round(10 ** (step / 8 - 1), 3) for step in range(25)))
_SHARPNESSES = tuple(round(10 ** (step / 10 - 0.5), 3) for step in range(21))
#: classes of which a confusion matrix is drawn
_MOST = 40


def few_shot(
    features: Tensor,
    labels: Any,
    test_features: Tensor,
    test_labels: Any,
    classifier: ZeroShotClassifier,
    adapter: Attachment | None = None,
    names: Sequence[str] | None = None,
    seed: int = 0,
) -> ShotsView:
    """See what shots, their weight and their sharpness do to the accuracy, in milliseconds a move.

    Embeddings (N, D) and (M, D) are the frozen backbone's (`few_shot.features`), labels (N,) and (M,)
    count the classes of the classifier (`few_shot.zero_shot`). The first ones serve as shots, of which
    `seed` draws the order, the others as test: settings found here by eye are fitted to them, so report
    those that `few_shot.search` finds on validation images. With an `adapter`, an attachment of
    `mm.ClipAdapter`, there is its ratio too. `names` say what the test images are, for the table.

    State is plain data that may be assigned: `shots`, `residual` (α), `sharpness` (β), `ratio`. Read
    `accuracy`, `zero_shot`, `predictions`, `confusion` and `differences`. Raises `DataError` for what does
    not fit; `few_shot.CachedShots` is what computes.

        w = mm.ui.few_shot(train, train_labels, test, test_labels, classifier)
        w.shots, w.residual = 4, 3.0
        w.accuracy
    """
    from mmadapt.tasks.few_shot.cached import CachedShots

    cached = CachedShots(classifier, features, labels, test_features, test_labels, adapter, seed)
    return ShotsView(cached, names)


class ShotsView(Settings):
    """What `mm.ui.few_shot` gives."""

    shots: Value[int] = Value()
    residual: Value[float] = Value()
    sharpness: Value[float] = Value()
    ratio: Value[float] = Value()

    def __init__(self, cached: Any, images: Sequence[str] | None = None) -> None:
        if images is not None and len(images) != len(cached.truth):
            raise DataError(f"there are {len(images)} names for {len(cached.truth)} test images")
        self.cached = cached
        self._images = images or [str(row) for row in range(len(cached.truth))]
        super().__init__(shots=min(4, cached.most), residual=1.0, sharpness=5.5, ratio=0.0)

    def _checked(self, values: dict[str, Any]) -> dict[str, Any]:
        numbers = {name: values[name] for name in ("residual", "sharpness", "ratio")}
        for name, value in numbers.items():
            if not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
                raise DataError(f"{name} is {value!r}, expected a number of at least 0")
        if not isinstance(values["shots"], int):
            raise DataError(f"shots is {values['shots']!r}, expected a whole number")
        return {"shots": values["shots"], **{k: float(v) for k, v in numbers.items()}}

    def _computed(self, values: dict[str, Any]) -> None:
        from mmadapt.tasks.few_shot.score import score

        self.logits: Tensor = self.cached.logits(**values)
        self.accuracy: Score = score(self.logits, self.cached.truth)
        self.zero_shot: Score = score(self.cached.zero_shot, self.cached.truth)

    # -- what can be read ---------------------------------------------------------------------------

    @property
    def predictions(self) -> list[str]:
        """The class of every test image."""
        return [self.cached.names[k] for k in self.logits.argmax(1).tolist()]

    @property
    def confusion(self) -> numpy.ndarray:
        """How many images of each class (rows) were taken for each (columns)."""
        size = len(self.cached.names)
        pairs = self.cached.truth * size + self.logits.argmax(1)
        return pairs.bincount(minlength=size * size).reshape(size, size).numpy()

    @property
    def differences(self) -> Table:
        """Test images whose class is no longer that of zero-shot, the most changed first."""
        before, after = self.cached.zero_shot.softmax(1), self.logits.softmax(1)
        moved = (before.argmax(1) != after.argmax(1)).nonzero().flatten()
        rows = moved[(after - before)[moved].abs().sum(1).argsort(descending=True)].tolist()
        names = self.cached.names
        table = Table(("image", "it is", "zero-shot", "now", "probability"))
        for row in rows:
            truth, old, new = (int(one[row]) for one in (self.cached.truth, before.argmax(1), after.argmax(1)))  # fmt: skip
            better = {True: " ✓", False: ""}
            table.rows.append(
                (self._images[row], names[truth], names[old] + better[old == truth],
                 names[new] + better[new == truth], float(after[row, new]))
            )  # fmt: skip
        table.title = f"{len(rows)} of {len(before)} predictions differ from zero-shot"
        return table

    def over_shots(self) -> list[tuple[int, float]]:
        """(shots, accuracy %) for 0, 1, 2, 4 … shots at the other settings as they are."""
        from mmadapt.tasks.few_shot.score import score

        counts = [0, *(2**k for k in range(20) if 2**k < self.cached.most), self.cached.most]
        found = []
        for count in counts:
            logits = self.cached.logits(**{**self.values, "shots": count})
            found.append((count, 100 * score(logits, self.cached.truth).accuracy))
        return found

    # -- what is shown ------------------------------------------------------------------------------

    def _controls(self) -> dict[str, Any]:
        widgets = ipywidgets()
        wide: Any = {"style": {"description_width": "7em"}, "layout": {"width": "26em"}}

        def steps(label: str, values: Sequence[float]) -> Any:
            options = [(f"{value:.3g}", value) for value in values]
            return widgets.SelectionSlider(options=options, description=label, **wide)

        controls = {
            "shots": widgets.IntSlider(min=0, max=self.cached.most, description="shots", **wide),
            "residual": steps("residual α", _RESIDUALS),
            "sharpness": steps("sharpness β", _SHARPNESSES),
        }
        if self.cached.has_ratio:
            controls["ratio"] = widgets.FloatSlider(
                min=0, max=1, step=0.02, description="ratio", **wide
            )
        return controls

    def _html(self) -> str:
        rows = self.differences
        rows.rows = rows.rows[:8]
        gain = 100 * (self.accuracy.accuracy - self.zero_shot.accuracy)
        said = (
            f'<div style="font-size:1.3em"><b>{100 * self.accuracy.accuracy:.1f} %</b> '
            f"<small>{gain:+.1f} points on zero-shot, {self.zero_shot.total} test images</small></div>"
        )
        small = len(self.cached.names) <= _MOST
        matrix = confusion_html(self.confusion, self.cached.names) if small else ""
        return (
            f'{said}<div style="display:flex;flex-wrap:wrap;gap:2em"><div>{matrix}</div>'
            f"<div>{rows._repr_html_()}</div></div>"
        )

    def _text(self) -> str:
        ratio = f", ratio {self.ratio:g}" if self.cached.has_ratio else ""
        return (
            f"{self.shots} shots, residual {self.residual:g}, sharpness {self.sharpness:g}{ratio}: "
            f"{self.accuracy!r}; zero-shot {self.zero_shot!r}"
        )

    @drawn
    def figure(self) -> Any:
        """Accuracy over shots, beside the confusion matrix where classes are few."""
        small = len(self.cached.names) <= _MOST
        figure = new_figure(9 if small else 4.5, 3.6)
        panels = figure.subplots(1, 1 + small, squeeze=False, width_ratios=(1, 1.2)[: 1 + small])[0]
        curve = self.over_shots()
        places = range(len(curve))
        panels[0].plot(places, [value for _, value in curve], color=BLUE, marker="o", markersize=4)
        panels[0].axhline(curve[0][1], color=GREY, linestyle="--", linewidth=1)
        panels[0].annotate("zero-shot", (places[-1], curve[0][1]), (0, 3), textcoords="offset points", ha="right", color=GREY)  # fmt: skip
        panels[0].set_xticks(places, [str(count) for count, _ in curve])
        panels[0].set_xlabel("shots a class")
        panels[0].set_ylabel("test accuracy %")
        figure.suptitle(self._text(), x=0.01, ha="left")
        if small:
            counts = self.confusion
            share = 100 * counts / counts.sum(1, keepdims=True).clip(1)
            names = list(self.cached.names)
            cells(panels[1], share, names, names, "% of the class", (0, 100), slant=60)
            panels[1].set_xlabel("taken for")
            panels[1].set_ylabel("it was")
        return figure


def confusion_html(counts: Any, names: Sequence[str]) -> str:
    """A confusion matrix as a table, darker for more: quicker than a figure, on dark pages too."""
    style = "padding:1px 5px;text-align:right;border:0"
    head = "".join(
        f'<th style="{style};writing-mode:vertical-rl;text-align:left;font-weight:400">'
        f"{html.escape(name)}</th>"
        for name in names
    )
    rows = []
    for name, row in zip(names, counts.tolist(), strict=True):
        total = max(sum(row), 1)
        found = "".join(
            f'<td style="{style};background:{BLUE}{int(200 * count / total):02x}" '
            f'title="{html.escape(name)} taken for {html.escape(other)}">{count or ""}</td>'
            for count, other in zip(row, names, strict=True)
        )
        rows.append(f'<tr><th style="{style};font-weight:400">{html.escape(name)}</th>{found}</tr>')
    corner = f'<th style="{style};font-weight:400"><small>it was ↓ taken for →</small></th>'
    return f'<table style="border-collapse:collapse">{"<tr>" + corner + head + "</tr>"}{"".join(rows)}</table>'
