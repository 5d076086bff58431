"""The bank: everything mmadapt keeps in one backbone, registered on it as `_mmadapt`."""

from __future__ import annotations

import weakref
import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mmadapt.core.combined import check_sums, check_weight
from mmadapt.core.compiled import compiled_code_exists
from mmadapt.core.compose import Composition, Stack, Sum
from mmadapt.core.context import Choice, Forwards
from mmadapt.core.installed import Installed
from mmadapt.core.layer import Layer
from mmadapt.core.renames import undo_renames
from mmadapt.core.weighted import Weighted
from mmadapt.errors import AttachError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from mmadapt.adapter import Adapter
    from mmadapt.core.anatomy import Anatomy
    from mmadapt.core.dispatch import Plan, SiteHook

BANK = "_mmadapt"
#: stands for a site's name in the key of what all sites of an adapter share
SHARED = "shared"


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
        self.forwards = Forwards()
        self.records: dict[str, Record] = {}
        self.active: Composition = Sum()
        #: sites where nothing acts, whatever is active; and the plans without regard to them
        self.resting: frozenset[str] = frozenset()
        self.planned: dict[str, Plan] = {}
        # merged attachments in order: the parameters they changed, with the originals
        self.merged: dict[str, list[tuple[nn.Module, str, Tensor]]] = {}
        self.installed = Installed(model, anatomy, self.forwards)
        self.hooks: dict[str, SiteHook] = self.forwards.sites
        self.late: dict[str, list[Any]] = {}
        #: for rows that choose: the layers of several attachments at a site, by site and names
        self.stacks: dict[tuple[str, ...], Any] = {}
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
        """Register the layers of one attachment under `name`; keys are "index/site name".

        What the sites of an adapter share has the key "index/shared".
        """
        box = nn.Module()
        for key, layer in layers.items():
            box._modules[key.replace(".", "|")] = layer  # a module's name holds no dot
            site = key.partition("/")[2]
            if site != SHARED:
                record.layers.setdefault(site, []).append(layer)
        box.train(self.training)
        self.layers._modules[name] = box
        self.records[name] = record
        self.stacks.clear()

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
        self.late.pop(name, None)
        self.stacks.clear()
        del self.layers._modules[name]
        del self.records[name]

    def layers_of(self, name: str) -> Iterator[tuple[str, Layer]]:
        """("index/site name", layer) of one attachment, in the order they were built."""
        for key, layer in self.tensors_of(name):
            if key.partition("/")[2] != SHARED:
                yield key, layer

    def tensors_of(self, name: str) -> Iterator[tuple[str, Layer]]:
        """The same with what sites share, as "index/shared": every tensor of the attachment once."""
        for key, layer in self._box(name)._modules.items():
            assert isinstance(layer, Layer)
            yield key.replace("|", "."), layer

    def uninstall_unused(self) -> None:
        """Remove the hooks that no remaining attachment needs."""
        self.installed.keep(site for record in self.records.values() for site in record.layers)

    # -- switching --------------------------------------------------------------------------

    def plans(self, composition: Composition) -> None:
        """Replace the plan at every hook; the whole cost of a switch."""
        several = zip(composition.names, composition.weights, strict=True)
        records = [(self.records[name], weight) for name, weight in several if weight]
        stack = isinstance(composition, Stack)
        self.replace({site: _plan(site, records, stack) for site in self.hooks})

    def rest(self, sites: frozenset[str]) -> None:
        """Let nothing act at these sites from now on, and what is planned at all others."""
        self.resting = sites
        self.replace(self.planned)

    def replace(self, plans: dict[str, Plan]) -> None:
        """Let these plans act from now on, at every site."""
        self.forwards.choice = Choice()
        self.planned = plans
        for site, hook in self.hooks.items():
            hook.plan = plans[site] if site not in self.resting else ()
        for hook in self.installed.taps.values():
            hook.readers = 0
        wanted: set[str] = set()
        if self.installed.taps or self.anatomy.fills:
            for hook in self.hooks.values():
                layers = [layer for group in hook.plan for layer in group]
                words = [word for layer in layers for word in layer.taps]
                if hook.x_tap and hook.plan:
                    words.append(hook.x_tap)
                for word in words:
                    for tap in hook.site.read_taps(word):
                        self.installed.taps[tap].readers += 1
                wanted.update(*(layer.facts for layer in layers))
        for begin in self.installed.begins:
            begin.wanted = frozenset(wanted)

    @property
    def acting(self) -> bool:
        """Whether anything has a plan now: not within `disabled`, whatever is active."""
        return any(self.planned.values())

    def activate(self, composition: Composition, plans: dict[str, Plan] | None = None) -> None:
        """Make `composition` the active one; only active tensors require a gradient.

        `plans` are those of the composition, unless others are given.
        """
        self.validate(composition)
        for name in self.active.names:
            if name not in composition.names and name in self.records:
                self.require_grad(name, False)
        for name in composition.names:
            if name not in self.active.names:
                self.require_grad(name, True)
        self.active = composition
        if plans is None:
            self.plans(composition)
        else:
            self.replace(plans)

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
        for name, weight in zip(composition.names, composition.weights, strict=True):
            check_weight(name, weight, self.records[name].layers)
        if isinstance(composition, Stack) or len(composition.names) < 2:
            return
        together: dict[str, list[Layer]] = {}
        for name in composition.names:
            for site, layers in self.records[name].layers.items():
                together.setdefault(site, []).extend(layers)
        check_sums(together)

    def require_grad(self, name: str, active: bool) -> None:
        """Let the parameters of one attachment train, or not; what never trains is a buffer."""
        for handle in self.late.pop(name, []):
            handle.remove()
        layers: Any = self._box(name)._modules.values()  # flat ones: their own tables hold it all
        parameters = [p for layer in layers for p in layer._parameters.values() if p is not None]
        if not active and (self.forwards.graded or compiled_code_exists()):
            self.late[name] = [
                p.register_hook(LateGradient(p)) for p in parameters if p.requires_grad
            ]
        for parameter in parameters:
            parameter.requires_grad_(active)

    def __getstate__(self) -> dict[str, Any]:
        # a copy has no forward pass whose backward is to come
        return {**self.__dict__, "late": {}, "stacks": {}}

    # -- the backbone it sits in ------------------------------------------------------------

    def seat(self) -> None:
        """Register the bank on its root and freeze the backbone."""
        root = self.installed.root
        for _, parameter in backbone_parameters(root):
            parameter.requires_grad_(False)
        root._modules[BANK] = self

    def leave(self) -> None:
        """Take the bank off its root and give the recorded flags back."""
        root = self.installed.root
        self.installed.remove_all()
        del root._modules[BANK]
        for name, parameter in backbone_parameters(root):
            parameter.requires_grad_(self.trainable.get(name, parameter.requires_grad))
        for name, module in root.named_modules():
            if name in self.training_flags:
                module.training = self.training_flags[name]


