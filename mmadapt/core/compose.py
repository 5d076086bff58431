"""Which attachments are active, and how they combine."""

from __future__ import annotations

from dataclasses import dataclass

from mmadapt.errors import AttachError


@dataclass(frozen=True, init=False)
class Stack:
    """Attachments one after another: at each site the next sees what the one before returned."""

    names: tuple[str, ...]

    def __init__(self, *names: str) -> None:
        _check(names, "Stack")
        object.__setattr__(self, "names", names)

    def without(self, *names: str) -> Stack:
        """The same composition without some of its names."""
        return Stack(*(name for name in self.names if name not in names))

    def __repr__(self) -> str:
        return f"Stack({', '.join(map(repr, self.names))})"


@dataclass(frozen=True, init=False)
class Sum:
    """Attachments side by side: all see the backbone's own output and their changes add up."""

    names: tuple[str, ...]

    def __init__(self, *names: str) -> None:
        _check(names, "Sum")
        object.__setattr__(self, "names", names)

    def without(self, *names: str) -> Sum:
        """The same composition without some of its names."""
        return Sum(*(name for name in self.names if name not in names))

    def __repr__(self) -> str:
        return f"Sum({', '.join(map(repr, self.names))})"


Composition = Stack | Sum


def _check(names: tuple[str, ...], kind: str) -> None:
    for name in names:
        if not isinstance(name, str):
            raise AttachError(f"{kind} takes names of attachments, got {name!r}")
    if len(set(names)) != len(names):
        raise AttachError(f"{kind}{names} names an attachment twice")


def compose(names: tuple[str | Composition, ...]) -> Composition:
    """One composition from what a caller wrote: a composition, or names, which sum."""
    if len(names) == 1 and isinstance(names[0], (Stack, Sum)):
        return names[0]
    if any(isinstance(name, (Stack, Sum)) for name in names):
        raise AttachError(
            f"cannot mix names and compositions: {names}", 'write one, as in Stack("a", "b")'
        )
    return Sum(*names)  # type: ignore[arg-type]
