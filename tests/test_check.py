"""The check on demand: sites fire, adapter tensors train, the backbone does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backbones import BACKBONES, pixels
from handmade import NormGate, hidden, small
from snapshot import assert_same_values, hook_tables, randomise, state, values
from torch import nn

import mmadapt as mm
from mmadapt.errors import AttachError, CheckError


@pytest.mark.parametrize("name", ["open_clip", "hf_clip", "hf_vit_classifier"])
def test_a_good_attachment_gets_one_row_a_site(name: str) -> None:
    tiny = BACKBONES[name]
    model = tiny.fresh()
    attachment = mm.attach(model, mm.Bottleneck(4))
    table = mm.check(model, tiny.batch(2))
    assert [row[0] for row in table] == list(attachment.sites)
    assert all(row[1] for row in table)
    assert f"{len(attachment.sites)} sites fire, {4 * len(attachment.sites)} tensors train" in str(
        table
    )
    assert "up_bias" in table.rows[0][2]
    assert "down zero" in table.rows[0][2]  # as it must be while up is zero


@pytest.mark.parametrize(
    "batch", [hidden(), (hidden(),), [hidden()], {"hidden_states": hidden()}], ids=type
)
def test_a_batch_is_a_tensor_arguments_or_keywords(batch: Any) -> None:
    backbone = small()
    mm.attach(backbone, mm.Bottleneck(2), at="layers[*].mlp")
    assert len(mm.check(backbone, batch)) == 3


def test_nothing_is_left_behind() -> None:
    tiny = BACKBONES["open_clip"]
    model = tiny.fresh()
    attachment = randomise(mm.attach(model, [mm.Bottleneck(4), mm.LoRA(2)]))
    tiny.outputs(model)
    kept = torch.full_like(next(attachment.parameters()), 3.0)
    next(attachment.parameters()).grad = kept
    before, tensors, random = state(model), values(model), torch.get_rng_state()
    mm.check(model, tiny.batch(2))
    assert state(model) == before
    assert_same_values(tensors, values(model))
    assert torch.equal(torch.get_rng_state(), random)
    assert next(attachment.parameters()).grad is kept
    assert [p.grad for p in attachment.parameters()][1:] == [None] * (attachment_tensors(model) - 1)


def attachment_tensors(model: nn.Module) -> int:
    return len(list(mm.attachments(model)["default"].parameters()))


def test_it_works_under_no_grad_too() -> None:
    backbone = small()
    mm.attach(backbone, mm.Bottleneck(2), at="layers[*].mlp")
    with torch.no_grad():
        assert len(mm.check(backbone, hidden())) == 3
        assert not torch.is_grad_enabled()


def test_sites_that_the_batch_does_not_reach_are_named() -> None:
    clip: Any = BACKBONES["open_clip"].fresh()
    mm.attach(clip, mm.Bottleneck(4))
    with pytest.raises(CheckError) as caught:
        mm.check(clip, {"image": pixels(2)})
    assert "2 sites did not fire: text.layers[0].mlp:out, text.layers[1].mlp:out" in str(
        caught.value
    )
    assert "never called" in caught.value.hint
    mm.check(clip, BACKBONES["open_clip"].batch(2))


def test_a_site_that_fired_once_must_fire_again() -> None:
    clip: Any = BACKBONES["open_clip"].fresh()
    mm.attach(clip, mm.Bottleneck(4))
    BACKBONES["open_clip"].outputs(clip)
    with pytest.raises(CheckError, match="2 sites did not fire"):
        mm.check(clip, {"image": pixels(2)})


def test_a_backbone_tensor_that_trains_is_named() -> None:
    backbone = small()
    mm.attach(backbone, mm.Bottleneck(2), at="layers[*].mlp")
    backbone.model.get_parameter("head.weight").requires_grad_(True)
    with pytest.raises(CheckError) as caught:
        mm.check(backbone, hidden())
    assert "1 backbone tensors require a gradient, first 'head.weight'" in str(caught.value)
    assert "requires_grad_(False)" in caught.value.hint


def test_nothing_active_is_said_with_the_way_on() -> None:
    backbone = small()
    mm.attach(backbone, mm.Bottleneck(2), at="layers[*].mlp", name="sketch")
    mm.set_active(backbone)
    with pytest.raises(CheckError, match="no attachment is active") as caught:
        mm.check(backbone, hidden())
    assert caught.value.hint == "set_active(model, 'sketch')"


def test_nothing_attached_is_said() -> None:
    with pytest.raises(AttachError, match="nothing is attached to this Small"):
        mm.check(small(), hidden())


def test_an_output_that_does_not_depend_on_the_adapter_is_found() -> None:
    class Ignoring(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.ignored = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.ignored(x)
            return self.used(x)

    spans = {
        name: mm.Span(name, x="0|input", channels=f"{name}.weight") for name in ("used", "ignored")
    }
    backbone = mm.Backbone(Ignoring(), anatomy=mm.Anatomy("ignoring", spans, {"all": ""}))
    mm.attach(backbone, mm.Bottleneck(2), at=["used", "ignored"])
    with pytest.raises(CheckError) as caught:
        mm.check(backbone, hidden())
    assert "4 adapter tensors get no gradient, first '0/ignored:out.down'" in str(caught.value)
    assert "the output does not depend on them" in caught.value.hint


def test_an_output_without_numbers_to_differentiate_is_said() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x).argmax(-1)

    span = mm.Span("linear", x="0|input", channels="linear.weight")
    backbone = mm.Backbone(Counting(), anatomy=mm.Anatomy("counting", {"y": span}, {"all": ""}))
    mm.attach(backbone, mm.Bottleneck(2), at="y")
    with pytest.raises(CheckError, match="no floating-point tensor"):
        mm.check(backbone, hidden())


def test_a_layer_with_nothing_to_train_is_said_to_fire() -> None:
    tiny = BACKBONES["zero_shot_classifier"]
    model = tiny.fresh()
    mm.attach(model, mm.TipAdapter(4))
    assert mm.check(model, tiny.batch(2)).rows == [("logits:out", True, "nothing to train")]


def test_layers_that_read_taps_are_checked_like_others() -> None:
    backbone = small()
    mm.attach(backbone, NormGate())
    before = hook_tables(backbone.model)
    table = mm.check(backbone, hidden())
    assert len(table) == 3
    assert all(row[2].startswith("gate ") for row in table)
    left = {
        name: len(before[name]) - len(hooks)
        for name, hooks in hook_tables(backbone.model).items()
        if len(before[name]) != len(hooks)
    }
    assert left == {"._forward_hooks": 1}  # the first forward's own check


def test_it_works_inside_inference_mode() -> None:
    backbone = small()
    mm.attach(backbone, mm.Bottleneck(2), at="layers[*].mlp")
    with torch.inference_mode():
        assert len(mm.check(backbone, hidden())) == 3
