"""How much every site changes what flows through it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backbones import BACKBONES, pixels
from snapshot import assert_close, flags, hook_tables, randomise
from straight import at_mlp, delta
from torch import Tensor, nn

import mmadapt as mm
from mmadapt.core.contribution import contribution
from mmadapt.core.report import updates

MLP = "vision.layers[*].mlp"


@pytest.fixture
def model() -> nn.Module:
    return BACKBONES["open_clip_vision"].fresh()


def module_at(model: nn.Module, site: str) -> nn.Module:
    from mmadapt.core.bank import bank_of

    return bank_of(model).hooks[site].site.module  # type: ignore[union-attr]


def _run(model: Any) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(pixels(3))


def share(new: Tensor, old: Tensor) -> Tensor:
    return (new - old).norm(dim=-1) / old.norm(dim=-1)


def test_a_share_is_the_changes_length_at_every_position(model: nn.Module) -> None:
    attachment = randomise(mm.attach(model, mm.Bottleneck(4), name="a"))
    seen: dict[int, Tensor] = {}
    for i in range(2):  # what the module itself returns
        module = module_at(model, f"vision.layers[{i}].mlp:out")
        module.register_forward_hook(
            lambda *call, i=i: seen.setdefault(i, call[2].detach().clone()), prepend=True
        )
    found = contribution(model, pixels(3))
    assert list(found.shares) == ["vision.layers[0].mlp:out", "vision.layers[1].mlp:out"]
    for i, value in enumerate(found.shares.values()):
        expected = share(seen[i] + delta(at_mlp(attachment, i), seen[i]), seen[i])
        assert_close((value,), (expected,), 1e-5)
        assert value.shape == (3, seen[i].shape[1])
    first = found.table().records()[0]
    assert first["positions"] == seen[0].shape[1]
    assert first["mean share"] == pytest.approx(float(found.shares[first["site"]].mean()))


def test_weights_that_one_module_reads_are_measured_where_it_returns(model: nn.Module) -> None:
    randomise(mm.attach(model, mm.LoRA(2), name="lora"))
    found = contribution(model, pixels(3))
    names = [f"vision.layers[{i}].attn.{{q,v}}:weight" for i in range(2)]
    assert list(found.shares) == names
    attention, seen = module_at(model, "vision.layers[0].attn.q:weight"), []
    attention.register_forward_hook(lambda *call: seen.append(call[2][0]))
    with torch.no_grad():
        model(pixels(3))
        with mm.disabled(model):
            model(pixels(3))
    assert_close((found.shares[names[0]],), (share(*seen),), 1e-4)
    assert found.sites[names[0]] == (
        "vision.layers[0].attn.q:weight",
        "vision.layers[0].attn.v:weight",
    )


def test_an_input_that_is_changed_is_measured(model: nn.Module) -> None:
    randomise(mm.attach(model, mm.Bottleneck(4, at="vision.layers[0].mlp:in"), name="a"))
    ((name, value),) = contribution(model, pixels(2)).shares.items()
    assert name == "vision.layers[0].mlp:in"
    assert float(value.min()) > 0


def test_patches_are_a_picture_without_the_tokens_before_them(model: nn.Module) -> None:
    randomise(mm.attach(model, mm.Bottleneck(4), name="a"))
    found = contribution(model, pixels(3))
    site = "vision.layers[1].mlp:out"
    grid = found.grid(site)
    assert grid is not None
    rows = int((found.shares[site].shape[1] - 1) ** 0.5)
    assert grid.shape == (3, rows, rows)
    assert torch.equal(grid.flatten(1), found.shares[site][:, 1:])


def test_padding_has_no_share() -> None:
    tiny = BACKBONES["hf_llama"]
    model = tiny.fresh()
    randomise(mm.attach(model, mm.Bottleneck(4), name="a"))
    ids = torch.arange(12).reshape(2, 6) + 1
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, :2] = 0
    found = contribution(model, {"input_ids": ids, "attention_mask": mask})
    for site, value in found.shares.items():
        assert torch.equal(value.isnan(), mask == 0)
        assert found.mean(site) == pytest.approx(float(value[mask == 1].mean()))
        assert found.grid(site) is None


def test_calls_that_follow_each_other_are_put_behind_each_other() -> None:
    model = BACKBONES["hf_llama"].fresh()
    randomise(mm.attach(model, mm.Bottleneck(4), name="a"))
    ids = torch.arange(4)[None] + 1

    def generate() -> None:
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, min_new_tokens=3, do_sample=False, use_cache=True)  # fmt: skip

    (whole,) = {tuple(v.shape) for v in contribution(model, {"input_ids": ids}).shares.values()}
    found = contribution(model, generate)  # the last token is not read any more
    assert {tuple(value.shape) for value in found.shares.values()} == {(1, whole[1] + 2)}


def test_measuring_leaves_no_trace(model: nn.Module) -> None:
    randomise(mm.attach(model, [mm.Bottleneck(4), mm.LoRA(2)], name="a"))
    output = _run(model)  # after the first forward pass its own check has left
    model.train()
    before, tables, draw = flags(model), hook_tables(model), torch.get_rng_state()
    contribution(model, pixels(2))
    assert flags(model) == before
    assert hook_tables(model) == tables
    assert torch.equal(torch.get_rng_state(), draw)
    assert torch.equal(_run(model), output)


def test_a_pass_that_fails_leaves_no_trace(model: nn.Module) -> None:
    randomise(mm.attach(model, mm.LoRA(2), name="a"))
    output, tables = _run(model), hook_tables(model)

    def fails() -> None:
        model(pixels(1))
        raise KeyError("no")

    with pytest.raises(KeyError, match="no"):
        contribution(model, fails)
    assert hook_tables(model) == tables
    assert torch.equal(_run(model), output)


def test_sites_that_rest_are_not_measured_and_what_is_off_is_refused(model: nn.Module) -> None:
    randomise(mm.attach(model, mm.Bottleneck(4), name="a"))
    with mm.disabled(model, at="vision.layers[0].mlp"):
        assert list(contribution(model, pixels(1)).shares) == ["vision.layers[1].mlp:out"]
    with mm.disabled(model), pytest.raises(mm.errors.CheckError, match="no attachment is acting"):
        contribution(model, pixels(1))


def test_sites_that_are_not_reached_are_named() -> None:
    clip = BACKBONES["open_clip"]
    model = clip.fresh()
    randomise(mm.attach(model, mm.Bottleneck(4), name="a"))
    found = contribution(model, (pixels(2),))
    assert [site.partition(".")[0] for site in found.shares] == ["vision", "vision"]
    assert "not reached, or of changed shape: text.layers[0].mlp:out" in str(found)


def test_inspect_tells_the_share_of_every_site(model: nn.Module) -> None:
    randomise(mm.attach(model, [mm.Bottleneck(4), mm.LoRA(2)], name="a"))
    found = contribution(model, pixels(2))
    records = {r["site"]: r["share"] for r in mm.inspect(model, pixels(2)).records()}
    assert records["vision.layers[0].mlp:out"] == pytest.approx(
        found.mean("vision.layers[0].mlp:out")
    )
    q, v = (records[f"vision.layers[1].attn.{word}:weight"] for word in "qv")
    assert q == v == pytest.approx(found.mean("vision.layers[1].attn.{q,v}:weight"))
    assert "share" not in mm.inspect(model).columns


def test_updates_are_the_relative_changes_of_weights(model: nn.Module) -> None:
    attachment: Any = randomise(mm.attach(model, [mm.LoRA(2), mm.Bottleneck(4)], name="a"))
    found = updates(model)
    assert set(found) == {("a", site) for site in attachment.sites if site.endswith(":weight")}
    layer = attachment.layers["0/vision.layers[0].attn.q:weight"]
    whole = module_at(model, "vision.layers[0].attn.q:weight").in_proj_weight.detach()
    change = (layer.scale * layer.b @ layer.a).detach()
    expected = float(change.norm() / whole[: len(whole) // 3].norm())
    assert found["a", "vision.layers[0].attn.q:weight"] == pytest.approx(expected, rel=1e-4)
    mm.detach(model)
    mm.attach(model, mm.LoRA(2), name="b")
    assert all(value == 0 for value in updates(model).values())
