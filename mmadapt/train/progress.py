"""Progress of long work: a bar in a terminal, one line of HTML in a notebook.

The notebook form leaves a readable line (and a loss curve) in the saved file and no widget state.
"""

from __future__ import annotations

import html
import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from mmadapt.core.svg import curve_svg


def in_notebook() -> bool:
    """Whether rich output is shown: an IPython kernel, not a terminal."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and hasattr(shell, "kernel")


class Progress:
    """Counts steps towards `total`; `update(n, text, curve)` at most four times a second.

    With `show=False` it counts and shows nothing; with `unit="B"` it counts bytes and shows megabytes.
    """

    def __init__(self, label: str, total: int, show: bool = True, unit: str = "it") -> None:
        self.label = label
        self.total = total
        self.show = show
        self.unit = unit
        self.done = 0
        #: set by `stop`, and read by whoever makes the steps
        self.stopping = False
        self._text = ""
        self._curve: Sequence[float] = ()
        self._notes: list[str] = []
        self._last = 0.0
        self._handle: Any = None
        self._bar: Any = None

    def __enter__(self) -> Progress:
        if self.show and not in_notebook():
            from tqdm import tqdm

            self._bar = tqdm(
                total=self.total,
                desc=self.label,
                leave=False,
                mininterval=0.25,
                unit=self.unit,
                unit_scale=self.unit == "B",
            )
        return self

    def update(self, done: int, text: str = "", curve: Sequence[float] = ()) -> None:
        """Say that `done` of `total` steps are behind us, with a short text and the losses so far."""
        self._text, self._curve = text, curve
        if self._bar is not None:
            self._bar.update(done - self.done)
            self._bar.set_postfix_str(text, refresh=self.done == 0)  # the first at once
        self.done = done
        if self.show and self._bar is None and time.monotonic() - self._last > 0.25:
            self._draw(final=False)

    def stop(self) -> None:
        """Ask for the end after the present step, from any thread."""
        self.stopping = True

    def note(self, text: str) -> None:
        """Say something once, beside the steps."""
        self._notes.append(text)
        if self._bar is not None:
            self._bar.write(f"{self.label}: {text}", file=sys.stderr)
        elif self.show and self._handle is not None:
            self._draw(final=False)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self.show:
            self._draw(final=True)

    def _count(self) -> str:
        if self.unit != "B":
            return f"{self.done}/{self.total}"
        done, total = f"{self.done / 1e6:.1f}", f"{self.total / 1e6:.1f}"
        return f"{total} MB" if done == total else f"{done} of {total} MB"

    def _draw(self, final: bool) -> None:
        from IPython.display import display  # pyright: ignore[reportMissingImports]

        self._last = time.monotonic()
        bundle = self.bundle(final)
        if self._handle is None:
            self._handle = display(bundle, raw=True, display_id=True)
        else:
            self._handle.update(bundle, raw=True)

    def bundle(self, final: bool) -> dict[str, str]:
        """What is shown now, as text and HTML; the `final` form has no bar."""
        text = f"{self.label}: {self._count()}  {self._text}".rstrip()
        text = "\n".join([text, *self._notes])
        bar = (
            ""
            if final
            else f'<progress max="{self.total}" value="{self.done}" style="vertical-align:middle">'
            "</progress> "
        )
        return {
            "text/plain": text,
            "text/html": f"{curve_svg(self._curve)}{bar}<code style='white-space:pre-wrap'>"
            f"{html.escape(text)}</code>",
        }
