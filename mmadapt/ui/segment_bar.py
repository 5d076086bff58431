"""The buttons above what is clicked, and the line that says what was answered."""

from __future__ import annotations

import html
from typing import Any

from mmadapt.tasks.volume import SliceSegmenter
from mmadapt.ui.base import ipywidgets


class Bar:
    """Each button does to the view what its name says."""

    def __init__(self, view: Any) -> None:
        widgets = ipywidgets()
        self.view = view
        self._refreshing = False
        small = {"width": "auto"}

        def button(word: str, tip: str, method: Any) -> Any:
            made = widgets.Button(description=word, tooltip=tip, layout=small)
            made.on_click(view.handler(method))
            return made

        self.negative = widgets.ToggleButton(
            description="negative",
            tooltip="clicks are negative: beside the object, as with shift",
            layout=small,
        )
        self.negative.observe(view.handler(self._negative), "value")
        self.undo = button("undo", "take back the last click or box (backspace)", self._undo)
        self.clear = button("clear", "take back every click and box", self._clear)
        self.propagate = button("propagate", "carry the mask to the other slices", self._propagate)
        self.candidate = widgets.ToggleButtons(tooltip="candidates", style={"button_width": "auto"})
        self.candidate.observe(view.handler(self._choose), "value")
        self.adapted = widgets.Checkbox(description="adapters", indent=False, layout=small)
        self.adapted.observe(view.handler(self._switch), "value")
        low, high = view.scene.range or (0.0, 1.0)
        self.window = widgets.FloatRangeSlider(
            description="window",
            min=low,
            max=high,
            step=(high - low) / 200,
            readout_format=".0f" if high - low > 50 else ".3g",
            layout={"width": "340px", "display": "" if view.scene.range else "none"},
            style={"description_width": "auto"},
        )
        self.window.observe(view.handler(self._look), "value")
        self.status = widgets.HTML()
        wrapped = widgets.Layout(flex_flow="row wrap", align_items="center")
        self.widget = widgets.VBox(
            [
                widgets.HBox(
                    [self.negative, self.undo, self.clear, self.propagate, self.candidate, self.adapted, self.window],
                    layout=wrapped,
                ),
                self.status,
            ]
        )  # fmt: skip

    def refresh(self) -> None:
        """Say what is; what is set here is no wish of the user's."""
        view, before = self.view, self._refreshing
        self._refreshing = True
        try:
            _shown(self.propagate, isinstance(view.study, SliceSegmenter))
            _shown(self.adapted, view.attached)
            self.negative.value, self.adapted.value = view.negative, view.adapted
            count = len(view.scores)
            _shown(self.candidate, count > 1)
            options = [(f"{i + 1}: {score:.2f}", i) for i, score in enumerate(view.scores)]
            if count > 1 and list(self.candidate.options) != options:
                self.candidate.options = options
            if count > 1:
                self.candidate.value = view.candidate
            if view.scene.range is not None:
                low, high = view.window
                self.window.max = max(high, self.window.max)
                self.window.min = min(low, self.window.min)
                self.window.value = low, high
            self.status.value = f"<small>{html.escape(view.status())}</small>"
        finally:
            self._refreshing = before

    def _negative(self, change: Any) -> None:
        self._wish("negative", change.new)

    def _undo(self, _: Any) -> None:
        self.view.undo()

    def _clear(self, _: Any) -> None:
        self.view.clear()

    def _propagate(self, _: Any) -> None:
        self.view.propagate()

    def _choose(self, change: Any) -> None:
        self._wish("candidate", change.new)

    def _switch(self, change: Any) -> None:
        self._wish("adapted", change.new)

    def _look(self, change: Any) -> None:
        self._wish("window", change.new)

    def _wish(self, name: str, value: Any) -> None:
        if self._refreshing:
            return
        try:
            setattr(self.view, name, value)
        except BaseException:
            self.refresh()  # the button says what is, not what was wished for
            raise


def _shown(widget: Any, shown: bool) -> None:
    widget.layout.display = "" if shown else "none"
