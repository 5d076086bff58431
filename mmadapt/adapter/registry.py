"""Every adapter by the name its files carry, and adapters as JSON."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

from mmadapt.adapter.base import Adapter
from mmadapt.errors import AdapterError, did_you_mean

_REGISTRY: dict[str, type[Adapter]] = {}
_A = TypeVar("_A", bound=Adapter)


def register_adapter(cls: type[_A]) -> type[_A]:
    """Class decorator: make an adapter known by its `method` name, so that its files load."""
    if not cls.method:
        raise AdapterError(f"{cls.__name__} has no method name", "set the class variable `method`")
    known = _REGISTRY.get(cls.method)
    if known is not None and known.__qualname__ != cls.__qualname__:
        raise AdapterError(f"method {cls.method!r} is already registered by {known.__name__}")
    _REGISTRY[cls.method] = cls
    cls.__repr__ = _short_repr
    return cls


def _short_repr(self: Any) -> str:
    """The class and the hyper-parameters that differ from their defaults."""
    fields = [
        f"{f.name}={getattr(self, f.name)!r}"
        for f in dataclasses.fields(self)
        if getattr(self, f.name) != f.default
    ]
    return f"{type(self).__name__}({', '.join(fields)})"


def adapters() -> dict[str, type[Adapter]]:
    """Every registered adapter class by method name, those of installed plug-ins included."""
    from importlib.metadata import entry_points

    for entry in entry_points(group="mmadapt.adapters"):
        if entry.name not in _REGISTRY:
            register_adapter(entry.load())
    return dict(sorted(_REGISTRY.items()))


def from_json(data: dict[str, Any]) -> Adapter:
    """Rebuild an adapter from `Adapter.to_json`; unknown methods and fields are refused by name."""
    fields = dict(data)
    method = fields.pop("method", None)
    known = _REGISTRY if method in _REGISTRY else adapters()  # plug-ins are looked for on disk
    if not isinstance(method, str) or method not in known:
        raise AdapterError(f"unknown adapter method {method!r}", did_you_mean(str(method), known))
    cls = known[method]
    allowed = [f.name for f in dataclasses.fields(cls)]
    for name in fields:
        if name not in allowed:
            raise AdapterError(
                f"{cls.__name__} has no hyper-parameter {name!r}", did_you_mean(name, allowed)
            )
    return cls(**fields)
