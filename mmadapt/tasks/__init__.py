"""Ready tasks: from data to a table of results.

    mm.tasks.few_shot.compare(…)

Each is a module of its own, imported on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmadapt.tasks import (
        asr,
        audio,
        few_shot,
        instruct,
        points,
        segment,
        speech_to_text,
        tagging,
        volume,
        whisper,
    )

__all__ = [
    "asr",
    "audio",
    "few_shot",
    "instruct",
    "points",
    "segment",
    "speech_to_text",
    "tagging",
    "volume",
    "whisper",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return importlib.import_module(f"mmadapt.tasks.{name}")
    from mmadapt.errors import no_attribute

    raise no_attribute("mmadapt.tasks", name, __all__)


def __dir__() -> list[str]:
    return sorted(__all__)
