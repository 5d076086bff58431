"""A page for every registered method: its formula, source, sites, costs, laws, and an example."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Iterator

import backbone_pages
import law_facts as laws
import markup as md
import named_models

import mmadapt as mm
from mmadapt.adapter import Adapter, adapters
from mmadapt.core.table import count

#: what is counted where a method has no sites of its own
COUNTED: dict[str, Adapter] = {
    "unlock": mm.Unlock(at=("*.layers[*].norm1", "*.layers[*].norm2")),
}


def pages() -> dict[str, str]:
    """Every page by its place in the site, the overview first."""
    own = {m: cls for m, cls in adapters().items() if cls.__module__.startswith("mmadapt.")}
    one_each = {place_of(cls): page(cls) for cls in own.values()}
    return {"methods/index.md": overview(list(own.values())), **one_each}


def place_of(cls: type[Adapter]) -> str:
    """Where the page of a method stands in the site."""
    return f"methods/{cls.method}.md"


def overview(methods: list[type[Adapter]]) -> str:
    """All methods in one table."""
    rows = [
        (f"[`{cls.__name__}`]({cls.method}.md)", md.first_sentence(cls), md.linked(cls.source))
        for cls in sorted(methods, key=lambda each: each.__name__.lower())
    ]
    return "\n\n".join(
        (
            "# Methods",
            "A method is a frozen dataclass of hyper-parameters, importable without torch. It says which "
            "sites it wants and builds a layer at each. Every page is made from the registry: formulas "
            "are the docstrings of the code that computes them, counts are `mm.plan`'s.",
            md.table(("method", "what it is", "paper"), rows),
            "Every method obeys [the laws](../laws.md). One of your own is a dataclass and a layer; "
            "[`tests/test_newcomer.py`](../../tests/test_newcomer.py) shows one whole.",
        )
    )


def page(cls: type[Adapter]) -> str:
    """All that is known of one method."""
    return "\n\n".join(_parts(cls)) + "\n"


def _parts(cls: type[Adapter]) -> Iterator[str]:
    method = cls.method
    first, *rest = md.docstring(cls)
    yield f"# {cls.__name__}"
    yield first
    yield f"Source: {md.linked(cls.source)}. In adapter files it is called `{method}`; every field is in the [reference][mmadapt.{cls.__name__}]."
    if formula(cls):
        yield "## Formula"
        yield from formula(cls)
    yield "## Example"
    yield md.block(md.runnable(example(cls)), "python")
    yield "## How it works"
    yield from (md.shown(part) for part in rest if not _is_example(part))
    yield "## Sites"
    yield from _sites(cls)
    yield "## Hyper-parameters"
    yield from _fields(cls)
    yield "## What it costs"
    yield from _costs(cls)
    yield "## Backbones and laws"
    yield from _laws(method)


def _is_example(paragraph: str) -> bool:
    return md.is_code(paragraph) and "mm." in paragraph


def example(cls: type[Adapter]) -> str:
    """The example in a method's docstring, which runs; "" where it has none."""
    found = [part for part in md.docstring(cls) if _is_example(part)]
    return inspect.cleandoc(found[-1]) if found else ""


def formula(cls: type[Adapter]) -> list[str]:
    """Papers and formulas from the docstring of the module that computes the method.

    A module of several methods begins a section with each paper; the method's own are those that
    name its papers.
    """
    import importlib

    module = importlib.import_module((cls.layer or cls.shared).partition(":")[0])
    _, *parts = md.paragraphs(module.__doc__ or "")
    sections: list[list[str]] = [[]]
    for part in parts:
        if md.papers(part) and any(md.is_code(each) for each in sections[-1]):
            sections.append([])
        sections[-1].append(part)
    alone = sum(_module_of(each) == module.__name__ for each in set(adapters().values())) == 1
    wanted = md.papers(cls.source)
    own = [s for s in sections if alone or wanted & md.papers(" ".join(s))] or sections
    return [md.shown(part) for section in own for part in section]


def _module_of(cls: type[Adapter]) -> str:
    return (cls.layer or cls.shared).partition(":")[0]


def _default(cls: type[Adapter]) -> Adapter:
    return COUNTED.get(cls.method) or cls()


