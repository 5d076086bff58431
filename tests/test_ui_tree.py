"""`mm.ui.inspect`: a tree of what is attached, with switches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from backbones import BACKBONES, pixels
from snapshot import randomise
from torch import nn

import mmadapt as mm
from mmadapt.core.bank import bank_of
from mmadapt.core.contribution import contribution
from mmadapt.core.report import updates


@pytest.fixture
def model() -> nn.Module:
    model = BACKBONES["open_clip_vision"].fresh()
    randomise(mm.attach(model, mm.Bottleneck(4), name="a"), seed=1)
    randomise(mm.attach(model, [mm.LoRA(2), mm.AdapterBias(shared_gate=True)], name="b"), seed=2)
    return model


def rows(view: Any) -> dict[str, Any]:
    """By group its switch, its button and what is below."""
    view.widget  # noqa: B018
    return {group.pattern: parts for group, *parts in view._rows.values()}


def parts(widget: Any) -> Iterator[Any]:
    """A widget and all that is in it."""
    yield widget
    for child in getattr(widget, "children", ()):
        yield from parts(child)


def send(control: Any, value: Any) -> None:
    control.set_state({"value": value})


def test_alike_sites_are_one_row_with_their_numbers(model: nn.Module) -> None:
    view = mm.ui.inspect(model, pixels(2))
    records = {(r["attachment"], r["sites"]): r for r in view.summary().records()}
    assert list(records)[:3] == [
        ("a", "vision.layers[*].mlp:out"),
        ("b", "vision.layers[*].attn.q:weight"),
        ("b", "vision.layers[*].attn.v:weight"),
    ]
    q = records["b", "vision.layers[*].attn.q:weight"]
    found = [v for (name, site), v in updates(model).items() if ".attn.q:" in site]
    assert q["layers"] == len(found) == 2
    assert q["ΔW / W"] == pytest.approx(sum(found) / 2)
    shares = contribution(model, pixels(2))
    assert q["share"] == pytest.approx(
        sum(shares.mean(f"vision.layers[{i}].attn.{{q,v}}:weight") for i in range(2)) / 2
    )
    assert records["a", "vision.layers[*].mlp:out"]["ΔW / W"] is None
    assert view.table().rows == mm.inspect(model, pixels(2)).rows


def test_columns_without_a_number_are_left_out() -> None:
    model = BACKBONES["open_clip_vision"].fresh()
    mm.attach(model, mm.Bottleneck(4))
    columns = mm.ui.inspect(model).summary().columns
    assert columns[-2:] == ("parameters", "norm")
    with_shares = mm.ui.inspect(model, pixels(2)).summary()
    assert with_shares.columns[-1] == "share"  # 0 at the start is a number


def test_a_switch_of_an_attachment_is_set_active(model: nn.Module) -> None:
    view = mm.ui.inspect(model)
    assert view.active == ["b"]
    view.widget  # noqa: B018
    send(view._checks["a"], True)
    assert mm.active(model).names == ("a", "b")
    send(view._checks["b"], False)
    assert view.active == ["a"]
    view.active = []
    assert mm.active(model) == mm.Sum()
    assert [check.value for check in view._checks.values()] == [False, False]
    view.active = "b"
    assert mm.active(model) == mm.Sum("b")


def test_weights_stay_when_others_are_switched(model: nn.Module) -> None:
    mm.set_active(model, mm.Stack("b", "a", weights=(0.5, 1)))
    view = mm.ui.inspect(model)
    view.active = ["b"]
    assert mm.active(model) == mm.Stack("b", weights=(0.5,))


def test_a_switch_of_a_group_lets_its_sites_rest(model: nn.Module) -> None:
    mm.set_active(model, "a")
    view = mm.ui.inspect(model)
    with torch.no_grad():
        whole = model(pixels(2))
        with mm.disabled(model):
            bare = model(pixels(2))
    switch = rows(view)["vision.layers[*].mlp:out"][0]
    send(switch, False)
    assert view.resting == ["vision.layers[0].mlp:out", "vision.layers[1].mlp:out"]
    with torch.no_grad():
        assert torch.equal(model(pixels(2)), bare)
    send(switch, True)
    assert view.resting == []
    with torch.no_grad():
        assert torch.equal(model(pixels(2)), whole)


def test_attachments_at_the_same_sites_rest_together() -> None:
    model = BACKBONES["open_clip_vision"].fresh()
    for name in "ab":
        mm.attach(model, mm.Bottleneck(4), name=name)
    view = mm.ui.inspect(model)
    view.widget  # noqa: B018
    first, second = (switch for _, switch, *_ in view._rows.values())
    sites = ["vision.layers[0].mlp:out", "vision.layers[1].mlp:out"]
    for moved in (first, second):
        send(moved, False)
        assert view.resting == sites and not first.value and not second.value
        send(moved, True)
        assert view.resting == [] and first.value and second.value


def test_sites_that_rest_can_be_assigned_and_survive_other_switches(model: nn.Module) -> None:
    view = mm.ui.inspect(model)
    view.resting = "vision.layers[0].attn.*"
    found = rows(view)
    assert found["vision.layers[*].attn.q:weight"][0].value is True  # only some of them rest
    send(found["vision.layers[*].mlp:out"][0], False)
    assert "vision.layers[0].attn.q:weight" in view.resting
    assert "vision.layers[1].attn.q:weight" not in view.resting
    assert "vision.layers[1].mlp:out" in view.resting
    view.resting = []
    assert bank_of(model).resting == frozenset()  # type: ignore[union-attr]
    assert found["vision.layers[*].mlp:out"][0].value is True


def test_what_sites_share_has_no_switch(model: nn.Module) -> None:
    switches = rows(mm.ui.inspect(model))
    assert switches["shared"][0].disabled


def test_an_opened_group_lists_its_sites(model: nn.Module) -> None:
    view = mm.ui.inspect(model)
    _, opened, below = rows(view)["vision.layers[*].attn.q:weight"]
    assert below.value == ""
    send(opened, True)
    assert "vision.layers[1].attn.q:weight" in below.value
    assert opened.description == "▾"
    send(opened, False)
    assert below.value == ""


@pytest.mark.parametrize(
    ("state", "value", "text"),
    [
        ("active", ["c"], "no attachment is named 'c'"),
        ("resting", ["vision.layers[9].mlp"], "matches nothing"),
    ],
)
def test_what_is_not_there_is_refused_and_nothing_changes(
    model: nn.Module, state: str, value: list[str], text: str
) -> None:
    view = mm.ui.inspect(model)
    with pytest.raises(mm.errors.MmadaptError, match=text):
        setattr(view, state, value)
    assert (view.active, view.resting) == (["b"], [])


def test_an_attachment_that_has_gone_is_said_in_the_widget(model: nn.Module) -> None:
    view = mm.ui.inspect(model)
    view.widget  # noqa: B018
    mm.detach(model, "a")
    send(view._checks["a"], True)
    assert "no attachment is named" in view.widget.children[1].value
    assert mm.active(model) == mm.Sum("b")
    view.refresh()
    assert list(view._checks) == ["b"]


def test_two_thousand_sites_are_a_few_widgets() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.down(self.up(x))

    model = nn.Module()
    model.blocks = nn.ModuleList(Block() for _ in range(1000))
    mm.attach(model, mm.LoRA(1), at=["blocks[*].up", "blocks[*].down"])
    view = mm.ui.inspect(model)
    assert sum(len(group.layers) for group in view.groups) == 2000
    assert len(list(parts(view.widget))) < 30
    _, opened, below = rows(view)["blocks[*].up:out"]
    send(opened, True)
    assert "900 more" in below.value
    bundle = view._repr_mimebundle_()
    assert len(bundle["text/plain"].splitlines()) < 10
    assert len(bundle["image/png"]) < 100_000
