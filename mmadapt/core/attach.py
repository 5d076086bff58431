"""The verbs that put adapters into a backbone, switch them and take them out."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from mmadapt.adapter import Adapter
from mmadapt.core.attached import require_bank, require_name
from mmadapt.core.backbone import unwrap, unwrap_model
from mmadapt.core.compose import Composition, Sum, compose
from mmadapt.core.site import select
from mmadapt.errors import AdapterError, SiteError

if TYPE_CHECKING:
    from torch import nn

    from mmadapt.core.anatomy import Anatomy
    from mmadapt.core.attachment import Attachment
    from mmadapt.core.bank import Bank
    from mmadapt.core.site import SiteView


def attach(
    m: Any,
    adapter: Adapter | Sequence[Adapter],
    name: str = "default",
    at: str | Sequence[str] | None = None,
    seed: int | None = None,
    replace: bool = False,
) -> Attachment:
    """Put an adapter, or several under one name, into a backbone, in place.

    Builds a layer at every site `at` selects (default: the adapter's own sites), freezes the
    backbone and makes `name` the only active attachment. Runs no forward pass and leaves the global
    random state alone: `seed` (default: one derived from `name`) feeds a private generator.

    Raises `SiteError`, `AdapterError` or `AttachError` before anything is changed; a name that is
    taken is an error unless `replace=True`.

        att = mm.attach(clip, mm.Bottleneck(32), name="sketch", at="vision.layers[*].mlp")
    """
    from mmadapt.core.install import install

    adapters = as_adapters(adapter)
    model, anatomy, entry = unwrap(m)
    sites = [resolve(model, anatomy, one, at) for one in adapters]
    return install(model, anatomy, entry, adapters, sites, name, seed, replace)


def resolve(
    model: nn.Module, anatomy: Anatomy, adapter: Adapter, at: str | Sequence[str] | None
) -> list[SiteView]:
    """The sites of `model` where `adapter` would be built."""
    if at is not None and not isinstance(at, (str, list, tuple)):
        raise SiteError(
            f"at is {at!r}, expected a site pattern or a list of them", "see mmadapt.sites(model)"
        )
    spans = anatomy.roles(model)
    own = adapter.patterns_among(spans)
    patterns = own if at is None else ([at] if isinstance(at, str) else list(at))
    if not patterns:
        raise SiteError(
            f"{type(adapter).__name__} was given no site",
            "pass at=, for example at='*.layers[*].mlp'",
        )
    if at is None:
        fitting = [p for p in patterns if _matches(p, spans, adapter.ports)]
        # not those that only name a layer too many
        anywhere = {p: re.sub(r"\[[^\]]*\]", "[*]", p) for p in patterns if p not in fitting}
        missing = [p for p, a in anywhere.items() if not _matches(a, spans, adapter.ports)]
        whole = adapter.every_pattern and adapter.at is None  # a method of several parts
        if adapter.elsewhere and missing and (whole or not fitting):
            raise SiteError(
                f"this backbone has no site {' or '.join(map(repr, missing[:2]))}; "
                f"{_offered(spans)}",
                adapter.elsewhere,
            )
        if not adapter.every_pattern:
            patterns = fitting or patterns
    pairs = select(patterns, spans, adapter.ports, anatomy.former(spans))
    return [anatomy.view(model, role, port, spans[role]) for role, port in pairs]


def _matches(pattern: str, spans: Any, ports: tuple[str, ...]) -> bool:
    """Whether `pattern` selects roles, all of which offer a port among `ports`."""
    from mmadapt.core.site import match_roles, offers

    roles, port = match_roles(pattern, spans)
    return bool(roles) and all(
        {port or p for p in ports} & set(offers(spans[role])) for role in roles
    )


def _offered(spans: Any) -> str:
    """What there is instead, in a few words."""
    ends = [role.rpartition("].")[2] for role in spans if not role.endswith(".bias")]
    found = list(dict.fromkeys(end for end in ends if end and not end.endswith("]")))
    return f"it has {', '.join(found[:12])}{' …' if len(found) > 12 else ''}"


def as_adapters(adapter: Adapter | Sequence[Adapter]) -> tuple[Adapter, ...]:
    """One adapter or several as a tuple; anything else is refused."""
    several: tuple[Any, ...] = tuple(adapter) if isinstance(adapter, (list, tuple)) else (adapter,)
    for one in several:
        if not isinstance(one, Adapter):
            what = f"the class {one.__name__}" if isinstance(one, type) else repr(one)
            raise AdapterError(
                f"expected an adapter such as mmadapt.Bottleneck(32), got {what}",
                "call the class to make one" if isinstance(one, type) else "",
            )
    if not several:
        raise AdapterError("no adapter was given", "for example mmadapt.Bottleneck(32)")
    return several


# -- what is attached -----------------------------------------------------------------------


def attachments(m: Any) -> dict[str, Attachment]:
    """What is attached, by name, in the order it came; empty where nothing is."""
    from mmadapt.core.attachment import Attachment
    from mmadapt.core.bank import bank_of

    model = unwrap_model(m)
    bank = bank_of(model)
    return {} if bank is None else {name: Attachment(model, name) for name in bank.records}


def active(m: Any) -> Composition:
    """The composition in force: `Sum()` when none is."""
    return require_bank(m)[1].active


def set_active(m: Any, *names: str | Composition) -> None:
    """Choose which attachments act: one name, several (their changes add up), or a composition.

    Compositions may have weights. Without names the backbone runs bare. Replaces plans on installed
    hooks; costs microseconds.

        mm.set_active(model, mm.Stack("domain", "task"))
        mm.set_active(model, mm.Sum("french", "german", weights=(0.7, 0.3)))
    """
    _, bank = require_bank(m)
    composition = compose(names)
    bank.validate(composition)
    bank.resting = frozenset()
    bank.activate(composition)


@contextlib.contextmanager
def disabled(m: Any, at: str | Sequence[str] | None = None) -> Iterator[Any]:
    """Run the bare backbone inside the block; what was active is active again after it.

    With `at`, a pattern of sites or several, nothing acts there, and elsewhere all goes on:
    `with mm.disabled(m, at="vision.layers[3].mlp"): ...` tells what a layer is worth.
    """
    _, bank = require_bank(m)
    if at is not None:
        before, chosen = bank.resting, bank.resting | sites_at(bank, at)
        bank.rest(chosen)
        try:
            yield m
        finally:
            if bank.resting is chosen:  # else the block chose something itself
                bank.rest(before)
        return
    before = bank.active
    acting = bank.acting
    bank.plans(Sum())
    try:
        yield m
    finally:
        if bank.active is before:  # else the block chose something itself
            bank.plans(before if acting else Sum())


def sites_at(bank: Bank, at: str | Sequence[str]) -> frozenset[str]:
    """Names of the sites, among those where something is attached, that patterns select."""
    from mmadapt.core.site import match_roles, nothing_matched

    found: set[str] = set()
    spans = {hook.site.role: hook.site.span for hook in bank.hooks.values()}
    for pattern in [at] if isinstance(at, str) else at:
        roles, port = match_roles(pattern, spans)
        chosen = {
            name
            for name, hook in bank.hooks.items()
            if hook.site.role in roles and port in (None, hook.site.port)
        }
        if not chosen:
            raise nothing_matched(pattern, spans)
        found |= chosen
    return frozenset(found)


def detach(m: Any, name: str | None = None) -> None:
    """Take one attachment out, or all of them; with the last one the backbone is as it was.

    Its keys, values, hooks, `requires_grad` and train/eval flags are those before the first attach.
    """
    from mmadapt.core.compiled import reset_compiled_code
    from mmadapt.core.merge import take_out

    _, bank = require_bank(m)
    names = list(bank.records) if name is None else [require_name(bank, name, "detach")]
    for merged in [other for other in reversed(bank.merged) if other in names]:
        take_out(bank, merged)
    bank.activate(bank.active.without(*names))
    for one in names:
        bank.drop(one)
    if bank.records:
        bank.uninstall_unused()
    else:
        bank.leave()
    reset_compiled_code()
