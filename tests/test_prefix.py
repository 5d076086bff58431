"""Layers below the first adapted one, computed once for every row."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import BACKBONES, Tiny
from snapshot import randomise, state
from torch import Tensor, nn

import mmadapt as mm
from mmadapt.errors import AttachError, CheckError, DataError
from mmadapt.train.rows import RowStore, fingerprints, parse_bytes

TOP = {
    "open_clip": ["vision.layers[-1].mlp", "text.layers[-1].mlp"],
    "hf_vit": ["vision.layers[-1].mlp"],
    "hf_clip": ["vision.layers[-1].attn.q", "text.layers[-1].mlp"],
    "hf_bert": ["text.layers[-1].mlp"],
    "hf_dinov2_registers": ["vision.layers[-1]"],
    "timm_vit": ["vision.layers[-1].attn.q", "vision.layers[-1].attn.v"],
    "timm_swin": ["blocks[-1].mlp"],
    "own_transformer": ["blocks[-1]"],
}


def adapted(tiny: Tiny, at: Any = None) -> nn.Module:
    model = tiny.fresh()
    adapter: Any = mm.LoRA(2) if ".attn." in TOP[tiny.name][0] else mm.Bottleneck(2)
    at = [p for p in TOP[tiny.name] if ".attn." in p or isinstance(adapter, mm.Bottleneck)]
    randomise(mm.attach(model, adapter, at=at))
    return model


def batches(tiny: Tiny, count: int = 3) -> list[dict[str, Tensor]]:
    """Different rows in every batch, then the same rows in another order."""
    found = []
    whole = tiny.batch(2 * count)
    for i in range(count):
        found.append({key: value[2 * i : 2 * i + 2].clone() for key, value in whole.items()})
    order = torch.randperm(2 * count, generator=torch.Generator().manual_seed(1))
    shuffled = {key: value[order] for key, value in whole.items()}
    return [*found, {key: value[:3] for key, value in shuffled.items()}]


def calls_of_the_first_block(model: nn.Module) -> tuple[list[int], Any]:
    """Counts how often the arithmetic of the first block really runs."""
    from mmadapt.core.bank import bank_of

    bank: Any = bank_of(model)
    first = next(
        s for r, s in bank.anatomy.roles(model).items() if r.endswith(("layers[0]", "blocks[0]"))
    )
    inner = next(
        m for m in model.get_submodule(first.module).modules() if isinstance(m, nn.LayerNorm)
    )
    counted: list[int] = []
    return counted, inner.register_forward_hook(lambda *_: counted.append(1))


@pytest.mark.parametrize("name", TOP)
def test_outputs_and_gradients_are_those_without_it_and_lower_layers_rest(name: str) -> None:
    tiny = BACKBONES[name]
    model = adapted(tiny)
    attachment = mm.attachments(model)["default"]
    rows = batches(tiny)
    expected = [tiny.outputs(model, batch) for batch in rows]
    before = state(model)
    wanted = [
        torch.autograd.grad(sum(o.square().sum() for o in outputs), list(attachment.parameters()))
        for outputs in expected
    ]
    counted, handle = calls_of_the_first_block(model)
    with mm.cached_prefix(model) as cache:
        for _ in range(2):
            for batch, outputs, gradients in zip(rows, expected, wanted, strict=True):
                found = tiny.outputs(model, batch)
                for one, other in zip(found, outputs, strict=True):
                    assert torch.allclose(one, other, atol=1e-5)
                total = sum(o.square().sum() for o in found)
                for one, other in zip(
                    torch.autograd.grad(total, list(attachment.parameters())),
                    gradients,
                    strict=True,
                ):
                    assert torch.allclose(one, other, rtol=1e-3, atol=1e-4)
        ran = len(counted)
        for batch in rows:
            tiny.outputs(model, batch)
        assert len(counted) == ran
        assert cache.bytes > 0
        assert "layers passed over" in repr(cache)
    handle.remove()
    assert state(model) == before


def test_fit_learns_the_same_with_it() -> None:
    tiny = BACKBONES["hf_vit"]
    images = tiny.batch(12)["pixel_values"]
    goal = torch.randn(12, 16, generator=torch.Generator().manual_seed(4))

    def loss(model: Any, batch: Any) -> Tensor:
        pixels, target = batch
        return (model(pixels).pooler_output - target).square().mean()

    def train(cached: bool) -> list[float]:
        model = tiny.fresh()
        mm.attach(model, mm.Bottleneck(4, dropout=0.1), at="vision.layers[-1].mlp", seed=1)
        torch.manual_seed(0)
        if not cached:
            return mm.fit(
                model, (images, goal), loss=loss, steps=40, lr=1e-2, batch_size=4, progress=False
            ).losses
        with mm.cached_prefix(model):
            return mm.fit(
                model, (images, goal), loss=loss, steps=40, lr=1e-2, batch_size=4, progress=False
            ).losses

    plain, cached = train(False), train(True)
    assert plain == pytest.approx(cached, rel=1e-5)
    assert sum(plain[-5:]) < sum(plain[:5])


def test_rows_on_disk_serve_a_later_run_of_the_same_weights_only(tmp_path: Path) -> None:
    tiny = BACKBONES["hf_vit"]
    rows = batches(tiny)
    model = adapted(tiny)
    with mm.cached_prefix(model, folder=tmp_path) as cache:
        for batch in rows:
            tiny.outputs(model, batch)
        assert cache.towers[0].computed == 6
    other = tiny.fresh()
    mm.attach(other, mm.Bottleneck(2), at="vision.layers[-1].mlp")
    expected = tiny.outputs(other, rows[1])
    with mm.cached_prefix(other, folder=tmp_path) as cache:
        tiny.outputs(other, rows[0])  # once: shapes between the layers are not on disk
        found = tiny.outputs(other, rows[1])
        assert (cache.towers[0].computed, cache.towers[0].found) == (2, 2)
    assert torch.allclose(found[0], expected[0], atol=1e-6)
    with torch.no_grad():
        other.layers[0].mlp.fc1.weight.add_(0.1)  # type: ignore[union-attr,index]
    with mm.cached_prefix(other, folder=tmp_path) as cache:
        tiny.outputs(other, rows[0])
        tiny.outputs(other, rows[1])
        assert cache.towers[0].found == 0


def test_a_budget_is_kept_and_said_once() -> None:
    tiny = BACKBONES["hf_vit"]
    model, rows = adapted(tiny), batches(tiny)
    expected = [tiny.outputs(model, batch)[0] for batch in rows]
    row = 5 * 16 * 4  # tokens, channels, bytes
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with mm.cached_prefix(model, budget=3 * row) as cache:
            for _ in range(2):
                for batch, output in zip(rows, expected, strict=True):
                    assert torch.allclose(tiny.outputs(model, batch)[0], output, atol=1e-5)
            assert cache.bytes <= 3 * row
    assert len([w for w in said if "is full at" in str(w.message)]) == 1


def test_what_would_be_wrong_is_refused() -> None:
    tiny = BACKBONES["hf_vit"]
    model, rows = adapted(tiny), batches(tiny)
    mm.attach(model, mm.Bottleneck(2), name="low", at="vision.layers[0].mlp")
    with pytest.raises(AttachError, match="no frozen prefix to keep"), mm.cached_prefix(model):
        pass
    mm.set_active(model, "default")
    with mm.cached_prefix(model):
        tiny.outputs(model, rows[0])
        mm.set_active(model, "low")
        with pytest.raises(CheckError, match="became active in layer 0"):
            tiny.outputs(model, rows[0])
        mm.set_active(model, "default")
        weight: Any = model.layers[0].mlp.fc1.weight  # type: ignore[union-attr,index]
        with torch.no_grad():
            weight.add_(1.0)
        with pytest.raises(CheckError, match="in the cached layers changed"):
            tiny.outputs(model, rows[0])
    weight.requires_grad_(True)
    with pytest.raises(AttachError, match=r"fc1\.weight trains"), mm.cached_prefix(model):
        pass
    weight.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1
    model.train()
    with (
        mm.cached_prefix(model),
        pytest.raises(CheckError, match="Dropout .* is in train mode"),
    ):
        tiny.outputs(model, rows[0])
    model.eval()
    assert "forward" not in model.layers[0].__dict__  # type: ignore[index]


class Unet(nn.Module):
    """Later blocks use what earlier ones gave, past the layers between."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        first = self.blocks[0](x)
        second = self.blocks[1](first)
        return self.blocks[3](self.blocks[2](second) + first)


