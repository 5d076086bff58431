"""The operations adapters are made of, each defined once; `explain` says which path runs and why."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmadapt.ops.explanation import Explanation, explain

__all__ = ["Explanation", "explain"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from mmadapt.ops import explanation

        return getattr(explanation, name)
    raise AttributeError(f"module 'mmadapt.ops' has no attribute {name!r}")
