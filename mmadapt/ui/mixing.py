"""A weight for every attachment, and what the model makes of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mmadapt.core.attach import active, set_active
from mmadapt.core.attached import require_bank
from mmadapt.core.combined import check_weight
from mmadapt.core.compose import Sum
from mmadapt.core.figure import BLUE, FAINT, drawn, new_figure
from mmadapt.errors import AttachError, DataError, did_you_mean
from mmadapt.ui.base import ipywidgets
from mmadapt.ui.settings import Settings
from mmadapt.ui.shown import as_html, as_text, draw


def mix(m: Any, show: Callable[[], Any], limits: tuple[float, float] = (0.0, 1.0)) -> MixView:
    """Move how much each attachment counts, and see what a function gives each time.

    `show` takes nothing and returns what is to be seen: a text, a number, a table, an image, a figure.
    Sliders run over `limits` and begin where the active composition is; what is not active has the
    weight 0. Attachments that act wholly or not at all, since they add no change, have a switch.
    The weights stay in force in the model: the last to choose, here or by `set_active`, decides, and
    `refresh()` takes up what was chosen elsewhere.

        w = mm.ui.mix(llama, lambda: instruct.answers(llama, ["the sky is "]))
        w.weights                                             # {"poems": 1.0, "manuals": 0.0}
        w.weights = {"poems": 0.5, "manuals": 0.5}
        w.output
    """
    return MixView(m, show, limits)


class MixView(Settings):
    """What `mm.ui.mix` gives: `weights` by attachment, and the `output` of the function."""

    delay = 0.1

    def __init__(
        self, m: Any, show: Callable[[], Any], limits: tuple[float, float] = (0.0, 1.0)
    ) -> None:
        if not callable(show):
            raise DataError(
                f"show is {type(show).__name__}, expected a function without arguments",
                "for example lambda: model(batch)",
            )
        low, high = (float(limit) for limit in limits)
        if not low < high:
            raise DataError(f"limits are {limits!r}, expected a lower and a higher number")
        self.model, self.show, self.limits = m, show, (low, high)
        self.output: Any = None
        super().__init__(**self._in_force())

    @property
    def weights(self) -> dict[str, float]:
        """By attachment what its changes are multiplied by; may be assigned, some or all."""
        return dict(self.values)

    @weights.setter
    def weights(self, weights: dict[str, float]) -> None:
        self.change(**weights)

    def refresh(self) -> None:
        """Take up what is attached and active now, and call the function again."""
        self.values, self._controls_made = self._in_force(), {}
        try:
            self.change()
        finally:
            if self._widget is not None:  # other attachments have other sliders
                self._widget.children = (self._build(), *self._widget.children[1:])

    def _in_force(self) -> dict[str, float]:
        _, bank = require_bank(self.model)
        now = active(self.model)
        weights = dict(zip(now.names, now.weights, strict=True)) if bank.acting else {}
        return {name: weights.get(name, 0.0) for name in bank.records if name not in bank.merged}

    def _checked(self, values: dict[str, Any]) -> dict[str, Any]:
        _, bank = require_bank(self.model)
        for name in values:
            if name not in bank.records:
                raise AttachError(
                    f"no attachment is named {name!r}", did_you_mean(name, bank.records)
                )
        return {name: float(weight) for name, weight in values.items()}

    def _computed(self, values: dict[str, Any]) -> None:
        kind, there = type(active(self.model)), {n: w for n, w in values.items() if w}
        order = [n for n in active(self.model).names if n in there]
        names = [*order, *(n for n in there if n not in order)]
        set_active(self.model, kind(*names, weights=[there[n] for n in names]) if names else Sum())
        self.values = values  # they are in force, whatever the function raises
        self.output = self.show()

    # -- what is shown ------------------------------------------------------------------------------

    def _controls(self) -> dict[str, Any]:
        widgets = ipywidgets()
        _, bank = require_bank(self.model)
        low, high = self.limits
        controls = {}
        for name, weight in self.values.items():
            try:
                check_weight(name, 0.5, bank.records[name].layers)
            except AttachError:
                controls[name] = widgets.Checkbox(value=bool(weight), description=name)
                continue
            controls[name] = widgets.FloatSlider(
                value=weight, min=min(low, weight), max=max(high, weight), step=(high - low) / 50,
                description=name, continuous_update=False,
                style={"description_width": "9em"}, layout={"width": "32em"},
            )  # fmt: skip
        return controls

    def _html(self) -> str:
        return as_html(self.output)

    def _text(self) -> str:
        weights = ", ".join(f"{name} {weight:g}" for name, weight in self.values.items())
        return f"mix of {weights}\n{as_text(self.output)}"

    @drawn
    def figure(self) -> Any:
        """The weights as bars, beside the output."""
        names, weights = list(self.values), list(self.values.values())
        figure = new_figure(8, max(0.35 * len(names) + 0.8, 1.6))
        bars, output = figure.subplots(1, 2, width_ratios=(1, 2))
        bars.barh(names, weights, color=BLUE, height=0.6)
        bars.set_xlim(min(self.limits[0], *weights), max(self.limits[1], *weights))
        bars.axvline(0, color=FAINT, linewidth=0.8, zorder=0)
        bars.invert_yaxis()
        bars.set_xlabel("weight")
        draw(output, self.output)
        return figure
