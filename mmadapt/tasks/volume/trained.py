"""A volume made as the active adapters of a model were trained to see it."""

from __future__ import annotations

from typing import Any

from mmadapt.errors import DataError
from mmadapt.tasks.segment.inputs import input_of, same_window
from mmadapt.tasks.segment.intensity import WINDOWS
from mmadapt.tasks.volume.stored import Stored
from mmadapt.tasks.volume.volume import Volume


def as_trained(m: Any, volume: Volume) -> Volume:
    """The volume in the window that the active adapters were trained with, where they name one.

    One that was brought to another window is refused, as is one from 0 to 1 that does not say how it
    came there, where the adapters want a range of values.
    """
    wanted = input_of(m).window
    if wanted is None:
        return volume
    done = [step.window for step in volume.history if step.window is not None]
    if done:
        if len(done) > 1 or not same_window(done[0], wanted):
            raise DataError(
                f"{volume.name} was brought to the window {' and then '.join(map(repr, done))}, the "
                f"active adapter was trained with {wanted!r}",
                "give the volume as it was read: the adapter's own window is applied to it",
            )
        return volume
    span = WINDOWS.get(wanted, wanted) if isinstance(wanted, str) else wanted
    values = volume.array
    if not isinstance(span, str) and not isinstance(values, Stored):
        low, high = float(values.min()), float(values.max())
        if low >= 0 and high <= 1 and span[1] - span[0] > 2:
            raise DataError(
                f"{volume.name} holds values from {low:g} to {high:g}, the active adapter was trained "
                f"with the window {wanted!r}, {span[0]:g} to {span[1]:g}",
                "give the volume as it was read: the adapter's own window is applied to it",
            )
    return volume.window(span) if isinstance(span, str) else volume.window(*span)
