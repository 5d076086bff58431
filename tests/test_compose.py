"""Weights of attachments, and sites that rest: how much of what is active acts."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from backbones import BACKBONES, pixels
from snapshot import assert_close, assert_equal, differ, hook_tables, randomise
from straight import at_mlp, delta, vision
from torch import Tensor, nn

import mmadapt as mm
from mmadapt.core.bank import bank_of

UP = "vision.layers[0].mlp.up:weight"


@pytest.fixture
def model() -> nn.Module:
    return BACKBONES["open_clip_vision"].fresh()


def run(model: Any) -> Tensor:
    with torch.no_grad():
        return model(pixels(3))


def _two(model: nn.Module) -> tuple[Any, Any]:
    a = randomise(mm.attach(model, mm.Bottleneck(4), name="a"), seed=1)
    b = randomise(mm.attach(model, mm.Bottleneck(3), name="b"), seed=2)
    return a, b


# -- weights ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [mm.Sum, mm.Stack])
def test_a_weight_multiplies_the_change_at_every_site(model: nn.Module, kind: Any) -> None:
    a, b = _two(model)

    def branch(i: int, y: Tensor, x: Tensor, norm1: Tensor) -> Tensor:
        first = y + 0.3 * delta(at_mlp(a, i), y)
        return first + 2 * delta(at_mlp(b, i), first if kind is mm.Stack else y)

    mm.set_active(model, kind("a", "b", weights=(0.3, 2)))
    assert_close((run(model),), (vision(model, pixels(3), branch),), 1e-5)
    assert repr(mm.active(model)) == f"{kind.__name__}('a', 'b', weights=(0.3, 2))"
    b.detach()
    assert mm.active(model) == kind("a", weights=(0.3,))


def test_a_change_of_a_weight_is_multiplied_anew_whenever_its_weight_changes(
    model: nn.Module,
) -> None:
    randomise(mm.attach(model, mm.LoRA(2, at=UP), name="lora"))
    target = bank_of(model).hooks[UP].site.module  # type: ignore[union-attr]
    own, seen = target.weight.detach().clone(), []
    target.register_forward_pre_hook(lambda module, _: seen.append(module.weight.detach().clone()))
    weights = (1.0, 0.5, -1.0, 0.5, 0.0)
    for weight in weights:  # without gradients the effective weight is kept from call to call
        mm.set_active(model, mm.Sum("lora", weights=(weight,)))
        run(model)
        gc.collect()  # ids of what was in force before may be given out again
    for found, weight in zip(seen, weights, strict=True):
        assert_close((found - own,), (weight * (seen[0] - own),), 1e-5)
    assert differ((seen[0],), (own,))


def test_an_input_is_changed_by_its_weight_too(model: nn.Module) -> None:
    randomise(mm.attach(model, mm.Bottleneck(4, at="vision.layers[0].mlp:in"), name="a"))
    hook = bank_of(model).hooks["vision.layers[0].mlp:in"]  # type: ignore[union-attr]
    seen: list[Tensor] = []
    hook.site.module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for weight in (0.0, 1.0, 0.25):
        mm.set_active(model, mm.Sum("a", weights=(weight,)))
        run(model)
    assert_close((seen[2] - seen[0],), (0.25 * (seen[1] - seen[0]),), 1e-5)


def test_weighted_attachments_train_by_their_weight(model: nn.Module) -> None:
    attachment = randomise(mm.attach(model, mm.Bottleneck(4, at="vision.layers[1].mlp"), name="a"))
    hook = bank_of(model).hooks["vision.layers[1].mlp:out"]  # type: ignore[union-attr]
    x = torch.randn(2, 5, hook.site.width)

    def gradient(weight: float) -> Tensor:
        mm.set_active(model, mm.Sum("a", weights=(weight,)))
        (found,) = torch.autograd.grad(hook.replay(x, x).sum(), [at_mlp(attachment, 1).up])
        return found

    assert_close((gradient(0.5),), (0.5 * gradient(1.0),), 1e-5)


@pytest.mark.parametrize("weights", [(1.0,), (1, "2"), (1, float("nan")), 3, (1, float("inf"))])
def test_weights_that_mean_nothing_are_refused(model: nn.Module, weights: Any) -> None:
    _two(model)
    with pytest.raises(mm.errors.AttachError, match="expected 2 finite numbers, one a name"):
        mm.set_active(model, mm.Sum("a", "b", weights=weights))
    assert mm.active(model) == mm.Sum("b")


# -- sites that rest --------------------------------------------------------------------------------


def test_disabled_at_sites_leaves_the_others_acting(model: nn.Module) -> None:
    a, _ = _two(model)
    mm.set_active(model, "a")
    before, tables = run(model), hook_tables(model)
    with mm.disabled(model, at="vision.layers[0].mlp"):
        assert mm.active(model) == mm.Sum("a")

        def branch(i: int, y: Tensor, x: Tensor, norm1: Tensor) -> Tensor:
            return y + delta(at_mlp(a, i), y) if i else y

        assert_close((run(model),), (vision(model, pixels(3), branch),), 1e-5)
        mm.attach(model, mm.Bottleneck(2, at="vision.layers[1].mlp"), name="c")
    mm.detach(model, "c")
    mm.set_active(model, "a")
    assert torch.equal(run(model), before)
    assert hook_tables(model) == tables


def test_blocks_that_disable_sites_and_all_nest(model: nn.Module) -> None:
    bare = run(model)
    _two(model)
    whole = run(model)
    with mm.disabled(model, at="vision.layers[0].mlp:out"):
        part = run(model)
        with mm.disabled(model, at="vision.layers[1].mlp"):
            assert_equal((run(model),), (bare,))
        assert_equal((run(model),), (part,))
        with mm.disabled(model):
            assert_equal((run(model),), (bare,))
            with mm.disabled(model, at="vision.layers[1].mlp"):
                pass
            assert_equal((run(model),), (bare,))
        assert_equal((run(model),), (part,))
    assert_equal((run(model),), (whole,))
    assert differ((part,), (whole,))
    assert differ((part,), (bare,))


def test_choosing_anew_wakes_what_rested(model: nn.Module) -> None:
    _two(model)
    whole = run(model)
    with mm.disabled(model, at=["vision.layers[*].mlp"]):
        mm.set_active(model, "b")
        assert torch.equal(run(model), whole)
    assert torch.equal(run(model), whole)


@pytest.mark.parametrize("at", ["vision.layers[*].attn", "vision.layers[*].mlp:in", ""])
def test_sites_where_nothing_is_attached_cannot_rest(model: nn.Module, at: str) -> None:
    _two(model)
    before = run(model)
    with pytest.raises(mm.errors.SiteError), mm.disabled(model, at=at):
        pass
    assert torch.equal(run(model), before)


def test_compiled_code_sees_weights_and_sites_that_rest(model: nn.Module) -> None:
    _two(model)
    compiled = torch.compile(model, backend="aot_eager")
    for choose in (
        lambda: mm.set_active(model, mm.Sum("a", "b", weights=(0.5, 2))),
        lambda: mm.set_active(model, mm.Sum("a", "b", weights=(0.25, 2))),
        lambda: bank_of(model).rest(frozenset({"vision.layers[0].mlp:out"})),  # type: ignore[union-attr]
        lambda: mm.set_active(model, "b"),
    ):
        choose()
        assert_close((run(compiled),), (run(model),), 1e-5)
    torch._dynamo.reset()


def test_a_copy_keeps_weights_and_resting_sites(model: nn.Module) -> None:
    _two(model)
    mm.set_active(model, mm.Sum("a", "b", weights=(0.5, 2)))
    with mm.disabled(model, at="vision.layers[1].mlp"):
        copied = copy.deepcopy(model)
        assert torch.equal(run(copied), run(model))
        mm.set_active(copied, "b")
        assert differ((run(copied),), (run(model),))
