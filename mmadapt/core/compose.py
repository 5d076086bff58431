"""Which attachments are active, how they combine, and how much each counts."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from mmadapt.errors import AttachError

C = TypeVar("C", bound="Composition")


@dataclass(frozen=True, init=False, repr=False)
class Composition:
    """Names of attachments, and of each the weight by which its changes are multiplied."""

    names: tuple[str, ...]
    weights: tuple[float, ...]

    def __init__(self, *names: str, weights: Sequence[float] | None = None) -> None:
        kind = type(self).__name__
        for name in names:
            if not isinstance(name, str):
                raise AttachError(f"{kind} takes names of attachments, got {name!r}")
        if len(set(names)) != len(names):
            raise AttachError(f"{kind}{names} names an attachment twice")
        object.__setattr__(self, "names", names)
        object.__setattr__(self, "weights", _checked(weights, names, kind))

    def without(self: C, *names: str) -> C:
        """The same composition without some of its names."""
        left = {n: w for n, w in zip(self.names, self.weights, strict=True) if n not in names}
        return type(self)(*left, weights=tuple(left.values()))

    def __repr__(self) -> str:
        parts = [*map(repr, self.names)]
        if any(weight != 1 for weight in self.weights):
            parts.append(f"weights=({', '.join(f'{weight:g}' for weight in self.weights)})")
        return f"{type(self).__name__}({', '.join(parts)})"


class Stack(Composition):
    """Attachments one after another: at each site the next sees what the one before returned.

    Of each, `weights` (all 1 by default) times the change it makes is made.
    """


class Sum(Composition):
    """Attachments side by side: all see the backbone's own output and their changes add up.

    Each change is multiplied by its weight, 1 by default: `Sum("a", "b", weights=(0.3, 0.7))`.
    """


def _checked(weights: Any, names: tuple[str, ...], kind: str) -> tuple[float, ...]:
    if weights is None:
        return (1.0,) * len(names)
    given = tuple(weights) if isinstance(weights, (tuple, list)) else (weights,)
    if len(given) != len(names) or not all(
        isinstance(w, numbers.Real) and math.isfinite(float(w)) for w in given
    ):
        raise AttachError(
            f"weights of {kind} are {weights!r}, expected {len(names)} finite numbers, one a name"
        )
    return tuple(float(weight) for weight in given)


def compose(names: tuple[str | Composition, ...]) -> Composition:
    """One composition from what a caller wrote: a composition, or names, which sum."""
    if len(names) == 1 and isinstance(names[0], Composition):
        return names[0]
    if any(isinstance(name, Composition) for name in names):
        raise AttachError(
            f"cannot mix names and compositions: {names}", 'write one, as in Stack("a", "b")'
        )
    return Sum(*names)  # type: ignore[arg-type]
