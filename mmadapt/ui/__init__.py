"""Views over plain results: widgets, reports and figures.

    w = mm.ui.segment(sam, image)                             # click; w.points, w.mask
    w = mm.ui.mix(model, lambda: model(batch))                # a slider for each attachment
    run = mm.ui.live(model, data, loss=loss)                  # trains beside the notebook

Each name is imported on first use, and its module imports nothing heavy before a function is called.
No module bears the name of a function here, which importing it would hide.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmadapt.ui.click import segment
    from mmadapt.ui.mixing import mix
    from mmadapt.ui.shares import contribution
    from mmadapt.ui.shots import few_shot
    from mmadapt.ui.sound import audio
    from mmadapt.ui.training import live
    from mmadapt.ui.tree import inspect

_HOMES = {
    "mmadapt.ui.click": "segment",
    "mmadapt.ui.mixing": "mix",
    "mmadapt.ui.shares": "contribution",
    "mmadapt.ui.shots": "few_shot",
    "mmadapt.ui.sound": "audio",
    "mmadapt.ui.training": "live",
    "mmadapt.ui.tree": "inspect",
}
_HOME = {name: module for module, names in _HOMES.items() for name in names.split()}

__all__ = [*sorted(_HOME)]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    from mmadapt.errors import no_attribute

    raise no_attribute("mmadapt.ui", name, __all__)


def __dir__() -> list[str]:
    return sorted(__all__)
