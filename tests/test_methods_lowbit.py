"""Files of few bits: their size, that they lose nothing, and that what is loaded stays sealed."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import BACKBONES, WIDTH
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from snapshot import assert_equal, differ, randomise, state
from torch import Tensor

import mmadapt as mm
from mmadapt.errors import AdapterFileError
from mmadapt.ops import reference

VIT = BACKBONES["hf_vit"]
every_count = pytest.mark.parametrize("bits", [1, 2, 3, 4])


def saved(bits: int, folder: Path, width: int = 5) -> Any:
    model = VIT.fresh()
    randomise(mm.attach(model, mm.BiAdaptFormer(width, bits=bits, scale=3.0))).save(folder)
    return model


def outputs(model: Any) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return VIT.outputs(model)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 4), st.lists(st.integers(0, 15), max_size=40))
def test_packed_numbers_come_back(bits: int, numbers: list[int]) -> None:
    values = torch.tensor([number % 2**bits for number in numbers], dtype=torch.int64)
    packed = reference.pack_bits(values, bits)
    assert packed.dtype == torch.uint8
    assert len(packed) == -(-len(numbers) * bits // 8)
    assert torch.equal(reference.unpack_bits(packed, bits, len(numbers)), values)


def test_bits_are_packed_lowest_first() -> None:
    assert reference.pack_bits(torch.tensor([1, 0, 0, 1, 0, 0, 0, 1, 1]), 1).tolist() == [137, 1]
    assert reference.pack_bits(torch.tensor([3, 0, 1]), 2).tolist() == [19]
    assert reference.pack_bits(torch.tensor([5, 6, 7]), 3).tolist() == [0b11110101, 1]


@every_count
def test_files_hold_bits(bits: int, tmp_path: Path) -> None:
    model = saved(bits, tmp_path, width=8)
    tensors = load_file(tmp_path / "adapter.safetensors")
    key = "0/vision.layers[0].mlp:out"
    assert {name: tensors[f"{key}/{name}"].dtype for name in ("down_codes", "up_codes")} == {
        "down_codes": torch.uint8,
        "up_codes": torch.uint8,
    }
    numbers = mm.attachments(model)["default"].num_parameters
    codes = sum(t.nbytes for name, t in tensors.items() if name.endswith("_codes"))
    assert codes * 32 == numbers * 4 * bits  # float32 would take 32/bits times as much
    layer = mm.attachments(model)["default"].layers[key]
    own = sum(t.nbytes for name, t in tensors.items() if name.startswith(key))
    assert own == layer.describe()["bytes"] == 2 * 8 * WIDTH * bits / 8 + 16


@every_count
def test_what_is_loaded_is_bit_equal_and_saves_the_same_bytes(bits: int, tmp_path: Path) -> None:
    model = saved(bits, tmp_path / "one")
    fresh = VIT.fresh()
    loaded = mm.load_adapter(fresh, tmp_path / "one")
    assert_equal(outputs(fresh), outputs(model))
    assert differ(outputs(model), outputs(VIT.fresh()))
    loaded.save(tmp_path / "two")
    for name in ("adapter.json", "adapter.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def _matrices(attachment: Any) -> list[Tensor]:
    return [
        reference.low_bit(getattr(layer, word), layer.codes, *layer._statistics(word)).detach()
        for layer in attachment.layers.values()
        for word in ("down", "up")
    ]


@every_count
def test_what_is_sealed_stays_sealed_when_trained_further(bits: int, tmp_path: Path) -> None:
    saved(bits, tmp_path / "one")
    model = VIT.fresh()
    loaded = mm.load_adapter(model, tmp_path / "one")
    before = _matrices(loaded)
    optimiser = torch.optim.Adam(loaded.parameters(), lr=0.3)
    for _ in range(3):
        optimiser.zero_grad()
        sum(output.square().sum() for output in VIT.outputs(model)).backward()  # type: ignore[union-attr]
        optimiser.step()
    after = _matrices(loaded)
    assert any(not torch.equal(one, other) for one, other in zip(before, after, strict=True))
    first = load_file(tmp_path / "one" / "adapter.safetensors")
    places = [f"{key}/{word}" for key in loaded.layers for word in ("down", "up")]
    codes = torch.tensor(reference.normal_codes(bits))
    for key, matrix in zip(places, after, strict=True):
        allowed = codes * first[f"{key}_deviation"] + first[f"{key}_mean"]
        assert set(matrix.unique().tolist()) <= set(allowed.tolist())
    old, new = (loaded.save(tmp_path / name) / "adapter.safetensors" for name in ("two", "three"))
    assert old.read_bytes() == new.read_bytes()
    for key, value in load_file(new).items():
        if not key.endswith("_codes"):
            assert torch.equal(value, first[key])
    again = VIT.fresh()
    mm.load_adapter(again, tmp_path / "three")
    assert_equal(outputs(again), outputs(model))


def test_training_before_a_save_moves_mean_and_deviation() -> None:
    attachment = randomise(mm.attach(VIT.fresh(), mm.BiAdaptFormer(4)))
    layer: Any = next(iter(attachment.layers.values()))
    mean, deviation = layer._statistics("down")
    assert torch.equal(mean, layer.down.mean())
    assert torch.equal(deviation, layer.down.std())


def test_copies_and_checkpoints_keep_the_seal(tmp_path: Path) -> None:
    saved(2, tmp_path)
    model = VIT.fresh()
    attachment = mm.load_adapter(model, tmp_path)
    with torch.no_grad():  # the weights' own mean and deviation are others now
        for parameter in attachment.parameters():
            parameter.mul_(1.7)
    expected = outputs(model)
    twin = VIT.fresh()
    mm.attach(twin, mm.BiAdaptFormer(5, bits=2, scale=3.0))
    twin.load_state_dict(model.state_dict(), strict=True)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), twin):
        assert_equal(outputs(other), expected)
    with torch.no_grad():
        for name, buffer in twin.named_buffers():
            if name.endswith("_deviation"):
                buffer.fill_(-1)
    assert differ(outputs(twin), expected)


@every_count
def test_tensors_that_do_not_fit_are_refused(bits: int, tmp_path: Path) -> None:
    key = "0/vision.layers[0].mlp:out/down"
    for number, (change, text) in enumerate(
        (
            (lambda t: t.pop(f"{key}_mean"), "1 missing"),
            (lambda t: t.update({f"{key}_code": torch.zeros(1)}), "1 unexpected"),
            (lambda t: t.update({f"{key}_codes": t[f"{key}_codes"][1:]}), "1 of another shape"),
            (lambda t: t.update({f"{key}_codes": t[f"{key}_codes"].float()}), "1 of another shape"),
            (lambda t: t.update({f"{key}_deviation": torch.tensor(-1.0)}), "give its codes no val"),
            (lambda t: t.update({f"{key}_mean": torch.tensor(float("nan"))}), "give its codes no"),
        )
    ):
        folder = tmp_path / str(number)
        saved(bits, folder)
        path = folder / "adapter.safetensors"
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        tensors = load_file(path)
        change(tensors)  # type: ignore[operator]
        save_file(tensors, path, metadata=metadata)
        model = VIT.fresh()
        before = state(model)
        with pytest.raises(AdapterFileError, match=text):
            mm.load_adapter(model, folder)
        assert state(model) == before


def test_a_matrix_of_one_value_survives(tmp_path: Path) -> None:
    model = VIT.fresh()
    attachment = randomise(mm.attach(model, mm.BiAdaptFormer(4)))
    with torch.no_grad():
        for layer in attachment.layers.values():
            layer.up.fill_(0.25)  # type: ignore[operator,union-attr]
    attachment.save(tmp_path)
    fresh = VIT.fresh()
    mm.load_adapter(fresh, tmp_path)
    assert_equal(outputs(fresh), outputs(model))


def test_double_precision_is_kept(tmp_path: Path) -> None:
    model = VIT.fresh().double()
    randomise(mm.attach(model, mm.BiAdaptFormer(4, bits=2))).save(tmp_path)
    fresh = VIT.fresh().double()
    mm.load_adapter(fresh, tmp_path)
    batch = {key: value.double() for key, value in VIT.batch(2).items()}
    with torch.no_grad():
        assert torch.equal(fresh(**batch).last_hidden_state, model(**batch).last_hidden_state)