class LateGradient:
    """Keeps a gradient that arrives after its adapter was switched off: its forward pass counted."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self.parameter = weakref.ref(parameter)

    def __call__(self, gradient: Tensor) -> None:
        parameter = self.parameter()
        if parameter is not None and not parameter.requires_grad:  # else torch does it
            kept = parameter.grad
            parameter.grad = gradient.detach().clone() if kept is None else kept + gradient


def _plan(site: str, records: list[tuple[Record, float]], stack: bool) -> Plan:
    """The layers of several attachments at one site: one group, or for a stack one each."""
    groups: list[Any] = [
        tuple([layer if weight == 1 else Weighted(layer, weight) for layer in record.layers[site]])
        for record, weight in records
        if site in record.layers
    ]
    if stack or not groups:
        return tuple(groups)
    return (tuple([layer for group in groups for layer in group]),)


def _allow_bare_checkpoint(bank: Bank, incompatible: Any) -> None:
    """A checkpoint that holds none of the bank's keys is the backbone's own: nothing is missing."""
    missing = incompatible.missing_keys
    ours = {key for key in missing if BANK in key.split(".")}
    if {key.split(f"{BANK}.", 1)[1] for key in ours} >= set(bank.state_dict()):
        missing[:] = [key for key in missing if key not in ours]


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