def test_a_model_that_uses_more_than_the_last_layer_is_refused() -> None:
    net = Unet().eval()
    model = mm.Backbone(net, anatomy=mm.Anatomy.from_paths(net, {"blocks[i]": "blocks.{i}"}))
    mm.attach(model, mm.Bottleneck(2), at="blocks[2:]")
    x = torch.randn(3, 5, 4)
    with (
        mm.cached_prefix(model),
        pytest.raises(CheckError, match="use more of the first 2 than what the last"),
    ):
        model(x)


def test_hidden_states_that_are_asked_for_are_computed() -> None:
    tiny = BACKBONES["hf_vit"]
    model = adapted(tiny)
    images = tiny.batch(2)["pixel_values"]
    with torch.no_grad():
        expected = model(images, output_hidden_states=True).hidden_states
        with mm.cached_prefix(model):
            model(images)
            model(images)
            found = model(images, output_hidden_states=True).hidden_states
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_a_compiled_model_computes_everything_and_is_right() -> None:
    tiny = BACKBONES["hf_vit"]
    model = adapted(tiny)
    images = tiny.batch(2)["pixel_values"]
    with torch.no_grad():
        expected = model(images).last_hidden_state
        with mm.cached_prefix(model):
            compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
            for _ in range(2):
                assert torch.allclose(compiled(images).last_hidden_state, expected, atol=1e-5)


