"""What all sites of one adapter share: held, moved, copied, trained and saved once."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import BACKBONES, LAYERS, WIDTH
from safetensors.torch import load_file
from snapshot import assert_close, assert_equal, differ, randomise, state
from torch import Tensor, nn

import mmadapt as mm
from mmadapt.errors import AdapterError, AdapterFileError, AttachError

VIT = BACKBONES["hf_vit"]
COMPACTER = mm.Compacter.plus_plus(4, division=2)
GATE = mm.AdapterBias(shared_gate=True)
both = pytest.mark.parametrize("adapter", [COMPACTER, GATE], ids=["compacter", "adapter_bias"])


def attached(adapter: mm.Adapter, name: str = "default") -> tuple[Any, Any]:
    model = VIT.fresh()
    return model, randomise(mm.attach(model, adapter, name))


def outputs(model: Any) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return VIT.outputs(model)


def shared_of(attachment: Any) -> Any:
    found = {id(layer.shared): layer.shared for layer in attachment.layers.values()}
    (shared,) = found.values()
    return shared


@both
def test_one_object_serves_every_site_and_is_counted_once(adapter: mm.Adapter) -> None:
    model, attachment = attached(adapter)
    shared = shared_of(attachment)
    names = [name for name, _ in attachment.named_parameters()]
    assert len(attachment.layers) == LAYERS
    assert [name for name in names if name.startswith("0/shared.")] == [
        f"0/shared.{name}" for name, _ in shared.named_parameters()
    ]
    assert not any(".shared." in key for key in model.state_dict())
    keys = [key for key in model.state_dict() if "/shared." in key]
    assert len(keys) == len(list(shared.parameters()))
    ids = [id(p) for p in attachment.parameters()]
    assert len(ids) == len(set(ids))
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trainable) == attachment.num_parameters
    assert sum(record["parameters"] for record in mm.plan(VIT.fresh(), adapter).records()) == (
        attachment.num_parameters
    )


def test_tables_show_it_in_a_row_of_its_own() -> None:
    model, attachment = attached(COMPACTER)
    assert [record["site"] for record in mm.inspect(model).records()][-1] == "shared"
    (row,) = [r for r in attachment.summary().records() if r["site"] == "shared"]
    assert (row["adapter"], row["tensors"], row["parameters"]) == (
        "Compacter",
        "rule f32[2,2,2]",
        8,
    )
    assert f"{LAYERS} sites" in attachment.summary().title
    table = mm.plan(VIT.fresh(), COMPACTER)
    assert f"{LAYERS} sites" in table.title
    assert table.records()[-1]["site"] == "shared"
    checked = {r["site"]: r["largest gradient"] for r in mm.check(model, VIT.batch(2)).records()}
    assert checked["shared"].startswith("rule ")


@both
def test_every_site_trains_it(adapter: mm.Adapter) -> None:
    """Its gradient is the sum of those that copies, one a site, would get."""
    model, attachment = attached(adapter)
    shared = shared_of(attachment)
    parameters = list(shared.parameters())

    def loss() -> Tensor:
        return sum(output.square().sum() for output in VIT.outputs(model))  # type: ignore[return-value]

    whole = torch.autograd.grad(loss(), parameters)
    twins = []
    for layer in attachment.layers.values():
        twins.append(copy.deepcopy(shared))
        layer.share(twins[-1])
    parts = torch.autograd.grad(loss(), [p for twin in twins for p in twin.parameters()])
    for place, gradient in enumerate(whole):
        summed = sum(parts[place :: len(parameters)])
        assert_close((gradient,), (summed,), 1e-5)  # type: ignore[arg-type]
    assert all(float(part.abs().max()) > 0 for part in parts)


@both
def test_copies_share_among_themselves_and_with_nobody_else(adapter: mm.Adapter) -> None:
    model, attachment = attached(adapter)
    expected = outputs(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        theirs = mm.attachments(twin)["default"]
        shared = shared_of(theirs)
        assert shared is not shared_of(attachment)
        assert id(next(iter(shared.parameters()))) in {id(p) for p in twin.parameters()}
        assert_equal(outputs(twin), expected)
        with torch.no_grad():
            for parameter in shared.parameters():
                parameter.mul_(3)
        assert differ(outputs(twin), expected)
        assert_equal(outputs(model), expected)


@both
def test_it_moves_with_the_model(adapter: mm.Adapter) -> None:
    model, attachment = attached(adapter)
    model.double()
    assert {p.dtype for p in shared_of(attachment).parameters()} == {torch.float64}
    batch = {key: value.double() for key, value in VIT.batch(2).items()}
    assert model(**batch).last_hidden_state.dtype == torch.float64
    meta = copy.deepcopy(model).to("meta")
    shared = shared_of(mm.attachments(meta)["default"])
    assert {p.device.type for p in shared.parameters()} == {"meta"}


@both
def test_an_optimiser_sees_it_once(adapter: mm.Adapter) -> None:
    model, attachment = attached(adapter)
    shared = shared_of(attachment)
    before = [p.detach().clone() for p in shared.parameters()]
    optimiser = torch.optim.SGD(attachment.parameters(), lr=0.5)
    sum(output.square().sum() for output in VIT.outputs(model)).backward()  # type: ignore[union-attr]
    gradients = [p.grad.clone() for p in shared.parameters()]
    optimiser.step()
    for parameter, old, gradient in zip(shared.parameters(), before, gradients, strict=True):
        assert torch.equal(parameter, old - 0.5 * gradient)


@both
def test_files_hold_it_once_and_come_back(adapter: mm.Adapter, tmp_path: Path) -> None:
    model, attachment = attached(adapter)
    attachment.save(tmp_path / "one")
    tensors = load_file(tmp_path / "one" / "adapter.safetensors")
    assert [k for k in tensors if k.startswith("0/shared/")] == sorted(
        f"0/shared/{name}" for name, _ in shared_of(attachment).named_parameters()
    )
    assert sum(t.numel() for t in tensors.values()) == attachment.num_parameters
    fresh = VIT.fresh()
    loaded = mm.load_adapter(fresh, tmp_path / "one")
    assert_equal(outputs(fresh), outputs(model))
    assert shared_of(loaded) is not shared_of(attachment)
    loaded.save(tmp_path / "two")
    for name in ("adapter.json", "adapter.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_file_without_it_is_refused(tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    attached(COMPACTER)[1].save(tmp_path)
    path = tmp_path / "adapter.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    del tensors["0/shared/rule"]
    save_file(tensors, path, metadata=metadata)
    model = VIT.fresh()
    before = state(model)
    with pytest.raises(AdapterFileError, match="1 missing: 0/shared/rule"):
        mm.load_adapter(model, tmp_path)
    assert state(model) == before


def test_attachments_do_not_share_with_each_other_and_leave_completely() -> None:
    model, first = attached(COMPACTER, "first")
    alone = outputs(model)
    second = randomise(mm.attach(model, COMPACTER, "second"), seed=9)
    assert shared_of(first) is not shared_of(second)
    assert not shared_of(first).rule.requires_grad
    assert shared_of(second).rule.requires_grad
    mm.set_active(model, "first")
    assert_equal(outputs(model), alone)
    mm.attach(model, COMPACTER, "second", replace=True)
    mm.detach(model)
    assert not any("shared" in key for key in model.state_dict())
    assert "_mmadapt" not in dict(model.named_children())


def test_two_adapters_of_one_attachment_have_one_each() -> None:
    model = VIT.fresh()
    several = [COMPACTER, mm.Bottleneck(2), mm.Compacter(4, division=4, at="vision.layers[*].attn")]
    attachment = mm.attach(model, several)
    names = [name for name, _ in attachment.named_parameters() if "shared" in name]
    assert names == ["0/shared.rule", "2/shared.rule"]
    assert len({id(layer.shared) for layer in attachment.layers.values() if layer.shared}) == 2


def test_rows_of_a_batch_cannot_choose_among_them() -> None:
    model, _ = attached(COMPACTER, "a")
    mm.attach(model, COMPACTER, "b")
    with (
        pytest.raises(AttachError, match="CompacterLayer at .* cannot be chosen by row"),
        mm.context(model, rows=["a", "b"]),
    ):
        pass


def test_a_shared_gate_needs_one_width() -> None:
    clip = BACKBONES["open_clip"].fresh()
    visual: Any = clip.visual
    visual.transformer.resblocks[1].mlp.c_proj = nn.Linear(2 * WIDTH, WIDTH)
    with pytest.raises(AdapterError, match="cannot share one gate") as caught:
        mm.attach(clip, GATE, at="vision.layers[*].mlp.down")
    assert "has 64 inputs and vision.layers[1].mlp.down:out has 32" in str(caught.value)
    assert mm.attachments(clip) == {}


def test_one_gate_for_all_layers_is_its_formula() -> None:
    model, attachment = attached(GATE)
    gate = shared_of(attachment)
    for i, own in enumerate(model.layers):
        layer: Any = attachment.layers[f"0/vision.layers[{i}].mlp.down:out"]
        z = torch.randn(2, 5, 4 * WIDTH)
        with torch.no_grad():
            amount = (z * gate.gate).sum(-1, keepdim=True) + gate.gate_bias
            expected = z @ own.mlp.fc2.weight.T + own.mlp.fc2.bias + amount * layer.direction
            assert_close((own.mlp.fc2(z),), (expected,), 2e-6)


def test_a_shared_tensor_behind_a_kept_weight_is_seen_to_change() -> None:
    """The weight port keeps effective weights between calls; shared tensors are among their causes."""
    model = VIT.fresh()
    attachment = mm.attach(model, mm.LoRA(2, at="vision.layers[0].mlp.up:weight"))
    layer: Any
    (layer,) = attachment.layers.values()
    shared = copy.deepcopy(layer)
    layer.share(shared)
    assert {id(p) for p in layer.read_parameters()} == {
        id(p) for p in (*layer.parameters(), *shared.parameters())
    }
    kept = model._mmadapt.installed.groups.popitem()[1]
    kept.original = layer.a
    plans = [(site, site.plan) for site in kept.sites]
    before = kept._key(plans)
    with torch.no_grad():
        shared.a.add_(1)
    assert kept._key(plans) != before
