"""Anatomies: for each family of backbones, a table of the roles its modules play.

An anatomy is data. Which one fits a model is found by the model's class name, so that no
backbone library is imported before one of its models is there. A third party announces one through
the entry-point group `mmadapt.anatomies` (name: "module.Class", value: a function of the model).
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mmadapt.core.known import KNOWN
from mmadapt.core.site import BIAS, Derived, SiteView, Span
from mmadapt.errors import SiteError

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Anatomy:
    """What mmadapt knows of one family of backbones.

    Roles are written with `[i]` where a layer index stands, module paths with `{i}`.
    """

    #: name of the family; adapter files of one family fit every library that implements it
    family: str
    spans: Mapping[str, Span]
    #: per tower, the module whose call runs all of the tower's blocks
    towers: Mapping[str, str] = field(default_factory=dict)
    #: read-only taps: role -> "module path:out" or, for what the module is given, "module path:in"
    #: and "module path:kw:keyword"; or one derived from such
    taps: Mapping[str, str | Derived] = field(default_factory=dict)
    #: path of a tower -> function (module, args, kwargs of its call) -> facts about this forward pass,
    #: every one it knows, None where the call does not say; "mask": bool (B, T), False for padding; "tokens": how many T are
    fills: Mapping[str, Callable[..., dict[str, Any]]] = field(default_factory=dict)
    #: attribute of a module, by its path -> what it is while something is attached
    settings: Mapping[str, Any] = field(default_factory=dict)
    #: plain facts that must be equal for an adapter file to fit (sizes, vocabulary, activation)
    facts: Callable[[Any], dict[str, Any]] | None = None
    #: names that have changed: old role, or its beginning -> the present one
    aliases: Mapping[str, str] = field(default_factory=dict)
    #: "image" / "text" -> function (model, batch) -> pooled embeddings (B, D), not normalised
    encode: Mapping[str, Callable[[Any, Any], Any]] = field(default_factory=dict)

    @classmethod
    def from_paths(cls, model: nn.Module, paths: Mapping[str, str]) -> Anatomy:
        """An anatomy of your own: role -> path of the module that plays it.

        Where `[i]` stands in a role and `{i}` in its path, every child of that list gets a role.
        Linears and norms can be met at all ports, convolutions at their weight, other modules at
        their call, whose width is read from the weights inside; biases become roles of their own.
        Raises `BackboneError` for a path that is not there.

            anatomy = mm.Anatomy.from_paths(net, {"layers[i].mlp": "trunk.{i}.ff", "head": "out"})
            backbone = mm.Backbone(net, anatomy=anatomy)
        """
        return importlib.import_module("mmadapt.backbones.generic").named(model, paths)

    def roles(self, model: nn.Module) -> dict[str, Span]:
        """Every role this model really has, with its span: those of the table, then their biases."""
        found: dict[str, Span] = {}
        find = dict(model.named_modules(remove_duplicate=False)).__getitem__
        for role, span in self.spans.items():
            for index in _indices(find, span.module) if "[i]" in role else (None,):
                concrete = _at(span, index)
                if _has(find, concrete):
                    found[role.replace("[i]", f"[{index}]")] = concrete
        biases = {f"{role}.{BIAS}": _bias(find, span) for role, span in found.items()}
        return found | {role: span for role, span in biases.items() if span is not None}

    def former(self, roles: Iterable[str]) -> dict[str, str]:
        """Every old name of these roles, and the role it stands for now."""
        found = {}
        for old, new in self.aliases.items():
            begins = re.compile(re.escape(new).replace(r"\[i\]", r"\[(\d+)\]") + r"(?=\.|$)")
            for role in roles:
                match = begins.match(role)
                if match:
                    name = old.replace("[i]", f"[{match[1]}]") if match.groups() else old
                    found[name + role[match.end() :]] = role
        return found

    def view(self, model: nn.Module, role: str, port: str, span: Span) -> SiteView:
        """The site `role:port` of `model`, with its module, widths and weight looked up."""
        from mmadapt.core.host import execution_device

        module = model.get_submodule(span.module)
        width = width_in = 0
        holder, parameter, rows = None, "", (0, 0)
        reference = None
        if span.weight:
            path, _, parameter = span.weight.rpartition(".")
            holder = model.get_submodule(path)
            reference = weight = holder.get_parameter(parameter)
            width = weight.shape[0] // span.block[1]
            width_in = weight[:1].numel() if weight.ndim > 1 else width
            rows = (span.block[0] * width, (span.block[0] + 1) * width)
        if span.channels:
            reference, width = _sized(model.get_submodule, span.channels)
            width_in = width
        if span.channels_in:
            _, width_in = _sized(model.get_submodule, span.channels_in)
        return SiteView(
            name=f"{role}:{port}",
            port=port,
            span=span,
            module=module,
            width=width,
            width_in=width_in,
            holder=holder,
            parameter=parameter,
            rows=rows,
            reference=reference,
            device=None
            if reference is None
            else execution_device(reference, holder, module, model),
            attention=None
            if span.attention is None
            else span.attention(model.get_submodule(span.module.rpartition(".")[0])),
        )

    def tap(self, role: str, name: str) -> tuple[str, str | Derived]:
        """Resolve a layer's tap `name` beside the site `role`: (tap role, "module path:out" or derived).

        The nearest one counts: a role's own, then that of the module around it, up to the model's.
        """
        index = role.rpartition("]")[0].rpartition("[")[2]
        words = role.split(".")
        for depth in range(len(words), -1, -1):
            wanted = ".".join([*words[:depth], name])
            template = wanted.replace(f"[{index}]", "[i]") if index else wanted
            if template in self.taps:
                tap = self.taps[template]
                if isinstance(tap, str):
                    return wanted, tap.replace("{i}", index)
                sources = tuple(source.replace("{i}", index) for source in tap.sources)
                return wanted, Derived(sources, tap.compute)
        raise SiteError(
            f"a layer at {role!r} reads the tap {name!r}, which this anatomy does not offer",
            "taps are " + (", ".join(self.taps) or "none"),
        )


_Find = Callable[[str], "nn.Module"]  # the module at a path


def _indices(find: _Find, path: str) -> range:
    """Indices of the repeated blocks that `{i}` in `path` stands for; empty where there are none."""
    container, _, _ = path.partition(".{i}")
    try:
        return range(len(list(find(container).children())))
    except KeyError:
        return range(0)


def _at(span: Span, index: int | None) -> Span:
    if index is None:
        return span
    from dataclasses import replace

    def put(path: str) -> str:
        return path.replace("{i}", str(index))

    return replace(
        span,
        module=put(span.module),
        channels=put(span.channels),
        channels_in=put(span.channels_in),
        weight=put(span.weight),
    )


def _bias(find: _Find, span: Span) -> Span | None:
    """The bias beside the span's weight, with the same share of its rows; None without one."""
    path, _, parameter = span.weight.rpartition(".")
    name = bias_name(parameter)
    if not name or getattr(find(path), name, None) is None:
        return None
    where = f"{path}.{name}" if path else name
    return Span(span.module, ("weight",), layout=span.layout, weight=where, block=span.block)


