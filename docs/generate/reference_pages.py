"""Pages of the reference: which names stand on which, for mkdocstrings to fill from the docstrings."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from typing import Any

import markup as md

import mmadapt as mm
from mmadapt.adapter import adapters

#: name of a page -> (title, module whose public names stand on it)
MODULES = {
    "errors": ("Errors", "mmadapt.errors"),
    "interop": ("Other libraries' files", "mmadapt.interop"),
    "ops": ("Operations", "mmadapt.ops"),
    "ui": ("Widgets", "mmadapt.ui"),
    "zoo": ("The zoo", "mmadapt.zoo"),
}


def pages() -> dict[str, str]:
    """Every page by its place in the site, the overview first."""
    names = [
        name for name in mm.__all__ if not inspect.ismodule(getattr(mm, name)) and name[0] != "_"
    ]
    methods = sorted(
        (cls.__name__ for cls in adapters().values() if cls.__name__ in names), key=str.lower
    )
    verbs = [name for name in names if name[0].islower()]
    objects = [name for name in names if name not in (*methods, *verbs)]
    found = {
        "verbs": _page("Verbs", [f"mmadapt.{name}" for name in verbs]),
        "objects": _page("Objects", [f"mmadapt.{name}" for name in objects]),
        "adapters": _page("Adapters", [f"mmadapt.{name}" for name in methods]),
        **{place: _page(title, _public(module)) for place, (title, module) in MODULES.items()},
        **{f"tasks.{name}": _task(name) for name in _tasks()},
    }
    groups = {"verbs": verbs, "objects": objects, "adapters": methods}
    return {
        "reference/index.md": overview(groups),
        **{f"reference/{place}.md": text for place, text in found.items()},
    }


def overview(groups: dict[str, list[str]]) -> str:
    """Every name of `mm`, with what its docstring begins with."""
    parts = [
        "# Reference",
        "Every public name, from its docstring. `import mmadapt as mm` comes first.",
    ]
    for title, names in groups.items():
        rows = [
            (f"[`mm.{name}`][mmadapt.{name}]", md.first_sentence(getattr(mm, name)))
            for name in names
        ]
        parts += [f"## {title.capitalize()}", md.table(("name", "what it does"), rows)]
    parts += ["## Tasks"]
    tasks = [
        (f"[`mm.tasks.{name}`](tasks.{name}.md)", md.first_sentence(_module(name)))
        for name in _tasks()
    ]
    parts += [md.table(("module", "what it is for"), tasks)]
    return "\n\n".join(parts)


def _page(title: str, names: list[str]) -> str:
    return "\n\n".join([f"# {title}", *(f"::: {name}" for name in names)])


def _public(name: str) -> list[str]:
    """The functions and classes that a module offers: those of `__all__`, or what it defines itself."""
    module = importlib.import_module(name)
    own = [
        key
        for key, value in vars(module).items()
        if key[0] != "_" and getattr(value, "__module__", None) == name
    ]
    found = {key: getattr(module, key) for key in getattr(module, "__all__", own)}
    return [
        f"{name}.{key}"
        for key, value in found.items()
        if inspect.isclass(value) or inspect.isfunction(value)
    ]


def _tasks() -> list[str]:
    import mmadapt.tasks

    return [info.name for info in pkgutil.iter_modules(mmadapt.tasks.__path__)]


def _module(name: str) -> Any:
    return importlib.import_module(f"mmadapt.tasks.{name}")


def _task(name: str) -> str:
    """A module of a task: what it is for, and its names."""
    begin, *rest = md.docstring(_module(name))
    if rest and rest[0].startswith("from mmadapt"):
        shown = [md.block("\n\n".join(rest), "python")]
    else:
        shown = [md.shown(part, "python") for part in rest]
    names = _public(f"mmadapt.tasks.{name}")
    return "\n\n".join([f"# tasks.{name}", begin, *shown, *(f"::: {each}" for each in names)])
