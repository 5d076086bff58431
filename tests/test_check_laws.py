"""`check_laws`: it accepts methods that keep the laws, and names the one that a spoiled method breaks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from backbones import BACKBONES
from handmade import NormGate, Scale, Shift, hidden, small
from snapshot import assert_same_values, randomise, state, values
from torch import Tensor, nn

import mmadapt as mm
from mmadapt.adapter import _REGISTRY
from mmadapt.core.laws import LAWS
from mmadapt.core.layer import Layer, empty
from mmadapt.errors import AdapterError, CheckError, SiteError

AT = "layers[*].mlp"


@dataclass(frozen=True)
class Spoiled(mm.Adapter):
    """y · (1 + scale), spoiled in one way."""

    method: ClassVar[str] = "spoiled"
    layer: ClassVar[str] = "test_check_laws:SpoiledLayer"
    ports: ClassVar[tuple[str, ...]] = ("out",)

    how: str = ""


class SpoiledLayer(Layer):
    """Parameters: scale (C,)."""

    additive: ClassVar[bool] = False
    latest: ClassVar[Any] = None

    def __init__(self, adapter: Spoiled, site: Any, generator: torch.Generator) -> None:
        super().__init__()
        self.how = adapter.how
        SpoiledLayer.latest = self
        self.calls = 0
        self.scale = nn.Parameter(torch.zeros(site.width))
        if self.how == "start":
            self.scale.data += 1e-6
        elif self.how == "global":
            torch.rand(1)
        elif self.how == "unused":
            self.never = empty(site, 3)
        elif self.how == "attribute":
            site.module.extra = 1
        elif self.how == "closure":
            self.act = lambda value: value

    def after(self, acc: Tensor, y: Tensor, x: Tensor, context: Any, site: Any) -> Tensor:
        change = acc * self.scale
        if self.how == "silent":
            change = 0 * change
        elif self.how == "nan":
            change = change * float("nan")
        elif self.how == "writes":
            site.module.bias.data.add_(1.0)
        elif self.how == "counts":
            self.calls += 1
            change = change * self.calls
        elif self.how == "batch":
            change = change - change.mean(0, keepdim=True)
        elif self.how == "narrow" and y.dtype == torch.bfloat16:
            change = change * float("inf")
        elif self.how == "class":
            change = acc * SpoiledLayer.latest.scale
        return acc + change

    def to_file(self) -> dict[str, Tensor]:
        kept = super().to_file()
        return {k: v.clamp(max=0.0) for k, v in kept.items()} if self.how == "file" else kept

    def fold(self, weight: Tensor, bias: Tensor | None, site: Any) -> Any:
        factor = (1 + self.scale) * (1.01 if self.how == "fold" else 1.0)
        return weight * factor[:, None], None if bias is None else bias * factor


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    ours = (Spoiled, NormGate, Shift, Scale)
    for cls in ours:
        mm.register_adapter(cls)
    yield
    for cls in ours:
        del _REGISTRY[cls.method]


@pytest.mark.parametrize(
    "adapter", [Spoiled(), NormGate(), Shift(), Scale(), mm.Bottleneck(4), mm.LoRA(2)], ids=str
)
def test_a_sound_method_keeps_every_law(adapter: mm.Adapter) -> None:
    table = mm.check_laws(small(), adapter, hidden(), at=AT)
    verdicts = dict(table.rows)
    assert list(verdicts) == list(LAWS)
    told = {law for law, verdict in verdicts.items() if verdict != "holds"}
    assert told <= {"merges, or says why not"}


@pytest.mark.parametrize(
    ("how", "law", "seen"),
    [
        ("start", "starts as the identity", "the start is off by .*e-07 of the largest value"),
        ("nan", "starts as the identity", "the start is off by inf"),
        ("silent", "acts once it has learned", "the outputs are the backbone's"),
        ("global", "draws from its own generator only", "moved torch's random state"),
        ("writes", "leaves the backbone untouched", "3 tensors of the backbone changed"),
        ("unused", "gradients reach all of it", "no gradient in two steps for .*never"),
        ("attribute", "detached, nothing is left", "keys, hooks, flags, attributes or values"),
        ("file", "a file brings back the same", "what was loaded is off"),
        ("closure", "copies are equal and independent", "does not pickle"),
        ("class", "two of them switch without a trace", "two are attached, and 'a' is off"),
        ("counts", "recomputed in backward, it is the same", "the checkpointed pass is off"),
        ("batch", "no row sees its batch mates", "a row alone and among others is off"),
        ("narrow", "bfloat16 stays finite", "are not finite"),
        ("fold", "merges, or says why not", "merged, it is off by"),
    ],
)
def test_a_spoiled_method_is_told_which_law_it_breaks(how: str, law: str, seen: str) -> None:
    backbone = small()
    before, kept = state(backbone.model), values(backbone.model)
    with pytest.raises(CheckError, match=rf"laws do not hold for Spoiled\(how='{how}'\) on Small"):
        mm.check_laws(backbone, Spoiled(how), hidden(), at=AT)
    with pytest.raises(CheckError, match=rf"\n  {law}.*: .*{seen}"):
        mm.check_laws(backbone, Spoiled(how), hidden(), at=AT)
    assert state(backbone.model) == before
    assert_same_values(kept, values(backbone.model))


def test_a_start_that_is_no_identity_has_to_be_declared_and_true(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Scale, "not_identity", "it is meant to be")
    with pytest.raises(CheckError, match="it declares a start that it has not"):
        mm.check_laws(small(), Scale(), hidden(), at=AT)
    monkeypatch.setattr(NormGate, "not_identity", "the gates stand open")
    verdicts = dict(mm.check_laws(small(), NormGate(start=0.5), hidden(), at=AT).rows)
    assert verdicts["starts as the identity"] == "declared: the gates stand open"


def test_a_real_backbone_takes_keywords_and_its_own_batch_mates_are_excused() -> None:
    tiny = BACKBONES["hf_vit"]
    verdicts = dict(mm.check_laws(tiny.fresh(), mm.LoRA(2), tiny.batch(2)).rows)
    assert set(verdicts.values()) == {"holds"}

    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) - x.mean(0)

    model = Mixing()
    anatomy = mm.Anatomy.from_paths(model, {"only": "linear"})
    verdicts = dict(
        mm.check_laws(mm.Backbone(model, anatomy=anatomy), mm.LoRA(2), torch.randn(3, 4), "only")
    )
    assert verdicts["no row sees its batch mates"].startswith("not checked: rows see each other")


def test_what_is_attached_stays_and_does_not_count() -> None:
    backbone = small()
    attachment = randomise(mm.attach(backbone, mm.Bottleneck(4), "own", at=AT))
    before, trained = state(backbone.model), [p.clone() for p in attachment.parameters()]
    mm.check_laws(backbone, mm.Bottleneck(2), hidden(), at=AT)
    assert state(backbone.model) == before
    assert all(map(torch.equal, attachment.parameters(), trained))


def test_a_merged_attachment_and_a_block_without_gradients_do_not_disturb_it() -> None:
    backbone = small()
    randomise(mm.attach(backbone, mm.LoRA(2), "own", at=AT))
    mm.merge(backbone)
    before, kept, drawn = state(backbone.model), values(backbone.model), torch.get_rng_state()
    for quiet in (torch.no_grad, torch.inference_mode):
        with quiet():
            mm.check_laws(backbone, mm.Bottleneck(2), hidden(), at=AT)
    assert state(backbone.model) == before
    assert_same_values(kept, values(backbone.model))
    assert torch.equal(torch.get_rng_state(), drawn)


def test_one_row_proves_nothing_about_batch_mates() -> None:
    with pytest.raises(CheckError, match="the batch has one row; give it two or more rows"):
        mm.check_laws(small(), mm.Bottleneck(4), hidden(1), at=AT)


def test_an_unregistered_method_and_an_unknown_site_are_refused_at_once() -> None:
    @dataclass(frozen=True)
    class Nameless(mm.Adapter):
        pass

    with pytest.raises(
        AdapterError, match=r"Nameless is not registered as ''(.|\n)*register_adapter"
    ):
        mm.check_laws(small(), Nameless(), hidden(), at=AT)
    with pytest.raises(SiteError, match="matches nothing"):
        mm.check_laws(small(), mm.Bottleneck(4), hidden(), at="layers[*].mpl")


def test_fields_that_json_cannot_hold_are_refused() -> None:
    adapter = Spoiled(how=("a", ("b",)))  # type: ignore[arg-type]
    with pytest.raises(AdapterError, match="does not come back from its own JSON"):
        mm.check_laws(small(), adapter, hidden(), at=AT)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["scale_shift", "adapter_bias", "compacter", "bi_adaptformer"])
def test_the_packages_own_methods_keep_them_too(method: str) -> None:
    from mmadapt.adapter import adapters

    tiny = BACKBONES["hf_vit"]
    mm.check_laws(tiny.fresh(), adapters()[method](), tiny.batch(2))
