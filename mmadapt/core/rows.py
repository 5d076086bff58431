"""Adapter choice per row: one batch in which every row has its own adapter, or none.

The layers of all chosen attachments at a site are stacked, each row picks its own, and the products
are batched. It trains as well as it predicts: gradients reach just the layers that rows picked.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from mmadapt.core.compose import Sum
from mmadapt.core.context import Context
from mmadapt.errors import AttachError, CheckError

if TYPE_CHECKING:
    from torch import Tensor

    from mmadapt.core.bank import Bank
    from mmadapt.core.dispatch import SiteHook
    from mmadapt.core.layer import Layer
    from mmadapt.core.site import SiteView


@contextlib.contextmanager
def chosen(bank: Bank, rows: list[str | None]) -> Iterator[None]:
    """Every row with its own attachment, inside the block."""
    names = tuple(dict.fromkeys(name for name in rows if name is not None))
    if not rows:
        raise AttachError(
            "rows is empty", "name an attachment, or None, for every row of the batch"
        )
    bank.validate(Sum(*names))
    picks: dict[tuple[int, ...], Picks] = {}
    plans = {site: _row_plan(bank, hook, rows, names, picks) for site, hook in bank.hooks.items()}
    before = bank.active
    acting = bank.acting
    bank.activate(Sum(*names), {s: ((plan,),) if plan else () for s, plan in plans.items()})  # type: ignore[misc]
    try:
        yield
    finally:
        bank.activate(before, None if acting else dict.fromkeys(bank.hooks, ()))


def _row_plan(
    bank: Bank,
    hook: SiteHook,
    rows: list[str | None],
    names: tuple[str, ...],
    picks: dict[tuple[int, ...], Picks],
) -> RowPlan | None:
    site = hook.site.name
    here = [name for name in names if site in bank.records[name].layers]
    if not here:
        return None
    key = (site, *here)
    if key not in bank.stacks:
        bank.stacks[key] = _stacked(bank, hook, here)
    # rows without an adapter here take the last slot, which is all zeros
    slots = tuple([here.index(name) if name in here else len(here) for name in rows])
    return RowPlan(bank.stacks[key], picks.setdefault(slots, Picks(slots)))


def _stacked(bank: Bank, hook: SiteHook, names: list[str]) -> Stacked:
    """The layers of these attachments at one site, if rows can choose among them."""
    site = hook.site.name
    layers = [bank.records[name].layers[site] for name in names]
    if hook.site.span.rows == "unknown":
        raise AttachError(
            f"rows of one batch cannot differ at {site}: what it is called with are prompts of one image",
            "call it for the prompts of one attachment at a time, or choose sites of the image encoder",
        )
    if hook.site.port != "out":
        raise AttachError(
            f"rows of one batch cannot differ at {site}: a call has one weight for all of them"
            if hook.site.port == "weight"
            else f"rows of one batch cannot differ at the `{hook.site.port}` port of {site}",
            "use `out` sites, such as '*.layers[*].mlp', or split the batch by adapter",
        )
    adapters = [_adapter_at(bank, name, site) for name in names]
    if any(len(several) != 1 for several in layers) or any(a != adapters[0] for a in adapters):
        raise AttachError(
            f"rows cannot choose between {', '.join(map(repr, names))} at {site}: their adapters "
            "differ",
            "choose among attachments with one adapter and equal hyper-parameters, or split the batch",
        )
    if not layers[0][0].rowwise or layers[0][0].shared is not None:
        raise AttachError(
            f"{type(layers[0][0]).__name__} at {site} cannot be chosen by row", "split the batch"
        )
    return Stacked([several[0] for several in layers])


def _adapter_at(bank: Bank, name: str, site: str) -> Any:
    record = bank.records[name]
    return [a for a, sites in zip(record.adapters, record.sites, strict=True) if site in sites]


class Stacked:
    """Alike layers at one site, and their parameters in one tensor each, (N + 1, …), zeros last."""

    def __init__(self, layers: list[Layer]) -> None:
        self.layers = layers
        self._kept: tuple[list[int], dict[str, Tensor]] | None = None

    def tensors(self) -> dict[str, Tensor]:
        """The stacked parameters; without gradients the same object until a parameter changes."""
        # layers hold flat parameters, and reading the tables themselves is what this can afford
        tables: list[Any] = [layer._parameters for layer in self.layers]
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self._stack(tables)
        key = [t._version for table in tables for t in table.values()]
        key += [id(t) for table in tables for t in table.values()]
        if self._kept is None or self._kept[0] != key:
            self._kept = (key, self._stack(tables))
        return self._kept[1]

    def _stack(self, tables: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {
            name: torch.stack([*(table[name] for table in tables), torch.zeros_like(first)])
            for name, first in tables[0].items()
        }


class Picks:
    """Which slot each row takes: one tensor for all the sites where that is the same."""

    def __init__(self, slots: tuple[int, ...]) -> None:
        self.slots = slots
        self._tensor: Tensor | None = None
        self._ids: dict[int, Tensor] = {}

    def on(self, device: torch.device) -> Tensor:
        """The slots (B,) on a device."""
        if self._tensor is None or self._tensor.device != device:
            self._tensor = torch.tensor(self.slots, device=device)
            self._ids.clear()
        return self._tensor

    def ids(self, device: torch.device, layers: int) -> Tensor:
        """The slots (B,) with −1 for those behind the last of so many layers."""
        slots = self.on(device)
        if layers not in self._ids:
            self._ids[layers] = torch.where(slots < layers, slots, -1)
        return self._ids[layers]


class RowPlan:
    """Stands in a hook's plan for several alike layers, of which each row picks one."""

    taps: ClassVar[tuple[str, ...]] = ()
    facts: ClassVar[tuple[str, ...]] = ()

    def __init__(self, stacked: Stacked, picks: Picks) -> None:
        self.stacked = stacked
        self.picks = picks
        self.first = stacked.layers[0]
        self._kept: tuple[dict[str, Tensor], Any] | None = None

    def after(self, acc: Tensor, y: Tensor, x: Tensor, context: Context, site: SiteView) -> Tensor:
        """acc + each row's own change."""
        rows = len(self.picks.slots)
        if site.span.rows == "several" and acc.shape[0] != rows and not acc.shape[0] % rows:
            # those of one row of the batch lie side by side, and so can be one row of positions
            acc, y, x = (t.unflatten(0, (rows, -1)) for t in (acc, y, x))
            return self._changed(acc, y, x).flatten(0, 1)
        if acc.shape[0] != rows:
            raise CheckError(
                f"{site.name} sees {acc.shape[0]} rows, but adapters were chosen for {len(self.picks.slots)}",
                "name one attachment, or None, for every row of the batch",
            )
        return self._changed(acc, y, x)

    def _changed(self, acc: Tensor, y: Tensor, x: Tensor) -> Tensor:
        if self.first.fuses_rows(y, x):
            ids = self.picks.ids(acc.device, len(self.stacked.layers))
            return self.first.after_stacked(self.stacked.tensors(), ids, acc, y, x)
        return self.first.after_rows(self.operands(), acc, y, x)

    def read_parameters(self) -> Iterator[Tensor]:
        """Of all the layers that rows may pick."""
        return (parameter for layer in self.stacked.layers for parameter in layer.parameters())

    def operands(self) -> Any:
        """What the rows compute with: each row's parameters in front, (B, …)."""
        tensors = self.stacked.tensors()
        if self._kept is not None and self._kept[0] is tensors:
            return self._kept[1]
        places = self.picks.on(next(iter(tensors.values())).device)
        picked = {name: value.index_select(0, places) for name, value in tensors.items()}
        operands = self.first.row_operands(picked)
        if not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
            self._kept = (tensors, operands)
        return operands
