"""Adapters folded into weights, and taken out again."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from backbones import BACKBONES
from snapshot import assert_equal, assert_same_values, flags, randomise, state, values

import mmadapt as mm

HOMES = ("open_clip", "hf_clip", "hf_vit")


def adapted(home: str, **kwargs: Any) -> tuple[Any, Any, mm.Attachment]:
    tiny = BACKBONES[home]
    model = tiny.fresh()
    return tiny, model, randomise(mm.attach(model, mm.LoRA(2, alpha=4.0), **kwargs))


def outputs(tiny: Any, model: Any) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        return tiny.outputs(model)


@pytest.mark.parametrize("home", HOMES)
def test_a_merged_model_answers_as_the_adapted_one_did(home: str) -> None:
    tiny, model, _ = adapted(home)
    before = outputs(tiny, model)
    mm.merge(model)
    for merged, wanted in zip(outputs(tiny, model), before, strict=True):
        assert torch.allclose(merged, wanted, atol=2e-5)
    assert not any(hook.plan for hook in model._mmadapt.hooks.values())


@pytest.mark.parametrize("home", HOMES)
def test_unmerge_restores_every_bit_and_the_adapter_acts_again(home: str) -> None:
    tiny, model, _ = adapted(home)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    before = outputs(tiny, model)
    mm.merge(model)
    assert any(not torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    mm.unmerge(model)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert_equal(outputs(tiny, model), before)


def test_a_permanent_merge_leaves_a_plain_model() -> None:
    tiny, model, _ = adapted("open_clip")
    bare = tiny.fresh()
    before = outputs(tiny, model)
    mm.merge(model, permanent=True)
    assert model.state_dict().keys() == bare.state_dict().keys()
    assert flags(model) == flags(bare)
    assert not mm.attachments(model)
    for merged, wanted in zip(outputs(tiny, model), before, strict=True):
        assert torch.allclose(merged, wanted, atol=2e-5)


def test_detach_takes_a_merged_adapter_out_of_the_weights() -> None:
    tiny, model, _ = adapted("open_clip")
    bare = values(tiny.fresh())
    mm.merge(model)
    mm.detach(model)
    assert_same_values(bare, values(model))


def test_the_effective_weight_kept_for_evaluation_is_not_used_after_a_merge() -> None:
    tiny, model, _ = adapted("open_clip")
    model.eval()
    randomise(mm.attach(model, mm.LoRA(1), name="second"), seed=3)
    mm.set_active(model, "default", "second")
    both = outputs(tiny, model)
    mm.merge(model, "default")
    for found, wanted in zip(outputs(tiny, model), both, strict=True):
        assert torch.allclose(found, wanted, atol=2e-5)


def test_merges_leave_in_the_opposite_order() -> None:
    _, model, _ = adapted("open_clip")
    randomise(mm.attach(model, mm.LoRA(1), name="second"), seed=3)
    bare = {k: v.clone() for k, v in model.state_dict().items()}
    mm.merge(model, "default")
    mm.merge(model, "second")
    with pytest.raises(mm.errors.MergeError, match=r"'second' was merged after 'default'"):
        mm.unmerge(model, "default")
    mm.unmerge(model, "second")
    mm.unmerge(model, "default")
    assert all(torch.equal(v, bare[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("at", "words"),
    [
        ("*.layers[*].mlp", "the site stands for no weight"),
        ("*.layers[*].mlp.down", "an activation stands between"),
    ],
)
def test_what_cannot_be_merged_says_why_and_changes_nothing(at: str, words: str) -> None:
    model = BACKBONES["open_clip"].fresh()
    randomise(mm.attach(model, mm.Bottleneck(2), at=at))
    before, kept = state(model), values(model)
    with pytest.raises(mm.errors.MergeError, match=words):
        mm.merge(model)
    assert state(model) == before
    assert_same_values(kept, values(model))


def test_a_part_that_cannot_be_merged_leaves_the_other_part_unmerged() -> None:
    model = BACKBONES["open_clip"].fresh()
    bare = {k: v.clone() for k, v in model.state_dict().items()}
    randomise(mm.attach(model, [mm.LoRA(2), mm.Bottleneck(2)]))
    with pytest.raises(mm.errors.MergeError):
        mm.merge(model)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in bare.items())


def test_what_is_merged_cannot_be_merged_or_activated_again() -> None:
    _, model, _ = adapted("open_clip")
    with pytest.raises(mm.errors.MergeError, match="'default' is not merged"):
        mm.unmerge(model)
    mm.merge(model)
    with pytest.raises(mm.errors.MergeError, match="is merged already"):
        mm.merge(model)
    with pytest.raises(mm.errors.AttachError, match="is merged into the weights and acts already"):
        mm.set_active(model, "default")


def test_a_merge_that_is_not_finite_is_refused() -> None:
    _, model, attachment = adapted("open_clip")
    bare = {k: v.clone() for k, v in model.state_dict().items() if "_mmadapt" not in k}
    with torch.no_grad():
        next(attachment.parameters()).fill_(float("inf"))
    with pytest.raises(mm.errors.MergeError, match="not finite"):
        mm.merge(model)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in bare.items())


def test_a_merged_adapter_saves_as_it_was(tmp_path: Any) -> None:
    tiny, model, _ = adapted("open_clip")
    before = outputs(tiny, model)
    mm.save(model, tmp_path / "plain")
    mm.merge(model)
    mm.save(model, tmp_path / "merged")
    for name in ("adapter.json", "adapter.safetensors"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "merged" / name).read_bytes()
    other = tiny.fresh()
    mm.load_adapter(other, tmp_path / "merged")
    assert_equal(outputs(tiny, other), before)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_of_a_merged_model_unmerges_by_itself(copied: Any) -> None:
    tiny, model, _ = adapted("open_clip")
    before = outputs(tiny, model)
    mm.merge(model)
    merged = outputs(tiny, model)
    other = copied(model)
    mm.unmerge(other)
    assert_equal(outputs(tiny, other), before)
    assert_equal(outputs(tiny, model), merged)
