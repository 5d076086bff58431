"""The pictures that are clicked: one small ES module through anywidget, told in custom messages.

Pictures travel as bytes, masks as packed bits. Nothing of them is a widget's state, so that neither a
saved notebook nor a reconnected page carries them; a page that is drawn anew asks again.
"""

from __future__ import annotations

import functools
import importlib.util
from importlib.resources import files
from typing import Any

import numpy

from mmadapt.errors import DataError


def has_anywidget() -> bool:
    """Whether clicks can be seen; without it there are sliders."""
    return importlib.util.find_spec("anywidget") is not None


@functools.cache
def _widget_class() -> Any:
    import anywidget

    folder = files("mmadapt.ui")

    class ClickWidget(anywidget.AnyWidget):
        _esm = folder.joinpath("click.js").read_text(encoding="utf-8")
        _css = folder.joinpath("click.css").read_text(encoding="utf-8")

    return ClickWidget


class Canvas:
    """Draws the scene of a view, and does to it what messages say."""

    def __init__(self, view: Any) -> None:
        self.view = view
        self.widget = _widget_class()()
        self.widget.on_msg(view.handler(self._received))
        # which picture of each plane the page has; None before there is a page
        self._sent: dict[int, Any] | None = None
        self._answers: str | None = None

    def refresh(self) -> None:
        """Send masks, and of the pictures those that changed."""
        if self._sent is None:
            return
        scene, planes, buffers = self.view.scene, [], []
        for plane in range(scene.planes):
            shown = scene.show(plane)
            mask = scene.mask(plane)
            height, width = mask.shape
            key = (scene.limits, shown["slice"])
            shown |= {"plane": plane, "width": width, "height": height, "picture": None}
            if self._sent.get(plane) != key:
                self._sent[plane] = key
                picture = numpy.ascontiguousarray(scene.picture(plane))
                shown |= {"picture": len(buffers), "channels": picture.size // mask.size}
                buffers.append(picture.data.cast("B"))
            shown["mask"] = len(buffers)
            buffers.append(numpy.packbits(mask, axis=1).data.cast("B"))
            planes.append(shown)
        self._send(planes, buffers)

    def _send(self, planes: list[Any], buffers: list[Any]) -> None:
        self.widget.send({"planes": planes, "answers": self._answers}, buffers)
        self._answers = None

    def _received(self, _: Any, content: Any, buffers: Any) -> None:
        if not isinstance(content, dict):
            raise DataError(f"the page sent {content!r}, expected a table of names")
        self._answers = content.get("name")
        try:
            self._do(content)
        finally:
            if self._answers is not None:  # refused; the page waits for an answer all the same
                self._send([], [])

    def _do(self, content: dict[str, Any]) -> None:
        view, scene, kind = self.view, self.view.scene, content.get("kind")
        steps = {
            "ready": self._begin,
            "scroll": lambda: scene.scroll(content["plane"], content["slice"]),
            "click": lambda: self._prompt(
                content, "click", 0 if view.negative else content["label"]
            ),
            "box": lambda: self._prompt(content, "box"),
            "undo": view.study.undo,
        }
        if kind not in steps:
            raise DataError(f"the page sent {content!r}, which means nothing here")
        view.change(steps[kind])

    def _begin(self) -> None:
        self._sent = {}

    def _prompt(self, content: dict[str, Any], kind: str, *label: int) -> None:
        scene, plane = self.view.scene, content["plane"]
        if scene.planes > 1:  # on the slice that was seen, others may have been scrolled to since
            scene.scroll(plane, content["slice"])
        if kind == "box":
            scene.box(plane, *content["corners"])
        else:
            scene.click(plane, *content["at"], *label)
