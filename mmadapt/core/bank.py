"""The bank: everything mmadapt keeps in one backbone, registered on it as `_mmadapt`."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mmadapt.core.compose import Composition, Stack, Sum
from mmadapt.core.context import Context
from mmadapt.core.dispatch import (
    FirstForward,
    InHook,
    OutHook,
    SiteHook,
    TapHook,
    WeightHook,
    WeightRestore,
)
from mmadapt.core.layer import Layer
from mmadapt.core.renames import undo_renames
from mmadapt.errors import AttachError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from mmadapt.adapter import Adapter
    from mmadapt.core.anatomy import Anatomy
    from mmadapt.core.site import SiteView

BANK = "_mmadapt"


@dataclass
class Record:
    """One attachment: its adapters, the site names of each, and the layers by site."""

    adapters: tuple[Adapter, ...]
    sites: tuple[tuple[str, ...], ...]
    layers: dict[str, list[Layer]] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)


class Bank(nn.Module):
    """Holds the layers of all attachments as sub-modules, and the hooks that reach them."""

    def __init__(self, model: nn.Module, anatomy: Anatomy, entry: Any) -> None:
        super().__init__()
        #: one child per attachment; a module of its own, so that no name meets an attribute of ours
        self.layers = nn.Module()
        self.anatomy = anatomy
        self.entry = entry
        self.context = Context()
        self.records: dict[str, Record] = {}
        self.active: Composition = Sum()
        # merged attachments in order: the parameters they changed, with the originals
        self.merged: dict[str, list[tuple[nn.Module, str, Tensor]]] = {}
        self.hooks: dict[str, SiteHook] = {}
        self.weights: dict[tuple[str, str], WeightHook] = {}
        self.tap_hooks: dict[str, TapHook] = {}
        self.handles: dict[str, list[Any]] = {}
        # what detach gives back
        self.trainable = {name: p.requires_grad for name, p in backbone_parameters(model)}
        self.training_flags = {name: module.training for name, module in model.named_modules()}
        self.training = model.training
        self.register_load_state_dict_pre_hook(undo_renames)
        self.register_load_state_dict_post_hook(_allow_bare_checkpoint)

    def forward(self) -> None:
        raise RuntimeError("the bank holds adapter layers; it is not called")

    # -- layers -----------------------------------------------------------------------------

    def put(self, name: str, record: Record, layers: dict[str, Layer]) -> None:
        """Register the layers of one attachment under `name`; keys are "index/site name"."""
        box = nn.Module()
        for key, layer in layers.items():
            box._modules[key.replace(".", "|")] = layer  # a module's name holds no dot
            site = key.partition("/")[2]
            record.layers.setdefault(site, []).append(layer)
        box.train(self.training)
        self.layers._modules[name] = box
        self.records[name] = record

    def _box(self, name: str) -> nn.Module:
        box = self.layers._modules[name]
        assert box is not None
        return box

    def train_only(self, names: tuple[str, ...]) -> None:
        """Put the layers of these attachments into train mode, all others into eval mode."""
        for name in self.records:
            self._box(name).train(name in names)

    def drop(self, name: str) -> None:
        """Forget the layers of one attachment."""
        del self.layers._modules[name]
        del self.records[name]

    def layers_of(self, name: str) -> Iterator[tuple[str, Layer]]:
        """("index/site name", layer) of one attachment, in the order they were built."""
        for key, layer in self._box(name)._modules.items():
            assert isinstance(layer, Layer)
            yield key.replace("|", "."), layer

    # -- hooks ------------------------------------------------------------------------------

    def install(self, site: SiteView, taps: dict[str, str]) -> None:
        """Put one dispatcher at `site`, if none stands there, and the taps its layers read."""
        for tap, path in taps.items():
            if tap not in self.tap_hooks:
                module = self._root.get_submodule(path.partition(":")[0])
                self.tap_hooks[tap] = TapHook(tap, self.context)
                self.handles[f"tap {tap}"] = [module.register_forward_hook(self.tap_hooks[tap])]
        if site.name in self.hooks:
            self.hooks[site.name].site.taps.update(site.taps)
            return
        if site.port == "weight":
            hook = SiteHook(site, self.context)
            self._weight_hook(site).sites.append(hook)
        elif site.port == "in":
            hook = InHook(site, self.context)
            self.handles[site.name] = [
                site.module.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)
            ]
        else:
            hook = OutHook(site, self.context)
            self.handles[site.name] = [
                site.module.register_forward_hook(hook, prepend=True, with_kwargs=True)
            ]
        self.hooks[site.name] = hook

    def _weight_hook(self, site: SiteView) -> WeightHook:
        key = (site.span.module, site.span.weight)
        if key not in self.weights:
            assert site.holder is not None
            hook = WeightHook(site.holder, site.parameter, self.context)
            self.weights[key] = hook
            self.handles[f"weight {site.span.weight}"] = [
                site.module.register_forward_pre_hook(hook, prepend=True),
                site.module.register_forward_hook(WeightRestore(hook), always_call=True),
            ]
        return self.weights[key]

    def watch_first_forward(self) -> None:
        """Have each tower's next call verify that its sites fire."""
        for tower, path in (self.anatomy.towers or {"model": ""}).items():
            below = [h for h in self.hooks.values() if _below(h.site.span.module, path)]
            fresh = [hook for hook in below if not hook.fired]
            if not fresh:
                continue
            check = FirstForward(tower, below)
            key = f"first {tower}"
            for handle in self.handles.pop(key, []):
                handle.remove()
            module = self._root.get_submodule(path)
            check.handle = module.register_forward_hook(check)
            self.handles[key] = [check.handle]

    def uninstall_unused(self) -> None:
        """Remove the dispatchers and taps that no remaining attachment needs."""
        needed = {site for record in self.records.values() for site in record.layers}
        for name in [name for name in self.hooks if name not in needed]:
            hook = self.hooks.pop(name)
            hook.plan = ()  # a first-forward check may still hold it
            for handle in self.handles.pop(name, []):
                handle.remove()
            for key, weight in list(self.weights.items()):
                if hook in weight.sites:
                    weight.sites.remove(hook)
                if not weight.sites:
                    del self.weights[key]
                    for handle in self.handles.pop(f"weight {key[1]}"):
                        handle.remove()
        read = {tap for hook in self.hooks.values() for tap in hook.site.taps.values()}
        for tap in [tap for tap in self.tap_hooks if tap not in read]:
            del self.tap_hooks[tap]
            for handle in self.handles.pop(f"tap {tap}"):
                handle.remove()

    def remove_all_hooks(self) -> None:
        """Take every hook off the backbone."""
        for handles in self.handles.values():
            for handle in handles:
                handle.remove()
        self.handles.clear()

    # -- switching --------------------------------------------------------------------------

    def plans(self, composition: Composition) -> None:
        """Replace the plan at every hook; the whole cost of a switch."""
        stack = isinstance(composition, Stack)
        records = [self.records[name] for name in composition.names]
        for site, hook in self.hooks.items():
            plan: list[Layer] = []
            for record in records:
                plan += record.layers.get(site, ())
            hook.plan = tuple(plan)
            hook.stack = stack
        for hook in self.tap_hooks.values():
            hook.readers = 0
        for hook in self.hooks.values() if self.tap_hooks else ():
            words = [word for layer in hook.plan for word in layer.taps]
            if hook.x_tap and hook.plan:
                words.append(hook.x_tap)
            for word in words:
                self.tap_hooks[hook.site.taps[word]].readers += 1

    @property
    def acting(self) -> bool:
        """Whether anything has a plan now: not within `disabled`, whatever is active."""
        return any(hook.plan for hook in self.hooks.values())

    def activate(self, composition: Composition) -> None:
        """Make `composition` the active one; only active tensors require a gradient."""
        self.validate(composition)
        leaving = set(self.active.names) - set(composition.names)
        for name in leaving & set(self.records):
            self.require_grad(name, False)
        for name in composition.names:
            self.require_grad(name, True)
        self.active = composition
        self.plans(composition)

    def validate(self, composition: Composition) -> None:
        """Refuse names that are not attached and sums that have no meaning."""
        for name in composition.names:
            if name in self.merged:
                raise AttachError(
                    f"{name!r} is merged into the weights and acts already",
                    f"mmadapt.unmerge(model, {name!r}) first",
                )
            if name not in self.records:
                from mmadapt.errors import did_you_mean

                raise AttachError(
                    f"no attachment is named {name!r}", did_you_mean(name, self.records)
                )
        if isinstance(composition, Stack) or len(composition.names) < 2:
            return
        together: dict[str, list[Layer]] = {}
        for name in composition.names:
            for site, layers in self.records[name].layers.items():
                together.setdefault(site, []).extend(layers)
        check_sums(together)

    def require_grad(self, name: str, active: bool) -> None:
        """Let the parameters of one attachment train, or not; what never trains is a buffer."""
        for parameter in self._box(name).parameters():
            parameter.requires_grad_(active)

    # -- the backbone it sits in ------------------------------------------------------------

    @property
    def _root(self) -> nn.Module:
        return self.__dict__["root"]

    def seat(self, root: nn.Module) -> None:
        """Register the bank on `root` and freeze the backbone."""
        self.__dict__["root"] = root  # not a sub-module: the root already owns the bank
        for _, parameter in backbone_parameters(root):
            parameter.requires_grad_(False)
        root._modules[BANK] = self

    def leave(self) -> None:
        """Take the bank off its root and give the recorded flags back."""
        root = self._root
        self.remove_all_hooks()
        del root._modules[BANK]
        for name, parameter in backbone_parameters(root):
            parameter.requires_grad_(self.trainable.get(name, parameter.requires_grad))
        for name, module in root.named_modules():
            if name in self.training_flags:
                module.training = self.training_flags[name]


