"""Ctrl-C that waits for the end of a step, and a second one that does not."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from types import TracebackType
from typing import Any


class Interruption:
    """Inside the block the first Ctrl-C sets `asked`, and says so where `say` is set; the second raises.

    In another thread than the main one, or where SIGINT is ignored, nothing is installed.
    """

    def __init__(self, say: bool) -> None:
        self.asked = False
        self._say = say
        self._before: Any = None

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            before = signal.getsignal(signal.SIGINT)
            if callable(before):
                self._before = before
                signal.signal(signal.SIGINT, self._handle)
        return self

    def _handle(self, number: int, frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        if self._say:  # past every buffer: whatever was being written when the signal came goes on
            with contextlib.suppress(OSError):
                os.write(2, b"\nstopping after this batch; interrupt again to stop at once\n")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