def _sites(cls: type[Adapter]) -> Iterator[str]:
    default = cls()
    if default.patterns:
        yield "Without `at=` it stands at"
        yield "\n".join(f"- `{pattern}`" for pattern in default.patterns)
    else:
        yield "It has no sites of its own: name them with `at=`."
    yield f"Ports it can use, preferred first: {', '.join(md.code(port) for port in cls.ports)}."
    if cls.elsewhere:
        yield f"On a backbone without these sites: {cls.elsewhere}."


def _fields(cls: type[Adapter]) -> Iterator[str]:
    fields = [field for field in dataclasses.fields(cls) if field.name != "at"]
    rows = [(md.code(f.name), md.code(_type(cls, f.name)), md.code(_value(f))) for f in fields]
    if rows:
        yield md.table(("name", "type", "default"), rows)
    yield "`at`, by keyword, names other sites."
    presets = _presets(cls)
    if presets:
        yield "Published configurations:"
        names = [f"`{cls.__name__}.{name}{signature}`" for name, signature in presets]
        yield md.table(
            ("preset", "what it is"),
            [
                (n, md.linked(md.first_sentence(getattr(cls, p[0]))))
                for n, p in zip(names, presets, strict=True)
            ],
        )


def _type(cls: type[Adapter], name: str) -> str:
    hint = typing.get_type_hints(cls, include_extras=True)[name]
    choices = [each for part in (hint, *typing.get_args(hint)) for each in _literals(part)]
    if choices:
        return " | ".join(map(repr, choices)) + (
            " | None" if type(None) in typing.get_args(hint) else ""
        )
    text = inspect.formatannotation(hint)
    return text.replace("typing.", "").replace("<class ", "").replace("NoneType", "None")


def _literals(hint: typing.Any) -> tuple[typing.Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()


def _value(field: dataclasses.Field) -> str:
    return "required" if field.default is dataclasses.MISSING else repr(field.default)


def _presets(cls: type[Adapter]) -> list[tuple[str, str]]:
    """(name, signature) of the class methods that make a configured adapter, or several."""
    found = []
    for name, member in vars(cls).items():
        if isinstance(member, classmethod) and not name.startswith("_"):
            signature = inspect.signature(getattr(cls, name))
            plain = ", ".join(
                str(p.replace(annotation=inspect.Parameter.empty)).replace("'", '"')
                for p in signature.parameters.values()
            )
            found.append((name, f"({plain})"))
    return found


def _costs(cls: type[Adapter]) -> Iterator[str]:
    adapter = _default(cls)
    rows = [
        (name, sites, count(trained), f"{share:.2g} %")
        for name, sites, trained, share in named_models.costs(adapter)
    ]
    if not rows:
        yield "None of the models that are counted offers its sites."
        return
    yield f"Of `{adapter!r}`, counted by `mm.plan`; the share is of the model's own numbers."
    yield md.table(("model", "sites", "trained numbers", "share"), rows, right=(1, 2, 3))


def _laws(method: str) -> Iterator[str]:
    yield "Its [laws](../laws.md) run on small random models of these backbones:"
    pages: dict[str, list[str]] = {}
    for name in laws.hosts(method):
        pages.setdefault(backbone_pages.table_of(name), []).append(name)
    yield "\n".join(
        f"- [{backbone_pages.title_of(table)}](../{backbone_pages.place_of(table)}): "
        + ", ".join(map(md.code, names))
        for table, names in pages.items()
    )
    tried = [f"`{adapter!r}`" for adapter in laws.variants(method).values()]
    yield f"Tried are {', '.join(dict.fromkeys(tried))}."
    points = []
    cls = adapters()[method]
    if cls.not_identity:
        points.append(f"It is not always the identity at the start: {cls.not_identity}.")
    else:
        points.append("It starts as the identity.")
    reason = laws.merges(method)
    points.append(f"It does not merge: {reason}" if reason else "It merges into the weights.")
    points += [f"Exempt from “{law}”: {why}." for law, why in laws.exemptions(method).items()]
    points += [
        f"The gradient of `{part}` may be zero: {why}." for part, why in laws.quiet(method).items()
    ]
    points += [
        f"Refused on {backbone}{f' ({variant})' if variant else ''}: {why}."
        for variant, backbone, why in laws.misfits(method)
    ]
    yield "\n".join(f"- {point}" for point in points)
