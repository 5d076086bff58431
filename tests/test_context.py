"""What travels with a forward pass: facts about its inputs, and what backward repeats it with."""

from __future__ import annotations

import copy
import pickle
import threading
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from backbones import BACKBONES
from handmade import CHANNELS, hidden, small
from snapshot import randomise
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mmadapt as mm
from mmadapt.core.bank import bank_of
from mmadapt.core.layer import Layer, empty
from mmadapt.errors import AttachError, CheckError

TINY = BACKBONES["hf_bert"]


@dataclass(frozen=True)
class Average(mm.Adapter):
    """y + s · the mean of y over the tokens that are no padding: it has to know them."""

    method: ClassVar[str] = "test_average"
    layer: ClassVar[str] = "test_context:AverageLayer"
    default_sites: ClassVar[tuple[str, ...]] = ("*.layers[*]", "layers[*]")


class AverageLayer(Layer):
    facts: ClassVar[tuple[str, ...]] = ("mask",)

    def __init__(self, adapter: Average, site: Any, generator: Any) -> None:
        super().__init__()
        self.gain = empty(site, site.width)
        nn.init.constant_(self.gain, 0.5)

    def after(self, acc: Tensor, y: Tensor, x: Tensor, context: Any, site: Any) -> Tensor:
        mask = context.get("mask")
        weights = torch.ones_like(y[..., :1]) if mask is None else mask[..., None].to(y.dtype)
        mean = (y * weights).sum(1, keepdim=True) / weights.sum(1, keepdim=True)
        return acc + self.gain * mean


def texts() -> dict[str, Tensor]:
    """Two texts of 6 and 3 tokens, padded to 6."""
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(5, 20, (2, 6), generator=draw)
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, 3:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def adapted() -> nn.Module:
    model = TINY.fresh()
    mm.attach(model, Average())
    return model


def states(model: Any, **inputs: Tensor) -> Tensor:
    return model(**inputs).last_hidden_state


def test_padding_reaches_no_layer_that_asks_for_the_mask() -> None:
    model, batch = adapted(), texts()
    with torch.no_grad():
        padded = states(model, **batch)
        alone = states(model, input_ids=batch["input_ids"][1:, :3])
        blind = states(model, input_ids=batch["input_ids"])
    assert torch.allclose(padded[1, :3], alone[0], atol=1e-5)
    assert not torch.allclose(blind[1, :3], alone[0], atol=1e-2)


def test_a_mask_lives_as_long_as_its_forward_pass() -> None:
    model, batch = adapted(), texts()
    with torch.no_grad():
        blind = states(model, input_ids=batch["input_ids"])
        states(model, **batch)
        assert torch.equal(states(model, input_ids=batch["input_ids"]), blind)
        batch["input_ids"][0, 0] = 10**6  # out of the vocabulary: the pass breaks off
        with pytest.raises(IndexError):
            states(model, **batch)
        batch["input_ids"][0, 0] = 7
        again = states(model, input_ids=batch["input_ids"])
    assert torch.equal(again[1], blind[1])
    assert bank_of(model).forwards.context.get("mask") is None  # type: ignore[union-attr]


def test_a_fact_that_is_given_wins_over_the_inputs() -> None:
    model, batch = adapted(), texts()
    mask = batch["attention_mask"].bool()
    with torch.no_grad():
        expected = states(model, **batch)
        with mm.context(model, mask=mask):
            given = states(model, **{**batch, "attention_mask": torch.ones_like(mask).long()})
    assert not torch.allclose(given, expected)  # the backbone's own attention saw all tokens
    backbone = small()
    mm.attach(backbone, Average())
    with torch.no_grad():
        whole = backbone(hidden())
        with mm.context(backbone, mask=torch.tensor([[True] * 5, [True] * 3 + [False] * 2])):
            part = backbone(hidden())
        assert torch.equal(backbone(hidden()), whole)
    assert torch.allclose(part[0], whole[0], atol=1e-6)
    assert not torch.allclose(part[1], whole[1], atol=1e-3)


def test_a_fact_nobody_asks_for_is_refused() -> None:
    model = adapted()
    with (
        pytest.raises(AttachError, match=r"(?s)asks for the fact 'masc'.*'mask'"),
        mm.context(model, masc=None),
    ):
        pass
    bare = TINY.fresh()
    mm.attach(bare, mm.Bottleneck(2))
    with (
        pytest.raises(AttachError, match="attached layers ask for none"),
        mm.context(bare, mask=None),
    ):
        pass


