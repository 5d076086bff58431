"""A method of one's own: all that a newcomer writes stands between the lines, and obeys the laws.

(IA)³, Liu et al. 2022, Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than
In-Context Learning, arXiv:2205.05638: learned vectors rescale keys, values and the MLP's inner
activations, y' = y · (1 + l).
"""

# ---------------------------------------------------------------------------------------------------
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import pytest
import test_laws as laws
import torch
from backbones import BACKBONES
from torch import Tensor, nn

import mmadapt as mm
from mmadapt.core.layer import Layer, empty
from mmadapt.core.site import SiteView


@dataclass(frozen=True)
class IA3(mm.Adapter):
    """Rescale keys and values; `limit` bounds the change, which the paper does not."""

    method: ClassVar[str] = "newcomer_ia3"
    layer: ClassVar[str] = "test_newcomer:IA3Layer"
    ports: ClassVar[tuple[str, ...]] = ("out",)
    default_sites: ClassVar[tuple[str, ...]] = ("*.layers[*].attn.k", "*.layers[*].attn.v")
    source: ClassVar[str] = "Liu et al. 2022, arXiv:2205.05638"

    limit: float = 10.0

    def __post_init__(self) -> None:
        if not self.limit > 0:
            raise mm.errors.AdapterError(f"IA3: limit is {self.limit!r}, expected a number above 0")


class IA3Layer(Layer):
    """One vector (C,) that starts at zero; it scales, so it is refused in a sum with others."""

    additive: ClassVar[bool] = False

    def __init__(self, adapter: IA3, site: SiteView, generator: torch.Generator) -> None:
        super().__init__()
        self.limit = adapter.limit
        self.scale = empty(site, site.width)
        nn.init.zeros_(self.scale)

    def after(self, acc: Tensor, y: Tensor, x: Tensor, context: object, site: object) -> Tensor:
        return acc * (1 + self.scale.clamp(-self.limit, self.limit).to(acc.dtype))

    def fold(
        self, weight: Tensor, bias: Tensor | None, site: object
    ) -> tuple[Tensor, Tensor | None]:
        factor = (1 + self.scale.clamp(-self.limit, self.limit)).to(weight.dtype)
        return weight * factor[:, None], None if bias is None else bias * factor


# ---------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    """What an entry point of the group `mmadapt.adapters` does for an installed package."""
    from mmadapt.adapter import _REGISTRY, register_adapter

    register_adapter(IA3)
    yield
    del _REGISTRY[IA3.method]


CASE = laws.Case(IA3(), BACKBONES["hf_vit"])


def test_it_obeys_the_laws() -> None:
    verdicts = dict(mm.check_laws(CASE.tiny.fresh(), CASE.adapter, CASE.tiny.batch(3)).rows)
    assert set(verdicts.values()) == {"holds"}


def test_it_is_its_formula_and_merges() -> None:
    model, attachment = CASE.acting()
    found = CASE.without_grad(model)
    bare = CASE.frozen()
    with torch.no_grad():
        for key, layer in attachment.layers.items():
            index, role = int(key.split("[")[1].split("]")[0]), key.split(".")[-1].split(":")[0]
            linear = bare.get_submodule(f"layers.{index}.attention.{role}_proj")
            linear.weight.mul_(1 + layer.scale[:, None])  # type: ignore[operator]
            linear.bias.mul_(1 + layer.scale)  # type: ignore[operator]
    laws.assert_close(found, CASE.without_grad(bare), 1e-5)
    mm.merge(model)
    laws.assert_close(CASE.without_grad(model), found, 1e-5)
    assert attachment.num_parameters == 2 * 2 * 16  # keys and values, two layers, 16 channels


def test_a_sum_with_it_is_refused() -> None:
    model, _ = CASE.acting("first")
    mm.attach(model, IA3(limit=2.0), name="second")
    with pytest.raises(mm.errors.AttachError, match="a sum with another layer has no meaning"):
        mm.set_active(model, "first", "second")
    mm.set_active(model, mm.Stack("first", "second"))
