"""What older adapter files mean today: one pure function for each schema that was left behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

Upgrade = Callable[
    [dict[str, Any], "dict[str, Tensor]"], tuple[dict[str, Any], "dict[str, Tensor]"]
]


def _to_2(
    manifest: dict[str, Any], tensors: dict[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Every site of a Compacter had its own rule."""
    adapters = manifest.get("adapters")
    if not isinstance(adapters, list):  # the reader says what is wrong with it
        return {**manifest, "schema": 2}, tensors
    upgraded = []
    for data in adapters:
        method = data.get("method") if isinstance(data, dict) else None
        upgraded.append({**data, "shared_rule": False} if method == "compacter" else data)
    return {**manifest, "schema": 2, "adapters": upgraded}, tensors


#: schema -> pure function from a manifest of that schema and its tensors to those of the next
UPGRADES: dict[int, Upgrade] = {1: _to_2}
