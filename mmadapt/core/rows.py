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
    plans = {site: _row_plan(bank, hook, rows, names) for site, hook in bank.hooks.items()}
    before = bank.active
    acting = bank.acting
    bank.activate(Sum(*names))
    bank.replace({site: ((plan,),) if plan else () for site, plan in plans.items()})  # type: ignore[misc]
    try:
        yield
    finally:
        bank.activate(before)
        if not acting:
            bank.plans(Sum())


def _row_plan(
    bank: Bank, hook: SiteHook, rows: list[str | None], names: tuple[str, ...]
) -> RowPlan | None:
    site = hook.site.name
    here = [name for name in names if site in bank.records[name].layers]
    if not here:
        return None
    layers = [bank.records[name].layers[site] for name in here]
    if hook.site.span.rows == "unknown":
        raise AttachError(
            f"rows of one batch cannot differ at {site}: what it is called with are prompts of one image",
            "call it for the prompts of one attachment at a time, or choose sites of the image encoder",
        )
    if hook.site.port != "out":
        raise AttachError(
            f"rows of one batch cannot differ at {site}: a call has one weight for all of them"
            if hook.site.port == "weight"
            else f"rows of one batch cannot differ at the `in` port of {site}",
            "use `out` sites, such as '*.layers[*].mlp', or split the batch by adapter",
        )
    adapters = [_adapter_at(bank, name, site) for name in here]
    if any(len(several) != 1 for several in layers) or any(a != adapters[0] for a in adapters):
        raise AttachError(
            f"rows cannot choose between {', '.join(map(repr, here))} at {site}: their adapters differ",
            "choose among attachments with one adapter and equal hyper-parameters, or split the batch",
        )
    if not layers[0][0].rowwise or layers[0][0].shared is not None:
        raise AttachError(
            f"{type(layers[0][0]).__name__} at {site} cannot be chosen by row", "split the batch"
        )
    return RowPlan([several[0] for several in layers], [_place(here, name) for name in rows])


def _adapter_at(bank: Bank, name: str, site: str) -> Any:
    record = bank.records[name]
    return [a for a, sites in zip(record.adapters, record.sites, strict=True) if site in sites]


def _place(here: list[str], name: str | None) -> int:
    """The slot of a row; rows without an adapter here take the last one, which is all zeros."""
    return here.index(name) if name in here else len(here)


class RowPlan:
    """Stands in a hook's plan for several alike layers, of which each row picks one."""

    taps: ClassVar[tuple[str, ...]] = ()
    facts: ClassVar[tuple[str, ...]] = ()

    def __init__(self, layers: list[Layer], slots: list[int]) -> None:
        self.layers = layers
        self.slots = slots
        self._kept: tuple[list, Any] | None = None
        self._places: Tensor | None = None

    def after(self, acc: Tensor, y: Tensor, x: Tensor, context: Context, site: SiteView) -> Tensor:
        """acc + each row's own change."""
        rows = len(self.slots)
        if site.span.rows == "several" and acc.shape[0] != rows and not acc.shape[0] % rows:
            # those of one row of the batch lie side by side, and so can be one row of positions
            acc, y, x = (t.unflatten(0, (rows, -1)) for t in (acc, y, x))
            return self.layers[0].after_rows(self.operands(), acc, y, x).flatten(0, 1)
        if acc.shape[0] != rows:
            raise CheckError(
                f"{site.name} sees {acc.shape[0]} rows, but adapters were chosen for {len(self.slots)}",
                "name one attachment, or None, for every row of the batch",
            )
        return self.layers[0].after_rows(self.operands(), acc, y, x)

    def read_parameters(self) -> Iterator[Tensor]:
        """Of all the layers that rows may pick."""
        return (parameter for layer in self.layers for parameter in layer.parameters())

    def operands(self) -> Any:
        """What the rows compute with; without gradients kept until a parameter changes."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.layers[0].row_operands(self.picked())
        # layers hold flat parameters, and reading the table itself is what this can afford
        key = [t._version for layer in self.layers for t in layer._parameters.values()]  # type: ignore[union-attr]
        key += [id(t) for layer in self.layers for t in layer._parameters.values()]
        if self._kept is None or self._kept[0] != key:
            self._kept = (key, self.layers[0].row_operands(self.picked()))
        return self._kept[1]

    def picked(self) -> dict[str, Tensor]:
        """Every parameter with a row axis in front, (B, …); zeros where a row picks none."""
        tables: list[Any] = [layer._parameters for layer in self.layers]
        found = {}
        for name, first in tables[0].items():
            several = [table[name] for table in tables]
            if max(self.slots) == len(tables):
                several.append(torch.zeros_like(first))
            if self._places is None or self._places.device != first.device:
                self._places = torch.tensor(self.slots, device=first.device)
            found[name] = torch.stack(several).index_select(0, self._places)
        return found
