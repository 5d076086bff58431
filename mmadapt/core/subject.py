"""What a law is verified on: one adapter on copies of one backbone, and how outputs are compared."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmadapt.adapter import Adapter
from mmadapt.core.attach import attach
from mmadapt.core.backbone import Backbone, unwrap_model
from mmadapt.core.check import call, tensors_in
from mmadapt.core.snapshot import distance, randomise

Outputs = tuple[Tensor, ...]


class Broken(Exception):
    """A law does not hold; the text says what was seen."""


@dataclass(frozen=True)
class Subject:
    """One adapter on one backbone, of which every law takes copies."""

    backbone: Backbone
    adapter: Adapter
    at: Any
    batch: Any

    def fresh(self) -> Backbone:
        bare = self.backbone
        return Backbone(copy.deepcopy(bare.model), anatomy=bare.anatomy, entry=bare.entry)

    def frozen(self) -> Backbone:
        """The bare backbone in the flags it has while something is attached."""
        bare = self.fresh()
        bare.model.requires_grad_(False)
        return bare

    def attached(self, name: str = "law", seed: int | None = None) -> tuple[Backbone, Any]:
        """A copy with the adapter at its sites, as it starts."""
        m = self.fresh()
        return m, attach(m, self.adapter, name, at=self.at, seed=seed)

    def acting(self, name: str = "law", seed: int = 5) -> tuple[Backbone, Any]:
        """The same with random tensors, so that an equality proves something."""
        m, attachment = self.attached(name)
        return m, randomise(attachment, seed=seed)

    def outputs(self, m: Any, batch: Any = None) -> Outputs:
        """Every floating tensor the model returns."""
        found = call(unwrap_model(m), self.batch if batch is None else batch)
        return tuple(t for t in tensors_in(found) if t.is_floating_point())

    def quietly(self, m: Any, batch: Any = None) -> Outputs:
        with torch.no_grad():
            return self.outputs(m, batch)


def require_equal(left: Outputs, right: Outputs, what: str, relative: float = 0.0) -> None:
    found = distance(left, right)
    if not found <= relative:
        bound = f", allowed is {relative:.0e}" if relative else ""
        raise Broken(f"{what} by {found:.1e} of the largest value{bound}")


def require_difference(left: Outputs, right: Outputs, what: str) -> None:
    if distance(left, right) < 1e-4:
        raise Broken(f"{what}, so that nothing could be proven")
