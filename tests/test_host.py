"""Backbones to which something has been done before: quantised, offloaded, with running statistics."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchvision
from backbones import BACKBONES
from snapshot import assert_same_values, flags, randomise, values
from torch import nn

import mmadapt as mm
from mmadapt.errors import AttachError, CheckError, MergeError

TINY = BACKBONES["hf_vit"]


def output(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return TINY.outputs(model)[0]


# -- quantised ------------------------------------------------------------------------------------


def quantised() -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization")
    model = TINY.fresh()
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


@pytest.mark.parametrize("adapter", [mm.LoRA(2), mm.Bottleneck(2), mm.ScaleShift()], ids=repr)
def test_calls_of_quantised_linears_are_met_and_train(adapter: mm.Adapter) -> None:
    model = quantised()
    bare = output(model)
    attachment = mm.attach(model, adapter)
    assert torch.equal(output(model), bare)
    assert {p.dtype for p in attachment.parameters()} == {torch.float32}
    randomise(attachment)
    assert not torch.allclose(output(model), bare, atol=1e-3)
    TINY.outputs(model)[0].sum().backward()
    assert all(p.grad is not None for p in attachment.parameters())
    mm.check(model, TINY.batch(2))
    mm.detach(model)
    assert torch.equal(output(model), bare)


def test_quantised_weights_are_neither_replaced_nor_merged_into() -> None:
    model = quantised()
    before = flags(model)
    for adapter in (mm.LoRA(2), mm.Unlock()):
        with pytest.raises(AttachError, match=r"(?s)quantised \(.*use the `out` port: at='vision"):
            mm.attach(model, adapter, at="*.layers[*].mlp.up:weight")
    assert mm.attachments(model) == {}
    assert flags(model) == before
    randomise(mm.attach(model, mm.LoRA(2)))
    adapted = output(model)
    with pytest.raises(MergeError, match="cannot be merged into its weight: it is quantised"):
        mm.merge(model)
    assert torch.equal(output(model), adapted)


# -- offloaded and dispatched ---------------------------------------------------------------------


@pytest.mark.parametrize("adapter", [mm.LoRA(2), mm.Bottleneck(2, placement="parallel")], ids=repr)
def test_offloaded_weights_leave_layers_where_the_site_computes(adapter: mm.Adapter) -> None:
    accelerate = pytest.importorskip("accelerate")
    plain, model = TINY.fresh(), TINY.fresh()
    accelerate.cpu_offload(model, execution_device="cpu")
    assert next(model.parameters()).device.type == "meta"
    for each in (plain, model):
        randomise(mm.attach(each, adapter))
    assert {p.device.type for p in mm.attachments(model)["default"].parameters()} == {"cpu"}
    assert torch.allclose(output(model), output(plain), atol=1e-6)
    with pytest.raises(AttachError, match="offloaded or were never loaded"):
        mm.attach(model, mm.Unlock(), at="*.layers[*].mlp.up:weight", name="second")
    with pytest.raises(MergeError if isinstance(adapter, mm.LoRA) else mm.errors.MmadaptError):
        mm.merge(model)
    mm.detach(model)
    assert torch.allclose(output(model), output(TINY.fresh()), atol=1e-6)


def test_a_model_over_a_device_map_is_adapted_as_one_in_one_place() -> None:
    accelerate = pytest.importorskip("accelerate")
    plain = TINY.fresh()
    model = accelerate.dispatch_model(TINY.fresh(), {"": "cpu"}, force_hooks=True)
    for each in (plain, model):
        randomise(mm.attach(each, [mm.Bottleneck(2, placement="parallel"), mm.LoRA(2)]))
    assert torch.equal(output(model), output(plain))
    mm.detach(model)
    assert "forward" in model.layers[0].mlp.__dict__  # accelerate's own wrapper stays


def test_a_model_that_was_never_loaded_is_refused() -> None:
    model = TINY.fresh().to("meta")
    with pytest.raises(AttachError, match=r"(?s)meta device.*load the model's weights first"):
        mm.attach(model, mm.Bottleneck(2))
    assert mm.attachments(model) == {}


# -- batch norms ----------------------------------------------------------------------------------


def test_a_frozen_batch_norm_in_train_mode_stops_the_pass_and_keeps_its_statistics() -> None:
    model = torchvision.models.resnet18(num_classes=4).eval()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    before = values(model)
    mm.attach(model, mm.Bottleneck(2), at="blocks[*]")
    model.train()
    with pytest.raises(CheckError, match=r"(?s)batch norms of the frozen backbone.*train_mode"):
        model(images)
    assert_same_values(before, values(model))
    with mm.train_mode(model):
        model.train()  # as transformers' Trainer does before each step
        model(images).sum().backward()
    model.eval()
    model(images)
    assert_same_values(before, values(model))
    mm.detach(model)
    model.train()
    model(images)  # a plain model again, whose statistics are its own business
    assert not torch.equal(values(model)["bn1.running_mean"], before["bn1.running_mean"])
