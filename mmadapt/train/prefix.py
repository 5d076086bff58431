"""The frozen part of a forward pass, computed once for every row.

Below the first layer an adapter acts in, a frozen backbone gives a row the same activations in every
epoch. Inside `cached_prefix` they are kept, and layers before them are passed over. A row is known by
a fingerprint of what the tower is called with, so that other preprocessing, another augmentation or
another text is another row. Where nothing in a tower adapts or trains, as when only SAM's decoder
learns, what is kept is the tower's output itself.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mmadapt.errors import AttachError
from mmadapt.train.tower import TowerCache, first_adapted

if TYPE_CHECKING:
    from torch import nn

    from mmadapt.core.bank import Bank

_BLOCK = re.compile(r"(?:(.*)\.)?(?:layers|blocks)\[(\d+)\]\Z")


@dataclass
class PrefixCache:
    """What `cached_prefix` keeps, tower by tower."""

    towers: list[TowerCache]

    @property
    def bytes(self) -> int:
        """Bytes kept now."""
        return sum(store.bytes for tower in self.towers for store in tower.stores.values())

    def __repr__(self) -> str:
        parts = [
            f"{tower.name}: {tower.passed_over} passed over, "
            f"{tower.found} rows found, {tower.computed} computed"
            for tower in self.towers
        ]
        return f"PrefixCache({'; '.join(parts)}; {self.bytes / 1e6:.3g} MB)"


def towers(model: nn.Module, bank: Bank) -> list[TowerCache]:
    """The towers with a frozen prefix; `AttachError` if one of its tensors trains."""
    blocks: dict[str, list[str]] = {}
    for role, span in bank.anatomy.roles(model).items():
        match = _BLOCK.match(role)
        if match and span.module:
            blocks.setdefault(match[1] or "", []).append(span.module)
    found = []
    for name, paths in blocks.items():
        towers = bank.anatomy.towers
        path = towers.get(name, next(iter(towers.values()), ""))
        depth = first_adapted(bank, paths)
        if depth:
            module = model.get_submodule(path)
            found.append(TowerCache(name or "model", model, bank, module, paths, depth))
            _check_frozen(model, found[-1])
    return found


def _check_frozen(model: nn.Module, tower: TowerCache) -> None:
    for path in tower.blocks[: tower.depth]:
        for name, parameter in model.get_submodule(path).named_parameters():
            if parameter.requires_grad:
                raise AttachError(
                    f"{path}.{name} trains, so the layers below the first adapted one are not frozen",
                    "freeze it, or train without cached_prefix",
                )
