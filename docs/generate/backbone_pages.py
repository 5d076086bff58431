"""A page for every table of backbones: its classes, and the sites, taps, towers and traps of tiny models."""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Iterator
from typing import Any

import law_facts as laws
import markup as md

from mmadapt.core.anatomy import Anatomy, find_anatomy
from mmadapt.core.known import KNOWN
from mmadapt.core.site import BIAS, Derived, Span

PACKAGE = "mmadapt.backbones"
#: between the sizes of a shape, so that no line ends there
TIMES = "\N{NO-BREAK SPACE}×\N{NO-BREAK SPACE}"
#: what the letters of a layout stand for
LETTERS = (
    "B batch, T tokens, H rows, W columns, P prompts of an image, C channels, D pooled features, "
    "K classes"
)


def tables() -> dict[str, list[str]]:
    """Every module of tables by its name, with the classes of models it describes; the generic one last."""
    found: dict[str, list[str]] = {}
    for cls, where in KNOWN.items():
        found.setdefault(where.partition(":")[0].rpartition(".")[2], []).append(cls)
    return {**dict(sorted(found.items())), "generic": []}


def place_of(table: str) -> str:
    """Where the page of a module of tables stands in the site."""
    return f"backbones/{table}.md"


def places() -> list[str]:
    """Where the pages of all modules of tables stand."""
    return [place_of(table) for table in tables()]


@functools.cache
def table_of(name: str) -> str:
    """The module whose table describes a tiny backbone."""
    model = laws.tiny.ALL[name].prototype
    for cls in type(model).__mro__:
        where = KNOWN.get(f"{cls.__module__}.{cls.__qualname__}")
        if where:
            return where.partition(":")[0].rpartition(".")[2]
    decoder = importlib.import_module(f"{PACKAGE}.llama").probe(model)
    return "generic" if decoder is None else "llama"


def title_of(table: str) -> str:
    """What a page is called: the beginning of its module's docstring."""
    doc = importlib.import_module(f"{PACKAGE}.{table}").__doc__ or ""
    return re.split(r"[:.]\s|, with |\.$", " ".join(doc.split("\n\n")[0].split()))[0]


def pages() -> dict[str, str]:
    """Every page by its place in the site, the overview first."""
    one_each = {place_of(table): page(table, classes) for table, classes in tables().items()}
    return {"backbones/index.md": overview(), **one_each}


def overview() -> str:
    """All tables of backbones in one."""
    rows = [
        (f"[{title_of(table)}]({table}.md)", ", ".join(_short(classes)) or "any other module")
        for table, classes in tables().items()
    ]
    return "\n\n".join(
        (
            "# Backbones",
            "For each family of backbones a table, its anatomy, names the roles that modules play. "
            "It is found by the class of the model, without importing the library it comes from. "
            "Names of sites are the same in every library that implements a family, so adapter files "
            "fit all of them. What no table knows gets the [generic](generic.md) one.",
            md.table(("backbone", "classes"), rows),
            "A table of your own: [`mmadapt.Anatomy`][mmadapt.Anatomy].",
        )
    )


def _short(classes: list[str]) -> list[str]:
    return [f"`{cls.partition('.')[0]}.{cls.rpartition('.')[2]}`" for cls in classes]


def page(table: str, classes: list[str]) -> str:
    """All that a module of tables says of its backbones."""
    return "\n\n".join(_parts(table, classes)) + "\n"


def _parts(table: str, classes: list[str]) -> Iterator[str]:
    module = importlib.import_module(f"{PACKAGE}.{table}")
    yield f"# {title_of(table)}"
    yield from (md.shown(part) for part in md.paragraphs(module.__doc__ or ""))
    functions = dict.fromkeys(KNOWN[cls].partition(":")[2] for cls in classes)
    if functions:
        yield "## Classes"
        yield md.table(
            ("table", "classes"),
            [
                (
                    md.first_sentence(getattr(module, name)),
                    ", ".join(_short([c for c in classes if KNOWN[c].endswith(f":{name}")])),
                )
                for name in functions
            ],
        )
    shown = [name for name in laws.tiny.BACKBONES if table_of(name) == table]
    others = [name for name in laws.tiny.RELATIVES if table_of(name) == table]
    yield "## Sites"
    yield (
        "Of small random models of the real classes, with the shapes that a batch of two gives there. "
        f"Layouts: {LETTERS}. Where a site has the port `out`, a method may stand `around` the call, too."
    )
    for name in shown or others[:1]:
        yield from _tiny(name)
    if others:
        yield "Tested beside them, with the same table:"
        yield "\n".join(f"- `{_class(name)}`" for name in others)
    yield "## Methods"
    fitting = [m for m in laws.adapters() if set(laws.hosts(m)) & set(shown)]
    links = [f"[{laws.adapters()[m].__name__}](../methods/{m}.md)" for m in fitting]
    yield f"The laws run here for {', '.join(links) or 'none'}."
    refused = [
        f"- [{laws.adapters()[method].__name__}](../methods/{method}.md) is refused on `{on}`"
        f"{f' ({variant})' if variant else ''}: {why}."
        for method in laws.adapters()
        for variant, on, why in laws.misfits(method)
        if on in shown
    ]
    yield from ["\n".join(refused)] if refused else []


def _class(name: str) -> str:
    cls = type(laws.tiny.ALL[name].prototype)
    return f"{cls.__module__.partition('.')[0]}.{cls.__name__}"