def test_a_tower_in_which_nothing_acts_is_kept_as_its_output() -> None:
    tiny = BACKBONES["hf_sam"]
    model: Any = tiny.fresh()
    randomise(mm.attach(model, mm.Bottleneck(2), name="neck", at="vision.neck.conv1"))
    randomise(mm.attach(model, mm.Bottleneck(2), name="decoder", at="decoder.layers[*].mlp"))
    necks: list[int] = []
    model.vision_encoder.neck.conv1.register_forward_hook(lambda *_: necks.append(1))
    batch = tiny.batch(2)
    expected = {}
    for name in ("neck", "decoder"):
        mm.set_active(model, name)
        expected[name] = tiny.outputs(model, batch)
    with torch.no_grad(), mm.cached_prefix(model) as cache:
        necks.clear()
        for name, text in (
            ("decoder", "the whole tower passed over, 2 rows found, 2 computed"),
            ("neck", "2 of 2 layers passed over, 4 rows found, 4 computed"),
        ):
            mm.set_active(model, name)
            for _ in range(2):
                for one, other in zip(tiny.outputs(model, batch), expected[name], strict=True):
                    assert torch.allclose(one, other, atol=1e-5), name
            assert text in repr(cache)
        assert len(necks) == 1 + (1 + 2 + 1)  # the neck's adapter: once more to verify, both ways
        weight = model.vision_encoder.neck.conv2.weight
        mm.set_active(model, "decoder")
    with torch.no_grad(), mm.cached_prefix(model):
        tiny.outputs(model, batch)
        weight.add_(1.0)
        with pytest.raises(CheckError, match="in the cached layers changed"):
            tiny.outputs(model, batch)


# -- the pieces -----------------------------------------------------------------------------------


def test_fingerprints_tell_rows_apart_by_every_bit_of_every_input() -> None:
    draw = torch.Generator().manual_seed(0)
    pixels, mask = torch.randn(4, 3, 8, 8, generator=draw), torch.ones(4, 6, dtype=torch.bool)
    position = torch.arange(6)

    def keys(pixels: Tensor = pixels, mask: Tensor = mask, position: Tensor = position) -> Any:
        return fingerprints((pixels,), {"mask": mask, "more": (position, 2)})

    base, common = keys()
    assert len(set(base)) == 4
    changed = pixels.clone()
    changed[2, 0, 3, 3] = torch.nextafter(changed[2, 0, 3, 3], torch.tensor(9.0))
    assert [a == b for a, b in zip(keys(changed)[0], base, strict=True)] == [
        True,
        True,
        False,
        True,
    ]
    masked = mask.clone()
    masked[1, 5] = False
    assert [a == b for a, b in zip(keys(mask=masked)[0], base, strict=True)] == [
        True,
        False,
        True,
        True,
    ]
    assert not set(keys(position=position + 1)[0]) & set(base)
    assert keys(pixels.flip(0))[0] == base[::-1]
    assert fingerprints((pixels,), {"other": 3})[1] != common  # type: ignore[index]
    assert fingerprints((pixels.requires_grad_(True),), {}) is None
    assert fingerprints((), {"name": "x"}) is None


def test_a_store_survives_being_cut_short_and_is_left_to_who_has_it(tmp_path: Path) -> None:
    rows = torch.arange(12.0).view(4, 3)
    keys = [bytes([i]) * 16 for i in range(4)]
    first = RowStore(rows, 1000, tmp_path)
    assert first.add(keys[:3], rows[:3], 1000)
    second = RowStore(rows, 1000, tmp_path)  # the first still has it
    assert len(second) == 0
    assert second.add(keys, rows, 1000)
    first.close()
    with open(tmp_path / "keys", "ab") as file:
        file.write(b"half")  # a write that was cut short
    again = RowStore(rows, 1000, tmp_path)
    assert len(again) == 3
    assert torch.equal(again.rows([keys[2], keys[0]]), rows[[2, 0]])  # type: ignore[arg-type]
    assert again.add(keys, rows, 1000)
    assert torch.equal(again.rows(keys), rows)  # type: ignore[arg-type]
    assert again.rows([b"?" * 16]) is None
    again.close()
    wider = RowStore(torch.zeros(1, 5), 1000, tmp_path)
    assert len(wider) == 0


@pytest.mark.parametrize(("text", "size"), [("4 GB", 4 * 10**9), ("1.5mb", 1_500_000), (7, 7)])
def test_sizes_are_read(text: Any, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "4 PB", "-1 MB", 0, True, None])
def test_what_is_no_size_is_refused(text: Any) -> None:
    with pytest.raises(DataError, match="no size in bytes"):
        parse_bytes(text)
