"""What every widget shares: its picture and its text, errors that are shown, a life that ends.

A view is ordinary Python data with a figure; it works without a notebook and without ipywidgets. Its
widgets are made when a notebook first shows it. Beside them the notebook keeps a picture, hidden while
they live, that follows the state; who opens the saved file sees it, with or without a kernel. Pixels of a
canvas are no widget's state, so that nothing large is saved even by a front end told to save it.
"""

from __future__ import annotations

import html
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from mmadapt.core.figure import png
from mmadapt.errors import MissingDependencyError, MmadaptError
from mmadapt.train.progress import in_notebook

WIDGET = "application/vnd.jupyter.widget-view+json"

#: seconds after the last change until the picture that is saved follows
SETTLED = 1.0

#: a live view hides the output after its own, which is its picture
_HIDE_PICTURE = (
    "<style>.jp-OutputArea-child:has(.mmadapt-live) + .jp-OutputArea-child .jp-RenderedImage"
    "{display:none}</style>"
)


class View:
    """Something to look at and to change: a subclass has `_text`, `figure` and `_build`.

    `_text()` is its plain twin, a few lines. `figure()` is a matplotlib figure of the state as it is.
    `_build()` makes the ipywidgets widget, once, when it is first shown; its callbacks go through
    `handler`, so that an error is shown below the widget and the kernel lives on. Assigning state from
    Python raises as usual, and ends with `changed()`. `error` is what was shown last, to be raised for
    its traceback.
    """

    def __init__(self) -> None:
        self.error: BaseException | None = None
        # JupyterLab may send what the front end does to a thread of its own
        self._lock = threading.RLock()
        self._widget: Any = None
        self._line: Any = None
        self._pictures: list[Any] = []  # handles of the pictures that were displayed
        self._settle = debounced(self._weakly(self._show_pictures), SETTLED)

    def _text(self) -> str:
        raise NotImplementedError

    def figure(self) -> Any:
        """The state as it is, as a matplotlib figure."""
        raise NotImplementedError

    def _build(self) -> Any:
        raise NotImplementedError

    @property
    def widget(self) -> Any:
        """The ipywidgets widget, to be put into boxes; made on first use."""
        if self._widget is None:
            widgets = ipywidgets()
            self._line = widgets.HTML()
            self._line.layout.display = "none"
            self._widget = widgets.VBox([self._build(), self._line, widgets.HTML(_HIDE_PICTURE)])
            self._widget.add_class("mmadapt-live")
            # ipywidgets keeps every widget for ever; a view that nobody holds takes its own along
            weakref.finalize(self, _close, self._widget).atexit = False
        return self._widget

    def close(self) -> None:
        """Take the widgets out of the page; state stays readable, and showing it again makes new ones."""
        if self._widget is not None:
            _close(self._widget)
            self._widget = self._line = None

    # -- what front ends show ---------------------------------------------------------------------

    def __repr__(self) -> str:
        return self._text()

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        return {**self._still(), **self._live()}

    def _ipython_display_(self) -> None:
        if not in_notebook() or "google.colab" in sys.modules:
            raise NotImplementedError  # IPython then asks for the one bundle
        from IPython.display import display

        display({"text/plain": "a live view; its picture follows", **self._live()}, raw=True)
        self._pictures.append(display(self._still(), raw=True, display_id=True))

    def _still(self) -> dict[str, Any]:
        return {"text/plain": self._text(), "image/png": png(self.figure(), dpi=80)}

    def _live(self) -> dict[str, Any]:
        if not in_notebook():
            return {}
        model = {"version_major": 2, "version_minor": 0, "model_id": self.widget.model_id}
        return {WIDGET: model}

    def changed(self) -> None:
        """Let the displayed pictures follow, once nothing has changed for `SETTLED` seconds."""
        if self._pictures:
            self._settle()

    def _show_pictures(self) -> None:
        with self._lock:
            try:
                still = self._still()
            except Exception as error:
                self._say(error_html(error))
                return
            for picture in self._pictures:
                picture.update(still, raw=True)

    # -- what front ends do -----------------------------------------------------------------------

    def handler(self, method: Callable[..., Any], delay: float = 0.0) -> Callable[..., None]:
        """A callback for a widget, of a method of this view or of one of its parts.

        What it raises is shown in the widget and kept in `error`; then the saved picture follows. With
        a `delay` in seconds it runs once calls have paused for so long, with the arguments of the last.
        It keeps neither the view nor the part alive.

            slider.observe(self.handler(self._moved, delay=0.1), "value")
        """
        run, owner = self._weakly(method), weakref.ref(self)

        def call(*arguments: Any) -> None:
            view = owner()
            if view is not None:
                with view._lock, view.shown_errors():
                    run(*arguments)
                view.changed()

        return debounced(call, delay) if delay else call

    @staticmethod
    def _weakly(method: Callable[..., Any]) -> Callable[..., None]:
        """The method, which does nothing where its object is gone."""
        held = weakref.WeakMethod(method)

        def call(*arguments: Any) -> None:
            bound = held()
            if bound is not None:
                bound(*arguments)

        return call

    @contextmanager
    def shown_errors(self) -> Iterator[None]:
        """What is raised within is shown below the widget and kept in `error`; what worked clears it."""
        try:
            yield
        except (Exception, KeyboardInterrupt) as error:
            self.error = error
            self._say(error_html(error))
        else:
            if self.error is not None:
                self.error = None
                self._say("")

    def _say(self, text: str) -> None:
        if self._line is not None:
            self._line.value = text
            self._line.layout.display = "" if text else "none"


def error_html(error: BaseException) -> str:
    """An error as a line for the page, with its next step where it has one."""
    if isinstance(error, KeyboardInterrupt):
        return '<div role="alert">interrupted</div>'
    message, hint = str(error), ""
    if isinstance(error, MmadaptError):
        message, hint = error.message, error.hint
    return (
        '<div role="alert" style="color:var(--jp-error-color1,#c62828);white-space:pre-wrap;'
        f'line-height:1.4"><b>{type(error).__name__}</b>: {html.escape(message)}'
        + (f"<br>Next: {html.escape(hint)}" if hint else "")
        + "</div>"
    )


def debounced(call: Callable[..., None], delay: float) -> Callable[..., None]:
    """The function, called when calls to it have paused for `delay` seconds, with the last arguments.

    It runs on the event loop it was called from; where there is none it runs at once.
    """
    import asyncio

    waiting: list[Any] = []

    def later(*arguments: Any) -> None:
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            call(*arguments)
            return
        while waiting:
            waiting.pop().cancel()
        waiting.append(loop.call_later(delay, call, *arguments))

    return later


def ipywidgets() -> Any:
    """The library, or the line that installs it."""
    try:
        import ipywidgets
    except ImportError as error:
        raise MissingDependencyError(
            "live widgets need ipywidgets", "pip install ipywidgets; .figure() works without"
        ) from error
    return ipywidgets


def _close(widget: Any) -> None:
    """Close a widget and all it is made of: children, layout and style."""
    import ipywidgets

    left, seen = [widget], set()
    while left:
        own = left.pop()
        if not isinstance(own, ipywidgets.Widget) or id(own) in seen:
            continue
        seen.add(id(own))
        for name in own.keys:
            value = getattr(own, name)
            left += value if isinstance(value, (list, tuple)) else [value]
        own.close()