def _tiny(name: str) -> Iterator[str]:
    model = laws.tiny.ALL[name].prototype
    anatomy = find_anatomy(model)
    roles = anatomy.roles(model)
    yield f"### {name}"
    yield f"`{_class(name)}`, family `{anatomy.family}`."
    shapes = shapes_of(name, roles)
    groups: dict[tuple[str, ...], list[tuple[str, str]]] = {}
    biases = sum(role.endswith(f".{BIAS}") for role in roles)
    for role, span in roles.items():
        if not role.endswith(f".{BIAS}"):
            layout = span.layout if set(span.ports) & {"in", "out"} else ""
            path = _code(re.sub(r"\.\d+(?=\.|$)", ".*", span.module))
            key = (md.code(_general(role)), " ".join(span.ports), layout, path)
            sizes = (shapes[role] if layout else "", _weight(model, anatomy, role, span))
            groups.setdefault(key, []).append(sizes)
    rows = [
        (
            site,
            ports,
            len(sizes),
            *(_span(list(dict.fromkeys(each))) for each in zip(*sizes, strict=True)),
            layout,
            path,
        )
        for (site, ports, layout, path), sizes in groups.items()
    ]
    yield md.table(("site", "ports", "count", "gives", "weight", "layout", "module"), rows, (2,))
    if biases:
        yield f"Beside them stand {biases} biases, such as `{_general(next(r for r in roles if r.endswith(BIAS)))}`, with a `weight` port."
    yield from _facts(anatomy)
    traps = list(_traps(roles))
    if traps:
        yield "Traps:"
        yield "\n".join(f"- {trap}" for trap in traps)


def _span(shapes: list[str]) -> str:
    return " or ".join(shapes) if len(shapes) < 3 else f"{shapes[0]} … {shapes[-1]}"


def _general(role: str) -> str:
    return re.sub(r"\[\d+\]", "[*]", role)


def _weight(model: Any, anatomy: Anatomy, role: str, span: Span) -> str:
    if not span.weight:
        return ""
    view = anatomy.view(model, role, "weight", span)
    weight = view.holder.get_parameter(view.parameter)
    shape = (weight.shape[0] // span.block[1], *weight.shape[1:])
    return TIMES.join(map(str, shape))


def shapes_of(name: str, roles: dict[str, Span]) -> dict[str, str]:
    """The shape of what each role's module gives to a batch of two; "" where it gives several tensors."""
    import torch

    tiny = laws.tiny.ALL[name]
    model = tiny.fresh()
    seen: dict[str, str] = {}

    def watch(role: str, span: Span) -> Any:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            seen[role] = ""
            value = _field(output, span.y)
            if getattr(value, "ndim", 0):  # of a fused linear, the role's own columns
                shape = (*value.shape[:-1], value.shape[-1] // span.block[1])
                seen[role] = TIMES.join(map(str, shape))

        return model.get_submodule(span.module).register_forward_hook(hook)

    handles = [watch(role, span) for role, span in roles.items()]
    with torch.no_grad():
        tiny.call(model, tiny.batch(2))
    for handle in handles:
        handle.remove()
    return {role: seen.get(role, "not called") for role in roles}


def _field(output: Any, which: int | str) -> Any:
    if isinstance(which, str):
        return getattr(output, which, None)
    output = output.to_tuple() if hasattr(output, "to_tuple") else output
    return output[which] if isinstance(output, (tuple, list)) else output


def _facts(anatomy: Anatomy) -> Iterator[str]:
    """Towers, and behind a fold what layers may read beside their site."""
    lines = [f"Tower `{tower}` runs in {_code(path)}." for tower, path in anatomy.towers.items()]
    lines += [
        f"Read from the call of {_code(path)}: {' '.join((fill.__doc__ or fill.__name__).split())}"
        for path, fill in anatomy.fills.items()
    ]
    lines += [
        f"While something is attached `{where}` is `{value}`."
        for where, value in anatomy.settings.items()
    ]
    lines += [f"`{old}` is another name of `{new}`." for old, new in anatomy.aliases.items()]
    yield "\n".join(f"- {line}" for line in lines)
    if anatomy.taps:
        rows = [(md.code(role), _source(tap)) for role, tap in anatomy.taps.items()]
        yield md.folded("Taps, which layers may read", md.table(("tap", "where"), rows))


def _code(path: str) -> str:
    return md.code(path) if path else "the model itself"


def _source(tap: str | Derived) -> str:
    if isinstance(tap, str):
        return md.code(tap)
    return "computed from " + ", ".join(map(md.code, tap.sources))


def _traps(roles: dict[str, Span]) -> Iterator[str]:
    """What the spans themselves say that would surprise someone who hooks modules by hand."""
    groups: dict[str, dict[str, None]] = {}
    for role, span in roles.items():
        if role.endswith(f".{BIAS}"):
            continue
        name = md.code(_general(role))
        if span.ports == ("weight",):
            groups.setdefault("weight", {})[name] = None
        if span.block[1] > 1:
            groups.setdefault("block", {})[name] = None
        if span.rows == "several":
            groups.setdefault("several", {})[name] = None
        if not span.aligned:
            groups.setdefault("unaligned", {})[name] = None
    says = {
        "weight": "Read as weights without being called, where a hook on a module would train nothing: {}.",
        "block": "A share of a fused weight: {}.",
        "several": "Several rows for each row of the batch, side by side: {}.",
        "unaligned": "What goes in and what comes out differ in positions or layout: {}.",
    }
    for key, sentence in says.items():
        if key in groups:
            yield sentence.format(", ".join(groups[key]))
