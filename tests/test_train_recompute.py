"""Layers that transformers recomputes in backward: asked for, it happens, and the backbone evaluates."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from snapshot import assert_close, flags
from torch import Tensor, nn

import mmadapt as mm
from mmadapt.errors import MmadaptError
from mmadapt.train.kept import kept_for_backward
from mmadapt.train.recompute import recompute


def vit(**options: Any) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=16,
        patch_size=4,
        num_labels=3,
        **options,
    )
    torch.manual_seed(3)
    return ViTForImageClassification(config).eval()


def adapted(checkpointed: bool, **options: Any) -> tuple[Any, Any]:
    model: Any = vit(**options)
    attachment = mm.attach(model, mm.Bottleneck(4), at="vision.layers[*].mlp", seed=1)
    with torch.no_grad():
        for parameter in attachment.parameters():
            parameter.add_(0.1)
    if checkpointed:
        model.activation_checkpointing_enable()
    return model, attachment


def pixels(rows: int = 3) -> Tensor:
    return torch.randn(rows, 3, 16, 16, generator=torch.Generator().manual_seed(4))


def logits(model: Any) -> Tensor:
    return model(pixels()).logits


def gradients(model: Any, attachment: Any) -> tuple[Tensor, ...]:
    return torch.autograd.grad(logits(model).square().sum(), list(attachment.parameters()))


def test_less_is_kept_and_outputs_and_gradients_are_the_same() -> None:
    plain, checkpointed = adapted(False), adapted(True)
    with mm.train_mode(plain[0]):
        expected = logits(plain[0]), *gradients(*plain)
        much = kept_for_backward(plain[0], lambda: logits(plain[0]))
    with mm.train_mode(checkpointed[0]):
        found = logits(checkpointed[0]), *gradients(*checkpointed)
        little = kept_for_backward(checkpointed[0], lambda: logits(checkpointed[0]))
    assert_close(found, expected, 1e-6)
    assert little < much / 3


def test_the_backbones_dropout_stays_off_in_both_passes() -> None:
    noisy = {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5}
    model, attachment = adapted(True, **noisy)
    quiet = adapted(False)
    with mm.train_mode(model):
        assert_close(gradients(model, attachment), gradients(*quiet), 1e-6)

    class Own(type(model.vit.layers[0])):  # a layer that draws by its own flag
        def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            assert not self.training
            return super().forward(hidden_states, *args, **kwargs)

    for layer in model.vit.layers:
        layer.__class__ = Own
    with mm.train_mode(model):
        assert model.vit.layers[0].training
        gradients(model, attachment)


def test_flags_and_functions_are_as_before_afterwards() -> None:
    model, _ = adapted(True)
    before = flags(model)
    functions = [layer._gradient_checkpointing_func for layer in model.vit.layers]
    with mm.train_mode(model):
        loss = logits(model).sum()
        twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        assert all(
            twin.vit.layers[0]._gradient_checkpointing_func.layer is twin.vit.layers[0]
            for twin in twins
        )
    loss.backward()  # recomputes after the flags were given back
    assert flags(model) == before
    assert [layer._gradient_checkpointing_func for layer in model.vit.layers] == functions


def test_a_trainers_own_train_call_changes_nothing() -> None:
    model, attachment = adapted(True)
    with mm.train_mode(model):
        expected = gradients(model, attachment)
        model.train()
        assert_close(gradients(model, attachment), expected, 1e-6)


def test_a_trainer_may_ask_for_it_inside_the_block() -> None:
    model, attachment = adapted(False)
    with mm.train_mode(model):
        expected = gradients(model, attachment)
        model.activation_checkpointing_enable()
        model.train()
        assert_close(gradients(model, attachment), expected, 1e-6)
        assert all(layer.training for layer in model.vit.layers)
        assert not model.training


def test_a_layer_that_trains_as_a_whole_is_left_to_train() -> None:
    from transformers.modeling_layers import GradientCheckpointingLayer

    class Dropping(GradientCheckpointingLayer):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)
            self.gradient_checkpointing = True
            self._gradient_checkpointing_func = lambda run, *args: run(*args)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.dropout(x, 0.5, self.training)

    model = nn.Sequential(Dropping()).eval()
    recompute(model)
    x = torch.ones(4, 8)
    assert torch.equal(model(x), x)
    model.train()  # whoever has detached and trains all of it
    assert not torch.equal(model(x), x)


def test_what_was_not_asked_for_does_not_happen() -> None:
    model, _ = adapted(False)
    with mm.train_mode(model):
        assert not any(layer.training for layer in model.vit.layers)
    model.activation_checkpointing_enable()
    model.activation_checkpointing_disable()
    with mm.train_mode(model):
        assert not any(layer.training for layer in model.vit.layers)


def test_fit_recomputes_and_learns_the_same() -> None:
    data = (pixels(6), torch.arange(6) % 3)
    losses = []
    for checkpointed in (False, True):
        model, _ = adapted(checkpointed)
        runs: list[Any] = []
        model.vit.layers[1].mlp.register_forward_pre_hook(lambda *seen, to=runs: to.append(seen[0]))
        history = mm.fit(
            model,
            data,
            loss=lambda m, b: nn.functional.cross_entropy(m(b[0]).logits, b[1]),
            steps=3,
            batch_size=6,
            progress=False,
        )
        assert len(runs) == (6 if checkpointed else 3)
        losses.append(history.losses)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_who_runs_out_of_memory_is_told_how_to_ask_for_it() -> None:
    model, _ = adapted(False)

    def greedy(model: Any, batch: Any) -> Tensor:
        raise torch.OutOfMemoryError("no more")

    with pytest.raises(
        MmadaptError, match=r"model\.\w+_checkpointing_enable\(\) trades it for time"
    ):
        mm.fit(model, (pixels(), torch.arange(3)), loss=greedy, steps=1, progress=False)
