"""Checks of hyper-parameters; each names the adapter, the field, the value and what was expected."""

from __future__ import annotations

import numbers
from typing import Any, Literal

from mmadapt.adapter.base import Adapter
from mmadapt.errors import AdapterError, did_you_mean

Activation = Literal["relu", "gelu", "gelu_new", "quick_gelu", "silu", "tanh", "identity"]
ACTIVATIONS: tuple[str, ...] = (
    "relu",
    "gelu",
    "gelu_new",
    "quick_gelu",
    "silu",
    "tanh",
    "identity",
)


def positive(adapter: Adapter, *names: str) -> None:
    """Refuse fields that are no whole number of at least 1."""
    for name in names:
        value = getattr(adapter, name)
        whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        if whole and int(value) >= 1:
            object.__setattr__(adapter, name, int(value))  # numpy's, too, as plain JSON
        else:
            raise AdapterError(
                f"{type(adapter).__name__}: {name} is {value!r}, expected a whole number of at least 1"
            )


def one_of(adapter: Adapter, name: str, options: tuple[str, ...]) -> None:
    """Refuse a field that is none of the options."""
    value = getattr(adapter, name)
    if value not in options:
        raise AdapterError(
            f"{type(adapter).__name__}: {name} is {value!r}, expected one of {', '.join(options)}",
            did_you_mean(str(value), options),
        )


def flag(adapter: Adapter, *names: str) -> None:
    """Refuse fields that are neither True nor False."""
    for name in names:
        if not isinstance(getattr(adapter, name), bool):
            raise AdapterError(
                f"{type(adapter).__name__}: {name} is {getattr(adapter, name)!r}, expected True or "
                "False"
            )


def number(adapter: Adapter, *names: str, low: float = float("-inf"), high: float = float("inf")):
    """Refuse fields that are no number in [low, high]; NaN is none."""
    for name in names:
        value: Any = getattr(adapter, name)
        real = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if real and low <= float(value) <= high:  # a NaN fails both comparisons
            object.__setattr__(adapter, name, value if isinstance(value, int) else float(value))
        else:
            raise AdapterError(
                f"{type(adapter).__name__}: {name} is {value!r}, expected a number in "
                f"[{low:g}, {high:g}]"
            )
