"""`mm.ui.mix`, and what all views of a few values share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backbones import BACKBONES, pixels
from handmade import Scale
from snapshot import randomise
from torch import nn

import mmadapt as mm
from mmadapt.core.table import Table
from mmadapt.ui.base import WIDGET
from mmadapt.ui.shown import as_html, as_text


@pytest.fixture
def model() -> nn.Module:
    model = BACKBONES["open_clip_vision"].fresh()
    randomise(mm.attach(model, mm.Bottleneck(4), name="a"), seed=1)
    randomise(mm.attach(model, mm.Bottleneck(3), name="b-2"), seed=2)
    return model


def total(model: Any) -> Any:
    def run() -> float:
        with torch.no_grad():
            return float(model(pixels(2)).sum())

    return run


def controls(view: Any) -> list[Any]:
    return list(view.widget.children[0].children[:-1])


def below(view: Any) -> str:
    return view.widget.children[0].children[-1].value


def move(control: Any, value: Any) -> None:
    """What a front end sends."""
    control.set_state({"value": value})


def test_weights_begin_where_the_model_is_and_can_be_assigned(model: nn.Module) -> None:
    run = total(model)
    view = mm.ui.mix(model, run)
    assert view.weights == {"a": 0.0, "b-2": 1.0}
    assert view.output == run()
    view.weights = {"a": 0.25}
    assert view.weights == {"a": 0.25, "b-2": 1.0}
    assert mm.active(model) == mm.Sum("b-2", "a", weights=(1.0, 0.25))
    assert view.output == run()
    view.weights = {"a": 0, "b-2": 0}
    assert mm.active(model) == mm.Sum()
    assert view.output == run()


def test_a_slider_moves_the_weight_and_the_output(model: nn.Module) -> None:
    view = mm.ui.mix(model, total(model))
    first, _ = controls(view)
    assert first.description == "a"
    before = view.output
    move(first, 0.5)
    assert view.weights["a"] == 0.5
    assert view.output != before
    assert f"{view.output:.3f}" in below(view)


def test_assigned_weights_move_the_sliders_and_widen_them(model: nn.Module) -> None:
    view = mm.ui.mix(model, total(model))
    first, second = controls(view)
    view.weights = {"a": 1.5, "b-2": -0.5}
    assert (first.value, first.max, second.value, second.min) == (1.5, 1.5, -0.5, -0.5)
    assert mm.active(model) == mm.Sum("b-2", "a", weights=(-0.5, 1.5))


def test_a_stack_stays_a_stack_in_its_order(model: nn.Module) -> None:
    mm.set_active(model, mm.Stack("b-2", "a"))
    view = mm.ui.mix(model, total(model))
    view.weights = {"a": 0.5}
    assert mm.active(model) == mm.Stack("b-2", "a", weights=(1.0, 0.5))


def test_what_adds_no_change_has_a_switch() -> None:
    model = BACKBONES["open_clip_vision"].fresh()
    randomise(mm.attach(model, Scale(), name="scale", at="vision.layers[*].mlp"))
    view = mm.ui.mix(model, total(model))
    (switch,) = controls(view)
    assert switch.value is True
    move(switch, False)
    assert mm.active(model) == mm.Sum()
    with pytest.raises(mm.errors.AttachError, match=r"cannot have the weight 0\.5"):
        view.weights = {"scale": 0.5}
    assert view.weights == {"scale": 0.0}


def test_an_error_of_the_function_is_shown_and_the_next_move_works(model: nn.Module) -> None:
    broken = [True]

    def show() -> str:
        if broken[0] and mm.active(model).names != ("b-2",):
            raise RuntimeError("no <GPU>")
        return "fine"

    view = mm.ui.mix(model, show)
    first, _ = controls(view)
    line = view.widget.children[1]
    move(first, 0.5)
    assert isinstance(view.error, RuntimeError)
    assert "no &lt;GPU&gt;" in line.value
    broken[0] = False
    move(first, 0.75)
    assert view.error is None
    assert line.value == ""
    assert "fine" in below(view)


def test_unknown_attachments_are_refused_and_nothing_changes(model: nn.Module) -> None:
    view = mm.ui.mix(model, total(model))
    with pytest.raises(mm.errors.AttachError, match=r"no attachment is named 'b'") as caught:
        view.weights = {"a": 1.0, "b": 1.0}
    assert "b-2" in caught.value.hint
    assert view.weights == {"a": 0.0, "b-2": 1.0}
    assert mm.active(model) == mm.Sum("b-2")


@pytest.mark.parametrize(
    ("show", "limits", "text"),
    [
        (3, (0.0, 1.0), "expected a function without arguments"),
        (str, (1.0, 0.0), "expected a lower and a higher number"),
    ],
)
def test_what_cannot_be_mixed_is_refused(model: nn.Module, show: Any, limits: Any, text: str) -> None:  # fmt: skip
    with pytest.raises(mm.errors.DataError, match=text):
        mm.ui.mix(model, show, limits)


def test_nothing_to_mix_is_refused() -> None:
    with pytest.raises(mm.errors.AttachError, match="nothing is attached"):
        mm.ui.mix(BACKBONES["open_clip_vision"].fresh(), str)


def test_two_views_of_one_model_go_by_the_last_that_chose(model: nn.Module) -> None:
    one, other = mm.ui.mix(model, total(model)), mm.ui.mix(model, total(model))
    one.weights = {"a": 0.5}
    other.weights = {"a": 1.0, "b-2": 0.0}
    assert mm.active(model) == mm.Sum("a")
    one.refresh()
    assert one.weights == {"a": 1.0, "b-2": 0.0}
    assert one.output == other.output


def test_what_was_attached_since_has_a_slider_after_refresh(model: nn.Module) -> None:
    view = mm.ui.mix(model, total(model))
    assert len(controls(view)) == 2
    mm.attach(model, mm.Bottleneck(2), name="new")
    view.refresh()
    assert [control.description for control in controls(view)] == ["a", "b-2", "new"]
    move(controls(view)[0], 0.5)
    assert mm.active(model).names == ("new", "a")


def test_what_was_detached_since_has_no_slider_after_refresh(model: nn.Module) -> None:
    view = mm.ui.mix(model, total(model))
    assert len(controls(view)) == 2
    mm.detach(model, "a")
    view.refresh()
    assert view.weights == {"b-2": 1.0}
    assert [control.description for control in controls(view)] == ["b-2"]
    mm.detach(model)
    with pytest.raises(mm.errors.AttachError, match="nothing is attached"):
        view.refresh()
    assert view.weights == {"b-2": 1.0}


def test_a_view_is_a_picture_and_a_text(model: nn.Module) -> None:
    view = mm.ui.mix(model, lambda: "the sky is blue")
    bundle = view._repr_mimebundle_()
    assert bundle["image/png"][:4] == b"\x89PNG"
    assert bundle["text/plain"] == "mix of a 0, b-2 1\nthe sky is blue"
    assert WIDGET not in bundle  # there is no notebook here


def test_what_a_function_returns_is_shown_by_its_own_form() -> None:
    from matplotlib.figure import Figure
    from PIL import Image

    table = Table(("a",), [(1,)])
    assert as_html(table) == table._repr_html_()
    assert as_html("a < b") == '<pre style="white-space:pre-wrap">a &lt; b</pre>'
    assert as_html([1.5, "x"]).count("<pre") == 2
    for picture in (Figure(), Image.new("L", (3, 3))):
        assert "data:image/png;base64," in as_html(picture)
    assert as_text(torch.tensor(1.5)) == "1.500"
    for value in (Figure(), Image.new("L", (3, 3)), table, 3, "x" * 300, None):
        view = mm.ui.mix(_one(), lambda value=value: value)
        assert view._repr_mimebundle_()["image/png"]


def _one() -> nn.Module:
    model = BACKBONES["open_clip_vision"].fresh()
    mm.attach(model, mm.Bottleneck(2))
    return model
