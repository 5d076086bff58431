"""A handle on what was attached under one name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmadapt.core.attach import detach, set_active
from mmadapt.core.attached import require_bank, require_name

if TYPE_CHECKING:
    from torch import nn

    from mmadapt.adapter import Adapter
    from mmadapt.core.layer import Layer
    from mmadapt.core.report import Table


@dataclass(frozen=True, eq=False)
class Attachment:
    """One or several adapters under a name, in one backbone."""

    model: nn.Module
    name: str

    @property
    def _record(self) -> Any:
        _, bank = require_bank(self.model)
        return bank.records[require_name(bank, self.name, "attachment")]

    @property
    def adapter(self) -> Adapter | tuple[Adapter, ...]:
        """The adapter, or the tuple of adapters, this was made from."""
        adapters = self._record.adapters
        return adapters[0] if len(adapters) == 1 else adapters

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the sites it stands at: adapter by adapter, each in the backbone's order."""
        return tuple(dict.fromkeys(name for names in self._record.sites for name in names))

    @property
    def layers(self) -> dict[str, Layer]:
        """Its layers by "index/site name"; the index counts the adapters of the attachment."""
        _, bank = require_bank(self.model)
        return dict(bank.layers_of(require_name(bank, self.name, "attachment")))

    @property
    def metadata(self) -> dict[str, Any]:
        """What is saved beside the tensors: "licence", "metrics", "data" and "input", yours to fill.

        "data" says what it was trained on, "input" is a dictionary that says how images and prompts have
        to be given; "origin" tells what a foreign file held.
        """
        return self._record.metadata

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """("index/site name.tensor", parameter) of every trained tensor; "index/shared.tensor"."""
        _, bank = require_bank(self.model)
        for key, layer in bank.tensors_of(require_name(bank, self.name, "attachment")):
            for name, parameter in layer.named_parameters():
                yield f"{key}.{name}", parameter

    def parameters(self) -> Iterator[nn.Parameter]:
        """Every parameter, for an optimiser."""
        return (parameter for _, parameter in self.named_parameters())

    @property
    def num_parameters(self) -> int:
        """How many trained numbers it adds."""
        return sum(parameter.numel() for parameter in self.parameters())

    def summary(self) -> Table:
        """One row per group of alike sites: method, shapes and parameters."""
        from mmadapt.core.report import summary

        return summary(self)

    def set_active(self) -> None:
        """Make this the only active attachment."""
        set_active(self.model, self.name)

    def detach(self) -> None:
        """Take it out of the backbone."""
        detach(self.model, self.name)

    def save(self, path: str | Path, **metadata: Any) -> Path:
        """Write its files; see `mmadapt.save`."""
        from mmadapt.core.store import save

        return save(self.model, path, self.name, **metadata)

    def __repr__(self) -> str:
        return str(self.summary())

    def _repr_html_(self) -> str:
        return self.summary()._repr_html_()
