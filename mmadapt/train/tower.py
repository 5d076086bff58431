"""One tower whose frozen part is computed once for every row."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmadapt.core.check import tensors_in
from mmadapt.core.context import Context
from mmadapt.core.stand_in import StandIn
from mmadapt.errors import CheckError
from mmadapt.train.flags import eval_mode
from mmadapt.train.rows import Form, RowStore, fingerprints

if TYPE_CHECKING:
    from mmadapt.core.bank import Bank


@dataclass(eq=False)
class TowerCache:
    """Stands in for the forward of a tower, and of its layers before the first adapted one."""

    name: str
    model: nn.Module
    bank: Bank
    module: nn.Module
    #: paths of the repeated blocks, in order, and how many of them are passed over
    blocks: list[str]
    depth: int
    limit: int = 0
    folder: Path | None = None
    stores: dict[Any, RowStore] = field(default_factory=dict)
    found: int = 0
    computed: int = 0

    @property
    def passed_over(self) -> str:
        """What is not computed for a row that is found."""
        layers = f"{self.depth} of {len(self.blocks)} layers"
        return "the whole tower" if self.resting and self.outputs else layers

    def open(self) -> None:
        """Take the place of the forwards."""
        self.choice = self.bank.forwards.choice
        self.prefix = [self.model.get_submodule(path) for path in self.blocks[: self.depth]]
        self.resting = self._rests()
        self.versions = {resting: self._versions(resting) for resting in {False, self.resting}}
        #: per form of call, how the tower's own output is made of a kept row
        self.outputs: dict[Any, Form] = {}
        #: what the call under way has in common with others whose rows may share a store
        self.form: Any = None
        #: rows to play instead of computing them, and what the last block passed over returned
        self.playing: Tensor | None = None
        self.recorded: Tensor | None = None
        self.recording = False
        self.verified = self.full = False
        self.stand_ins = [StandIn(self.module, self)]
        self.stand_ins += [StandIn(module, _Skip(self, module)) for module in self.prefix]

    def close(self) -> None:
        """Give the forwards back."""
        for stand_in in self.stand_ins:
            stand_in.remove()
        for store in self.stores.values():
            store.close()

    def __call__(self, own: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        if torch.compiler.is_compiling():  # compiled code computes everything
            return own(*args, **kwargs)
        if any(kwargs.get(word) for word in ("output_hidden_states", "output_attentions")):
            return own(*args, **kwargs)  # these want what the layers passed over would give
        rows = fingerprints(args, kwargs)
        if rows is None:
            return own(*args, **kwargs)
        self._check()
        keys, common = rows
        device = self.module_device()
        autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        self.form = (common, autocast, self.resting)
        store = self.stores.get(self.form)
        kept = None if store is None else store.rows(keys)
        if kept is None:
            self.computed += len(keys)
            return self._record(own, keys, args, kwargs)
        self.found += len(keys)
        return self._play(own, kept, args, kwargs)

    def module_device(self) -> str:
        """Kind of device the tower is on."""
        return next(self.module.parameters()).device.type

    def _record(
        self, own: Callable[..., Any], keys: list[bytes], args: tuple, kwargs: dict[str, Any]
    ) -> Any:
        fired = {name: hook.fired for name, hook in self.bank.hooks.items()}
        for hook in self.bank.hooks.values():
            hook.fired = False
        self.recorded, self.recording = None, True
        try:
            output = own(*args, **kwargs)
        finally:
            self.recording = False
            for name, hook in self.bank.hooks.items():
                hook.fired = hook.fired or fired[name]
            recorded, self.recorded = self.recorded, None
        form = Form.of(output, len(keys)) if self.resting else None
        if form is not None:
            self.outputs[self.form] = form
            self._keep(keys, form.rows(output))
            return output
        if recorded is None or recorded.shape[0] != len(keys) or recorded.requires_grad:
            what = (
                "was not called"
                if recorded is None
                else "gave activations that depend on something that trains"
                if recorded.requires_grad
                else f"gave {recorded.shape[0]} rows"
            )
            raise CheckError(
                f"the layer before the first adapted one of {self.name!r} {what} for {len(keys)} rows "
                "of input, so its activations cannot be kept by row",
                "train without cached_prefix",
            )
        if not self.verified:
            self._verify(own, recorded, args, kwargs)
        self._keep(keys, recorded)
        return output

    def _keep(self, keys: list[bytes], rows: Tensor) -> None:
        if self.form not in self.stores:
            self.stores[self.form] = RowStore(rows, self.limit, self._path())
        store = self.stores[self.form]
        others = sum(each.bytes for each in self.stores.values()) - store.bytes
        if not store.add(keys, rows, self.limit - others) and not self.full:
            self.full = True
            warnings.warn(
                f"the cache of {self.name!r} is full at {(store.bytes + others) / 1e6:.3g} MB; further "
                "rows are computed each time (a larger budget= keeps them)",
                stacklevel=2,
            )

    def _play(
        self, own: Callable[..., Any], kept: Tensor, args: tuple, kwargs: dict[str, Any]
    ) -> Any:
        if self.form in self.outputs:
            return self.outputs[self.form].output(kept)
        self.playing = kept
        try:
            return own(*args, **kwargs)
        finally:
            self.playing = None

    def _verify(
        self, own: Callable[..., Any], recorded: Tensor, args: tuple, kwargs: dict[str, Any]
    ) -> None:
        """On the first batch: passing over the layers gives what computing them gave."""
        context = self.bank.forwards.context
        more = CheckError(
            f"later layers of {self.name!r} use more of the first {self.depth} than what the "
            "last of them returns, so these cannot be passed over",
            "train without cached_prefix",
        )
        try:
            with eval_mode(self.model):
                self.bank.forwards.context = Context(context._facts)
                whole = own(*args, **kwargs)
                self.bank.forwards.context = Context(context._facts)
                try:
                    short = self._play(own, recorded, args, kwargs)
                except Exception as error:  # whatever they miss it by
                    raise more from error
        finally:
            self.bank.forwards.context = context
        for one, other in zip(tensors_in(whole), tensors_in(short), strict=True):
            if not torch.allclose(one, other, rtol=1e-3, atol=1e-4, equal_nan=True):
                raise more
        self.verified = True

    def _check(self) -> None:
        """Whether what is kept is still what the layers would give."""
        if self.bank.forwards.choice is not self.choice:
            depth = first_adapted(self.bank, self.blocks)
            if depth < self.depth:
                raise CheckError(
                    f"an adapter became active in layer {depth} of {self.name!r}, and layers before "
                    f"{self.depth} are cached",
                    "switch outside of cached_prefix",
                )
            self.choice = self.bank.forwards.choice
            self.resting = self.resting and self._rests()
        if self._versions(self.resting) != self.versions[self.resting]:
            raise CheckError(
                f"weights of {self.name!r} in the cached layers changed",
                "merge, load and train outside of cached_prefix",
            )
        for path, module in self._kept(self.resting):
            for name, inner in module.named_modules():
                if inner.training and _draws(inner):
                    raise CheckError(
                        f"{type(inner).__name__} {path}.{name} is in train mode, so no two passes "
                        "through the cached layers are alike",
                        "mmadapt.fit and mmadapt.train_mode leave the backbone in eval mode",
                    )

    def early(self) -> None:
        """Called when the last cached block has run: nothing adapted may have run before it."""
        acting = [
            name
            for name, hook in self.bank.hooks.items()
            if hook.fired and hook.plan and _inside(hook.site.span.module, self.module, self.model)
        ]
        if acting:
            raise CheckError(
                f"an adapter acts at {acting[0]}, before layer {self.depth} of {self.name!r}, so "
                "the layers below cannot be passed over",
                "train without cached_prefix",
            )

    def _rests(self) -> bool:
        """Whether nothing acts or trains in the whole tower, which only gives: its output will do."""
        acting = [hook.site for hook in self.bank.hooks.values() if hook.plan]
        return not (
            self.depth < len(self.blocks)
            or any(_inside(s.span.module, self.module, self.model) for s in acting)
            or any(tap.readers for tap in self.bank.installed.taps.values())
            or any(parameter.requires_grad for parameter in self.module.parameters())
        )

    def _kept(self, resting: bool) -> list[tuple[str, nn.Module]]:
        """The modules that are passed over, by path."""
        if resting:
            return [(self.name, self.module)]
        return list(zip(self.blocks, self.prefix, strict=False))

    def _versions(self, resting: bool) -> tuple:
        kept = [module for _, module in self._kept(resting)]
        return tuple((id(t), t._version) for module in kept for t in _own_tensors(module))

    def _path(self) -> Path | None:
        """A folder for the rows of this form, of these weights."""
        if self.folder is None:
            return None
        from mmadapt.train.cache import weights_digest

        what = repr((weights_digest(self.model), self.name, self.depth, self.form))
        return self.folder / f"prefix-{hashlib.sha256(what.encode()).hexdigest()[:32]}"


class _Skip:
    """What stands in for one of the blocks to pass over."""

    def __init__(self, tower: TowerCache, module: nn.Module) -> None:
        self.tower = tower
        self.last = module is tower.prefix[-1]
        #: per form of call, the shape of a row and what else the block returned
        self.returns: dict[Any, tuple[tuple[int, ...], tuple | None]] = {}

    def __call__(self, own: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        if torch.compiler.is_compiling():
            return own(*args, **kwargs)
        tower = self.tower
        if tower.playing is None or tower.form not in self.returns:
            output = own(*args, **kwargs)
            first, rest = (
                (output, None)
                if isinstance(output, Tensor)
                else (output[0], tuple(None for _ in output[1:]))
            )
            self.returns[tower.form] = tuple(first.shape[1:]), rest
            if self.last and tower.recording:
                tower.early()
                tower.recorded = first
            return output
        shape, rest = self.returns[tower.form]
        if self.last:
            first = tower.playing
        else:  # of the right shape for what stands between two blocks, and of no size
            first = tower.playing.new_zeros(()).expand(tower.playing.shape[0], *shape)
        return first if rest is None else (first, *rest)


def first_adapted(bank: Bank, blocks: list[str]) -> int:
    """How many of the first blocks no active adapter acts in; 0 where none is active."""
    acting = [f"{hook.site.span.module}." for hook in bank.hooks.values() if hook.plan]
    adapted = [i for i, path in enumerate(blocks) if any(m.startswith(f"{path}.") for m in acting)]
    return min(adapted, default=len(blocks)) if acting else 0


def _inside(path: str, tower: nn.Module, model: nn.Module) -> bool:
    module = model.get_submodule(path)
    return any(module is inner for inner in tower.modules())


def _draws(module: nn.Module) -> bool:
    from torch.nn.modules.batchnorm import _BatchNorm
    from torch.nn.modules.dropout import _DropoutNd

    if isinstance(module, _DropoutNd):
        return module.p > 0
    if isinstance(module, _BatchNorm):
        return True
    return bool(getattr(module, "drop_prob", 0) or getattr(module, "drop_path_rate", 0))


def _own_tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()
