"""Training beside the notebook: a curve that grows, and a button that stops it."""

from __future__ import annotations

import atexit
import functools
import html
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from mmadapt.core.backbone import unwrap_model
from mmadapt.core.figure import BLUE
from mmadapt.core.svg import curve_svg
from mmadapt.errors import CheckError
from mmadapt.train.fit import fit
from mmadapt.train.history import History
from mmadapt.train.progress import Progress, in_notebook
from mmadapt.ui.base import WIDGET, error_html, ipywidgets

if TYPE_CHECKING:
    from torch import nn

#: by model the run that trains it
_RUNNING: WeakKeyDictionary[nn.Module, LiveRun] = WeakKeyDictionary()


def live(m: Any, data: Any, /, **options: Any) -> LiveRun:
    """Train in the background as `mm.fit(m, data, **options)` does, with a curve and a stop button.

    Returns at once: the notebook goes on, and its cells may look at the run. Stopping, by the button or
    `run.stop()`, ends it after the present step and keeps what was learned. The last frame stays in the
    saved notebook. While it runs the model belongs to it: another forward pass is refused. Raises
    `CheckError` where the model is being trained already.

        run = mm.ui.live(clip, train, loss=loss, steps=300)
        run.losses[-1]                                        # while it runs
        history = run.wait()                                  # raises what the run raised
    """
    model = unwrap_model(m)
    other = _RUNNING.get(model)
    if other is not None and other.running:
        raise CheckError(
            f"this {type(model).__name__} is being trained already, {other!r}",
            "run.stop() and run.wait() end that run",
        )
    run = LiveRun(m, data, options)
    _RUNNING[model] = run
    run._start()
    return run


class LiveRun:
    """What `mm.ui.live` gives: a run under way, or at its end."""

    def __init__(self, m: Any, data: Any, options: dict[str, Any]) -> None:
        #: what the run raised, as `wait` raises it again
        self.error: BaseException | None = None
        self._history: History | None = None
        self._frame = _Frame(options.get("label", "fit"), options.get("steps", 300))
        self._button: Any = None
        self._beside: Any = None
        self._call = (m, data, {**options, "progress": self._frame})
        self._thread = threading.Thread(target=self._run, name="mmadapt live", daemon=True)
        self._ending = functools.partial(_end, self._frame, self._thread)

    @property
    def running(self) -> bool:
        """Whether steps are still made."""
        return self._thread.is_alive()

    @property
    def losses(self) -> list[float]:
        """The loss of every step so far."""
        return list(self._frame.curve)

    @property
    def history(self) -> History | None:
        """What `mm.fit` returned; None before the end."""
        return self._history

    def stop(self) -> None:
        """Ask for the end after the present step; returns at once."""
        self._frame.stop()

    def wait(self, seconds: float | None = None) -> History | None:
        """Wait for the end, at most so long, and return the history; None where it is not there yet.

        An interruption of the cell stops the run. Raises what the run raised.
        """
        try:
            self._thread.join(seconds)
        except KeyboardInterrupt:
            self.stop()
            self._thread.join()
        if self.error is not None:
            raise self.error
        return self._history

    def _start(self) -> None:
        if in_notebook():
            self._frame._draw(final=False)  # in this cell; the thread brings it up to date
            self._show_button()
        atexit.register(self._ending)  # before a short run can be over and take it back
        self._thread.start()

    def _run(self) -> None:
        m, data, options = self._call
        try:
            self._history = fit(m, data, **options)
        except BaseException as error:
            self.error = self._frame.error = error
            if in_notebook():
                self._frame._draw(final=True)
        finally:
            self._hide_button()
            atexit.unregister(self._ending)
            self._call = (None, None, {})  # the data may go

    # -- the button, which is no part of what is saved --------------------------------------------------

    def _show_button(self) -> None:
        from IPython.display import display  # pyright: ignore[reportMissingImports]

        self._button = ipywidgets().Button(
            description="Stop", icon="stop", tooltip="end after the present step"
        )
        self._button.on_click(self._clicked)
        view = {"version_major": 2, "version_minor": 0, "model_id": self._button.model_id}
        bundle = {"text/plain": "", "text/html": "", WIDGET: view}
        self._beside = display(bundle, raw=True, display_id=True)

    def _clicked(self, _: Any) -> None:
        self._button.disabled, self._button.description = True, "Stopping …"
        self.stop()

    def _hide_button(self) -> None:
        if self._button is not None:
            self._button.close()
            self._beside.update({"text/plain": "", "text/html": ""}, raw=True)

    def __repr__(self) -> str:
        if self._history is not None:
            return repr(self._history)
        state = "failed" if self.error is not None else "running" if self.running else "begins"
        return f"LiveRun({state}: {self._frame.line()})"

    def _repr_html_(self) -> str:
        return self._frame.bundle(final=not self.running)["text/html"]


class _Frame(Progress):
    """A larger curve than a bar has, with the speed; drawn at most four times a second."""

    def __init__(self, label: str, total: int) -> None:
        super().__init__(label, total)
        self.error: BaseException | None = None
        self._times: deque[tuple[float, int]] = deque(maxlen=40)

    @property
    def curve(self) -> Any:
        """The losses so far."""
        return self._curve

    def update(self, done: int, text: str = "", curve: Any = ()) -> None:
        if not self._times or time.monotonic() - self._times[-1][0] > 0.1:
            self._times.append((time.monotonic(), done))
        super().update(done, text, curve)

    def speed(self) -> float:
        """Steps a second, over the last few seconds."""
        if len(self._times) < 2:
            return 0.0
        (began, first), (now, last) = self._times[0], self._times[-1]
        return (last - first) / max(now - began, 1e-9)

    def line(self) -> str:
        """Where it stands, in one line."""
        parts = [f"{self.label}: {self.done}/{self.total} steps", self._text]
        speed = self.speed()
        if speed:
            parts.append(f"{speed:.3g} steps/s")
            left = (self.total - self.done) / speed
            if left and not self.stopping:
                parts.append(
                    f"about {left:.0f} s left" if left < 120 else f"{left / 60:.0f} min left"
                )
        return ", ".join(part for part in parts if part)

    def bundle(self, final: bool) -> dict[str, str]:
        text = "\n".join([self.line(), *self._notes])
        done = 100 * self.done / max(self.total, 1)
        bar = "" if final else (
            f'<div style="width:520px;max-width:100%;height:4px;background:{BLUE}33">'
            f'<div style="width:{done:.1f}%;height:4px;background:{BLUE}"></div></div>'
        )  # fmt: skip
        failed = "" if self.error is None else error_html(self.error)
        shown = f"{curve_svg(self._curve, width=520, height=160)}{bar}"
        said = f'<code style="white-space:pre-wrap">{html.escape(text)}</code>'
        plain = text if self.error is None else f"{text}\n{type(self.error).__name__}: {self.error}"
        return {"text/plain": plain, "text/html": f"<div>{shown}{said}{failed}</div>"}


def _end(frame: _Frame, thread: threading.Thread) -> None:
    """The interpreter ends: the run ends before it, if a step does not last too long."""
    frame.stop()
    thread.join(10)
