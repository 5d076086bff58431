"""What travels with one forward pass: the tensors that taps left for layers further on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


class Context:
    """One per adapted backbone, shared by its hooks; holds tensors only during a forward pass."""

    def __init__(self) -> None:
        self._taps: dict[str, tuple[Tensor, int]] = {}

    def leave(self, tap: str, value: Tensor, readers: int) -> None:
        """Keep what a tap saw until its last reader has come."""
        self._taps[tap] = (value, readers)

    def read(self, tap: str) -> Tensor:
        """What the tap saw last in this forward pass; `tap` is a value of `site.taps`."""
        value, readers = self._taps.pop(tap)
        if readers > 1:
            self._taps[tap] = (value, readers - 1)
        return value

    def __getstate__(self) -> dict[str, Any]:
        return {}  # non-leaf tensors can neither be deep-copied nor pickled

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._taps = {}