@pytest.mark.parametrize("whole", [True, False], ids=["whole model", "block by block"])
def test_backward_recomputes_with_the_facts_of_its_own_forward(whole: bool) -> None:
    model, batch = adapted(), texts()
    if not whole:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    gains = list(mm.attachments(model)["default"].parameters())

    def run(ids: Tensor, mask: Tensor | None) -> Tensor:
        return states(model, input_ids=ids, attention_mask=mask)

    def total(mask: Tensor | None, checkpointed: bool) -> Tensor:
        ids = batch["input_ids"]
        if checkpointed and whole:
            return checkpoint(run, ids, mask, use_reentrant=False).square().sum()
        return run(ids, mask).square().sum()

    masks = (batch["attention_mask"], None)
    expected = [torch.autograd.grad(total(mask, False), gains) for mask in masks]
    both = torch.autograd.grad(total(masks[0], True) + total(masks[1], True), gains)
    for one, first, second in zip(both, *expected, strict=True):
        assert torch.allclose(one, first + second, rtol=1e-4)


def test_rows_chosen_and_left_before_backward_are_recomputed_as_they_were() -> None:
    model = BACKBONES["hf_vit"].fresh()
    for seed, name in enumerate("ab"):
        randomise(mm.attach(model, mm.Bottleneck(3), name=name), seed=seed)
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    tensors = [p for one in mm.attachments(model).values() for p in one.parameters()]

    def run(pixels: Tensor) -> Tensor:
        return model(pixels).last_hidden_state

    def gradients(checkpointed: bool) -> list[Tensor]:
        with mm.context(model, rows=["a", "b"]):
            out = checkpoint(run, images, use_reentrant=False) if checkpointed else run(images)
        mm.set_active(model)
        out.square().sum().backward()
        found = [t.grad for t in tensors]
        for tensor in tensors:
            tensor.grad = None
        return found  # type: ignore[return-value]

    plain, recomputed = gradients(False), gradients(True)
    assert all(bool(gradient.any()) for gradient in plain)
    for one, other in zip(plain, recomputed, strict=True):
        assert torch.equal(one, other)


def test_what_cannot_be_recomputed_as_it_was_is_refused() -> None:
    backbone = small()
    mm.attach(backbone, mm.Bottleneck(2), at="layers[*].mlp", name="a")
    mm.attach(backbone, mm.Bottleneck(2), at="layers[*].mlp", name="b")
    x = hidden().requires_grad_(True)
    reentrant: Any = checkpoint(backbone.model, x, use_reentrant=True)
    with pytest.raises(CheckError, match="reentrant checkpointing"):
        reentrant.sum().backward()

    def switching(value: Tensor) -> Tensor:
        mm.set_active(backbone, "a")
        value = backbone.model(value).sum() + value
        mm.set_active(backbone, "b")
        return backbone.model(value)

    switched: Any = checkpoint(switching, x, use_reentrant=False)
    with pytest.raises(CheckError, match="switched within a checkpointed region"):
        switched.sum().backward()


def test_a_checkpoint_within_a_checkpoint_is_recomputed_as_it_was() -> None:
    backbone = small()
    first = randomise(mm.attach(backbone, mm.Bottleneck(2), at="layers[*].mlp", name="a"))
    mm.attach(backbone, mm.Bottleneck(2), at="layers[*].mlp", name="b")

    def nested(value: Tensor) -> Any:
        return checkpoint(backbone.model, value, use_reentrant=False)

    def gradients(run: Any) -> list[Tensor]:
        mm.set_active(backbone, "a")
        out = run(hidden())
        mm.set_active(backbone, "b")
        out.square().sum().backward()
        found = [p.grad for p in first.parameters()]
        for parameter in first.parameters():
            parameter.grad = None
        return found  # type: ignore[return-value]

    expected = gradients(backbone.model)
    found = gradients(lambda value: checkpoint(nested, value, use_reentrant=False))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_a_gradient_that_comes_after_the_switch_is_not_lost() -> None:
    backbone = small()
    first = randomise(mm.attach(backbone, mm.Bottleneck(2), at="layers[*].mlp", name="a"))
    second = randomise(mm.attach(backbone, mm.Bottleneck(2), at="layers[*].mlp", name="b"))
    mm.set_active(backbone, "a")
    a = backbone(hidden()).square().sum()
    mm.set_active(backbone, "b")
    b = backbone(hidden()).square().sum()
    assert not any(p.requires_grad for p in first.parameters())
    (a + b).backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in first.parameters())
    mm.set_active(backbone, "a")  # and once more, now with gradients there
    before = [p.grad.clone() for p in first.parameters()]  # type: ignore[union-attr]
    again = backbone(hidden()).square().sum()
    mm.set_active(backbone, "b")
    again.backward()
    for parameter, gradient in zip(first.parameters(), before, strict=True):
        assert torch.allclose(parameter.grad, 2 * gradient, rtol=1e-4)  # type: ignore[arg-type]
    assert all(p.grad is not None for p in second.parameters())
    copy.deepcopy(backbone.model)
    pickle.loads(pickle.dumps(backbone.model))