def _allow_bare_checkpoint(bank: Bank, incompatible: Any) -> None:
    """A checkpoint that holds none of the bank's keys is the backbone's own: nothing is missing."""
    missing = incompatible.missing_keys
    ours = {key for key in missing if BANK in key.split(".")}
    if {key.split(f"{BANK}.", 1)[1] for key in ours} >= set(bank.state_dict()):
        missing[:] = [key for key in missing if key not in ours]


def check_sums(layers: dict[str, list[Layer]]) -> None:
    """Layers that meet at one site and see the same output must each add a change to it."""
    for site, several in layers.items():
        odd = [type(layer).__name__ for layer in several if not layer.additive]
        if len(several) > 1 and odd:
            raise AttachError(
                f"{odd[0]} at {site} does not add a change to its site's output, so a sum with "
                "another layer has no meaning",
                'attach them under two names and use mmadapt.Stack("a", "b")',
            )


def backbone_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Named parameters of the backbone itself: none that sits in a bank, its own or a nested one."""
    return [
        (name, parameter)
        for name, parameter in model.named_parameters()
        if BANK not in name.split(".")
    ]


def bank_of(model: nn.Module) -> Bank | None:
    """The bank seated on `model`, if anything is attached."""
    bank = model._modules.get(BANK)
    return bank if isinstance(bank, Bank) else None


def seeded(name: str, seed: int | None) -> torch.Generator:
    """A private CPU generator; without a seed the attachment's name decides, so runs repeat."""
    value = zlib.crc32(name.encode()) if seed is None else seed
    return torch.Generator(device="cpu").manual_seed(value)


def reset_compiled_code() -> None:
    """Compiled code does not see new hooks; drop it, where dynamo has been in use at all."""
    import sys

    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


def _below(module: str, tower: str) -> bool:
    return module == tower or not tower or module.startswith(f"{tower}.")