def bias_name(parameter: str) -> str:
    """What the bias beside a weight is called: "in_proj_bias" beside "in_proj_weight"."""
    stem = parameter.removesuffix("weight")
    return f"{stem}bias" if stem != parameter else ""


def _sized(find: _Find, where: str) -> tuple[Tensor, int]:
    """The tensor at "path" or "path@dimension", and its size there."""
    path, _, dimension = where.partition("@")
    owner, _, name = path.rpartition(".")
    tensor = getattr(find(owner), name)  # a parameter or a buffer
    return tensor, tensor.shape[int(dimension or 0)]


def _has(find: _Find, span: Span) -> bool:
    try:
        find(span.module)
        for where in (span.channels, span.channels_in, span.weight):
            if where:
                _sized(find, where)
    except (KeyError, AttributeError, IndexError):
        return False
    return True


def find_anatomy(model: nn.Module) -> Anatomy:
    """The anatomy of `model`, by the name of its class or of a class it inherits from.

    A model of an unknown class is probed for a decoder with rotary positions, else gets the generic
    anatomy of its repeated blocks (`blocks[i]`); without such blocks `BackboneError` says how to name
    modules by hand.
    """
    names = [f"{cls.__module__}.{cls.__qualname__}" for cls in type(model).__mro__]
    for name in names:
        if name in KNOWN:
            module, _, function = KNOWN[name].partition(":")
            return getattr(importlib.import_module(module), function)(model)
    from importlib.metadata import entry_points

    for entry in entry_points(group="mmadapt.anatomies"):
        if entry.name in names:
            return entry.load()(model)
    decoder = importlib.import_module("mmadapt.backbones.llama").probe(model)
    if decoder is not None:
        return decoder
    generic = importlib.import_module("mmadapt.backbones.generic")
    anatomy = generic.generic_anatomy(model)
    if anatomy is None:
        raise generic.no_blocks(model)
    return anatomy
