"""Clicks by number: what stands in for the canvas where anywidget is not installed."""

from __future__ import annotations

from typing import Any

from mmadapt.core.figure import png
from mmadapt.ui.base import ipywidgets
from mmadapt.ui.volume_scene import VolumeScene


class Sliders:
    """A slider for each coordinate, a button for each kind of click, and the figure."""

    def __init__(self, view: Any) -> None:
        widgets = ipywidgets()
        self.view = view
        self._refreshing = False
        self.moves = volume = isinstance(view.scene, VolumeScene)
        names, size = ("zyx", view.scene.volume.size) if volume else ("xy", view.study.size[::-1])
        at = view.at if volume else [n // 2 for n in size]
        self.places = [
            widgets.IntSlider(
                description=name, min=0, max=n - 1, value=place, continuous_update=False
            )
            for name, n, place in zip(names, size, at, strict=True)
        ]
        self.picture = widgets.Image(format="png")
        self.click = widgets.Button(description="click", layout={"width": "auto"})
        self.click.on_click(view.handler(self._click))
        if volume:
            for slider in self.places:
                slider.observe(view.handler(self._move), "value")
        note = widgets.HTML("<small>pip install anywidget to click in the picture itself</small>")
        self.widget = widgets.VBox([self.picture, *self.places, self.click, note])

    def refresh(self) -> None:
        """Draw the figure."""
        self.picture.value = png(self.view.figure(), dpi=80)
        if self.moves:
            self._refreshing = True
            try:
                for slider, place in zip(self.places, self.view.at, strict=True):
                    slider.value = place
            finally:
                self._refreshing = False

    def _move(self, _: Any) -> None:
        if not self._refreshing:
            self.view.at = [slider.value for slider in self.places]

    def _click(self, _: Any) -> None:
        view = self.view
        label = 0 if view.negative else 1
        view.change(lambda: view.scene.click_at([slider.value for slider in self.places], label))
