"""How an adapter wants its images and clicks: kept in its file, applied where it acts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from mmadapt.core.attached import require_bank, require_name
from mmadapt.core.backbone import unwrap_model
from mmadapt.core.bank import bank_of
from mmadapt.errors import DataError, did_you_mean
from mmadapt.tasks.segment.intensity import PERCENTILES, WINDOWS

Window = str | tuple[float, float]


@dataclass(frozen=True)
class Input:
    """What the active adapters of a SAM were trained on; None where they do not say.

    `window` is a name of `WINDOWS` or `PERCENTILES`, or two numbers; `depth` how many slices they
    saw together; `image_side` the side of the square. `normalise` is "sam", by the mean and deviation
    SAM was trained with, or "0-1" without; `click_order` "xy" or, as some authors' code has it,
    "row_col".
    """

    window: Window | None = None
    depth: int | None = None
    image_side: int | None = None
    normalise: str | None = None
    click_order: str | None = None

    def __post_init__(self) -> None:
        if self.window is not None:
            object.__setattr__(self, "window", _window(self.window))
        for name in ("depth", "image_side"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise DataError(f"{name} is {value!r}, expected a whole number of at least 1")
        for name, allowed in (("normalise", ("sam", "0-1")), ("click_order", ("xy", "row_col"))):
            value = getattr(self, name)
            if value is not None and value not in allowed:
                raise DataError(f"{name} is {value!r}, expected {' or '.join(map(repr, allowed))}")


NAMES = tuple(field.name for field in fields(Input))


def set_input(m: Any, name: str | None = None, **values: Any) -> Input:
    """Write into an attachment how its images were made: it is saved with the adapter.

    Keywords are the fields of `Input`; what was said before and is not named stays. From then on,
    and wherever the adapter is loaded, `Segmenter` and the segmenters of volumes do the same, and
    refuse what was made otherwise.

        segment.set_input(sam, window="ct abdomen", depth=12)
    """
    _, bank = require_bank(m)
    record = bank.records[require_name(bank, name, "set_input")]
    unknown = [key for key in values if key not in NAMES]
    if unknown:
        raise DataError(f"no input is named {unknown[0]!r}", did_you_mean(unknown[0], NAMES))
    before = dict(record.metadata.get("input") or {})
    made = Input(**{**_known(before), **values})
    said = {key: getattr(made, key) for key in NAMES if getattr(made, key) is not None}
    if isinstance(said.get("window"), tuple):
        said["window"] = list(said["window"])
    record.metadata["input"] = {
        **{key: value for key, value in before.items() if key not in NAMES},
        **said,
    }
    return made


def input_of(m: Any) -> Input:
    """What the adapters that act in a model want; nothing where none acts, or within `disabled`.

    Raises `DataError` where two of them want different things, or one says what has no meaning.
    """
    bank = bank_of(unwrap_model(m))
    found: dict[str, tuple[Any, str]] = {}
    for name in acting(m):
        said = bank.records[name].metadata.get("input") or {}  # type: ignore[union-attr]
        if not isinstance(said, Mapping):
            raise DataError(f"the input of {name!r} is {said!r}, expected a table of names")
        try:
            made = Input(**_known(said))
        except DataError as error:
            raise DataError(f"the input of {name!r}: {error.message}", error.hint) from None
        for key in NAMES:
            value = getattr(made, key)
            if value is None:
                continue
            other, whose = found.setdefault(key, (value, name))
            if not (same_window(other, value) if key == "window" else other == value):
                raise DataError(
                    f"{whose!r} was trained with {key} {other!r} and {name!r} with {value!r}",
                    "activate one of them: mmadapt.set_active(model, name)",
                )
    return Input(**{key: value for key, (value, _) in found.items()})


def acting(m: Any) -> tuple[str, ...]:
    """The names of the attachments that act now: none within `disabled`."""
    bank = bank_of(unwrap_model(m))
    return tuple(bank.active.names) if bank is not None and bank.acting else ()


def acting_state(m: Any) -> tuple[Any, ...]:
    """What acts now and in which state: another one after a switch, a step of training or a load.

    Other weights of a composition, sites that rest and what is merged are another state as well. What
    was encoded under one state says nothing under another.
    """
    bank = bank_of(unwrap_model(m))
    if bank is None:
        return ()
    tensors = (
        (name, id(tensor), tensor._version)
        for name in acting(m)
        for _, layer in bank.tensors_of(name)
        for tensor in layer.parameters()
    )
    composition = bank.active if bank.acting else None
    return composition, bank.resting, tuple(bank.merged), *tensors


def same_window(one: Window, other: Window) -> bool:
    """Whether two windows mean the same range of values, whatever they are called."""
    return _meaning(one) == _meaning(other)


def _meaning(window: Window) -> tuple[str, tuple[float, float]]:
    if isinstance(window, str):
        if window in PERCENTILES:
            return "percentiles", PERCENTILES[window]
        return "values", WINDOWS[window]
    return "values", (float(window[0]), float(window[1]))


def _known(said: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in said.items() if key in NAMES}


def _window(value: Any) -> Window:
    if isinstance(value, str):
        if value not in WINDOWS and value not in PERCENTILES:
            raise DataError(
                f"no window is named {value!r}", did_you_mean(value, [*WINDOWS, *PERCENTILES])
            )
        return value
    try:
        low, high = (float(end) for end in value)
    except (TypeError, ValueError):
        raise DataError(f"the window is {value!r}, expected a name or two numbers") from None
    if not -math.inf < low < high < math.inf:
        raise DataError(f"the window goes from {low:g} to {high:g}, which is no range")
    return low, high
