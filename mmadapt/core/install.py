"""Layers built at resolved sites and registered on a backbone: the end of `attach` and of loading."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from mmadapt.core.attached import check_name
from mmadapt.core.attachment import Attachment
from mmadapt.core.bank import (
    BANK,
    SHARED,
    Bank,
    Record,
    bank_of,
    seeded,
)
from mmadapt.core.combined import check_sums
from mmadapt.core.compiled import reset_compiled_code
from mmadapt.core.compose import Sum
from mmadapt.core.dispatch import ShareHook, SiteHook
from mmadapt.core.effective import WeightHook
from mmadapt.core.host import why_not_plain
from mmadapt.core.merge import take_out
from mmadapt.core.table import shape_of
from mmadapt.errors import AdapterError, AdapterFileError, AttachError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from mmadapt.adapter import Adapter
    from mmadapt.core.anatomy import Anatomy
    from mmadapt.core.layer import Layer
    from mmadapt.core.site import SiteView


def install(
    model: nn.Module,
    anatomy: Anatomy,
    entry: Any,
    adapters: tuple[Adapter, ...],
    sites: list[list[SiteView]],
    name: str,
    seed: int | None = None,
    replace: bool = False,
    tensors: dict[str, Any] | None = None,
) -> Attachment:
    """Build layers at resolved sites and register them; the end of `attach` and `load_adapter`.

    `tensors`, by file key, are copied into the layers before the backbone is touched.
    """
    check_name(name)
    bank = bank_of(model)
    if bank is not None and name in bank.records and not replace:
        raise AttachError(
            f"an attachment named {name!r} is already there",
            "pass replace=True to put the new one in its place, or choose another name",
        )
    _check_root(model)
    _check_alone(model)
    for site in (site for chosen in sites for site in chosen):
        _check_weight(site)
    generator = seeded(name, seed)
    layers: dict[str, Layer] = {}
    together: dict[str, list[Layer]] = {}
    for index, (adapter, chosen) in enumerate(zip(adapters, sites, strict=True)):
        for place, layer in build(adapter, chosen, generator).items():
            layers[f"{index}/{place}"] = layer
            if place != SHARED:
                together.setdefault(place, []).append(layer)
    check_sums(together)
    taps = {site.name: {} for chosen in sites for site in chosen}
    for index, chosen in enumerate(sites):
        for site in chosen:
            words = set(layers[f"{index}/{site.name}"].taps)
            if site.span.x.startswith("tap:"):
                words.add(site.span.x[4:])
            for word in sorted(words):
                taps[site.name].update(site.bind(word, *anatomy.tap(site.role, word)))
    if tensors is not None:
        fill(layers, tensors)
    # nothing has been changed up to here, and nothing below can fail for a user's mistake
    if bank is not None and name in bank.records:
        if name in bank.merged:
            take_out(bank, name)
        bank.drop(name)
    if bank is None:
        bank = Bank(model, anatomy, entry)
        bank.seat()
        bank.installed.follow_passes()
        bank.installed.settle()
    record = Record(adapters, tuple(tuple(site.name for site in chosen) for chosen in sites))
    bank.put(name, record, layers)
    for site in (site for chosen in sites for site in chosen):
        bank.installed.put(site, taps[site.name])
    bank.uninstall_unused()
    bank.installed.watch_first_forward()
    bank.active = bank.active.without(*(set(bank.active.names) - set(bank.records)))
    bank.activate(Sum(name))
    reset_compiled_code()
    return Attachment(model, name)


def build(
    adapter: Adapter, sites: Sequence[SiteView], generator: torch.Generator
) -> dict[str, Layer]:
    """The layers of one adapter by site name, last what they share, under "shared"."""
    shared = adapter.build_shared(sites, generator)
    layers = {site.name: adapter.build(site, generator) for site in sites}
    if shared is None:
        return layers
    devices = {str(site.reference.device): None for site in sites if site.reference is not None}
    if len(devices) > 1:
        raise AdapterError(
            f"{type(adapter).__name__} shares tensors among its sites, which lie on "
            f"{' and '.join(devices)}",
            "attach one for the sites of each device",
        )
    for layer in layers.values():
        layer.share(shared)
    return {**layers, SHARED: shared}


def _check_root(model: nn.Module) -> None:
    if isinstance(model, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        raise AttachError(
            f"a {type(model).__name__} calls or counts every module it holds, the adapters' bank too",
            "wrap it in a module whose forward calls it, and attach to that",
        )


def _check_weight(site: SiteView) -> None:
    """Weights that are no plain tensors are met by the calls of their modules, or not at all."""
    if site.device is not None and site.device.type == "meta":
        raise AttachError(
            f"the weights at {site.name} are on the meta device, so there is nowhere to build a layer",
            "load the model's weights first",
        )
    if site.port != "weight" or site.holder is None:
        return
    reason = why_not_plain(site.holder.get_parameter(site.parameter))
    if reason:
        called = "out" in site.span.ports
        raise AttachError(
            f"the weight at {site.name} cannot be replaced: {reason}",
            f"use the `out` port: at={site.role + ':out'!r}"
            if called
            else "choose sites whose modules are called, such as '*.layers[*].mlp'",
        )


def _check_alone(model: nn.Module) -> None:
    """Two banks must not share modules: each would freeze, count and give back the other's flags."""
    own = bank_of(model)
    for path, module in model.named_modules():
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            if isinstance(hook, (SiteHook, ShareHook, WeightHook)) and (
                own is None or hook.forwards is not own.forwards
            ):
                raise AttachError(
                    f"{path or 'this module'} already carries an adapter that was attached to another "
                    f"module around or inside this {type(model).__name__}",
                    f"attach everything to the module that holds {BANK!r}, or detach there first",
                )


def fill(layers: dict[str, Layer], tensors: dict[str, Tensor]) -> None:
    """Copy saved tensors into freshly built layers; all mismatches are named, none is tolerated."""
    wanted = {
        f"{key}/{tensor}": value
        for key, layer in layers.items()
        for tensor, value in layer.to_file().items()
    }
    missing = sorted(wanted.keys() - tensors.keys())
    unexpected = sorted(tensors.keys() - wanted.keys())
    shapes = [
        f"{key} is {shape_of(tensors[key])}, expected {shape_of(wanted[key])}"
        for key in sorted(wanted.keys() & tensors.keys())
        if tensors[key].shape != wanted[key].shape
        or tensors[key].is_floating_point() != wanted[key].is_floating_point()
    ]
    problems = [
        f"{len(names)} {kind}: {'; '.join(names[:4])}{' …' if len(names) > 4 else ''}"
        for kind, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape or kind", shapes),
        )
        if names
    ]
    if problems:
        raise AdapterFileError(
            "the tensors do not fit: " + ". ".join(problems),
            "nothing was loaded; the file and its adapter.json do not belong together",
        )
    for key, layer in layers.items():
        layer.from_file({tensor: tensors[f"{key}/{tensor}"] for tensor in layer.to_file()})
