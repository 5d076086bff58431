"""Views over plain results: widgets, reports and figures.

    w = mm.ui.segment(sam, image)                             # click; w.points, w.mask

Each name is imported on first use, and its module imports nothing heavy before a function is called.
No module bears the name of a function here, which importing it would hide.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmadapt.ui.click import segment

_HOMES = {
    "mmadapt.ui.click": "segment",
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