def test_a_second_thread_is_refused_while_a_forward_is_under_way() -> None:
    backbone = small()
    mm.attach(backbone, mm.Bottleneck(2), at="layers[*].mlp")
    inside, leave = threading.Event(), threading.Event()

    def wait(*_: Any) -> None:
        inside.set()
        leave.wait(10)

    handle = backbone.model.blocks[1].register_forward_hook(wait)  # type: ignore[index]
    first = threading.Thread(target=backbone.model, args=(hidden(),))
    first.start()
    assert inside.wait(10)
    handle.remove()
    with pytest.raises(CheckError, match="in another thread while one is under way"):
        backbone(hidden())
    leave.set()
    first.join()
    backbone(hidden())  # and it serves again


# -- around ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Twice(mm.Adapter):
    """Calls the module again on what it returned: y + s · f(y). No hook could."""

    method: ClassVar[str] = "test_twice"
    layer: ClassVar[str] = "test_context:TwiceLayer"
    ports: ClassVar[tuple[str, ...]] = ("around",)


class TwiceLayer(Layer):
    def __init__(self, adapter: Twice, site: Any, generator: Any) -> None:
        super().__init__()
        self.gain = empty(site, 1)
        nn.init.zeros_(self.gain)

    def around(
        self, call: Any, args: tuple, kwargs: dict[str, Any], context: Any, site: Any
    ) -> Tensor:
        y = call(*args, **kwargs)
        return y + self.gain * call(y)


def test_around_stands_in_for_a_call_and_leaves_no_trace(tmp_path: Any) -> None:
    backbone = small()
    backbone.model.requires_grad_(False)
    bare = backbone(hidden())
    attachment = mm.attach(backbone, Twice(), at="layers[*].mlp")
    assert attachment.sites[0] == "layers[0].mlp:around"
    assert torch.equal(backbone(hidden()).detach(), bare)
    with torch.no_grad():
        next(iter(attachment.parameters())).fill_(0.5)

    def straight(x: Tensor) -> Tensor:
        for place, block in enumerate(backbone.model.blocks):  # type: ignore[arg-type]
            linear, z = block.linear, block.norm(x)
            y = torch.nn.functional.linear(z, linear.weight, linear.bias)
            if place == 0:
                y = y + 0.5 * torch.nn.functional.linear(y, linear.weight, linear.bias)
            x = x + y
        return backbone.model.head(x)  # type: ignore[operator]

    expected = straight(hidden())
    assert torch.allclose(backbone(hidden()), expected, atol=1e-6)
    for same in (copy.deepcopy(backbone.model), pickle.loads(pickle.dumps(backbone.model))):
        assert torch.equal(same(hidden()), backbone(hidden()))
        with torch.no_grad():
            bank_of(same).layers.default._modules["0/layers[0]|mlp:around"].gain.zero_()  # type: ignore
        assert torch.equal(same(hidden()).detach(), bare)
    compiled: Any = torch.compile(backbone.model, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(hidden()), expected, atol=1e-6)
    recomputed: Any = checkpoint(backbone.model, hidden(), use_reentrant=False)
    recomputed.sum().backward()
    with mm.disabled(backbone):
        assert torch.equal(backbone(hidden()).detach(), bare)
    mm.detach(backbone)
    assert "forward" not in backbone.model.blocks[0].linear.__dict__  # type: ignore[index]
    assert torch.equal(backbone(hidden()), bare)


def test_compiled_code_sees_the_mask() -> None:
    model, batch = adapted(), texts()
    with torch.no_grad():
        compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
        for inputs in (batch, {"input_ids": batch["input_ids"]}, batch):
            found = compiled(**inputs).last_hidden_state
            assert torch.allclose(found, states(model, **inputs), atol=1e-5)


def test_an_input_that_is_not_where_the_anatomy_says_is_named() -> None:
    span = mm.Span("blocks.{i}.linear", x="1|hidden", channels="blocks.{i}.norm.weight")
    anatomy = mm.Anatomy(family="small", spans={"layers[i].mlp": span})
    backbone = mm.Backbone(small().model, anatomy=anatomy)
    mm.attach(backbone, mm.Bottleneck(2), at="layers[*].mlp")
    with pytest.raises(CheckError, match=r"1 positional arguments.*argument 1 or the keyword 'hid"):
        backbone(torch.zeros(1, 2, CHANNELS))
