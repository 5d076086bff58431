"""The mean of adapter files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import ALL, mels
from safetensors.torch import load_file
from snapshot import assert_close, assert_equal, randomise

import mmadapt as mm
from mmadapt.errors import AdapterFileError, AttachError

BERT = ALL["hf_wav2vec2_bert"]


def written(folder: Path, seed: int, adapter: Any = None, name: str = "deu", **card: Any) -> Path:
    model = BERT.fresh()
    randomise(mm.attach(model, adapter or mm.Bottleneck.language(4), name=name), 0.3, seed)
    return mm.save(model, folder / f"{name}-{seed}", **card)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter.safetensors")


def test_the_mean_of_checkpoints_is_the_mean_of_their_tensors(tmp_path: Path) -> None:
    paths = [written(tmp_path, seed, metrics={"wer": 0.1}, licence="MIT") for seed in range(3)]
    made = mm.average(paths, tmp_path / "mean")
    several = [tensors(path) for path in paths]
    for key, value in tensors(made).items():
        assert_close((value,), (torch.stack([own[key] for own in several]).mean(0),), 1e-6)
    model = BERT.fresh()
    attachment = mm.load_adapter(model, made)
    assert attachment.name == "deu"
    assert attachment.metadata["licence"] == "MIT"
    assert attachment.metadata["metrics"] == {}


def test_weights_are_shares_and_one_of_them_may_be_nothing(tmp_path: Path) -> None:
    paths = [written(tmp_path, seed) for seed in range(2)]
    weighted = mm.average(paths, tmp_path / "mean", weights=(3, 1), name="mix")
    one, two = (tensors(path) for path in paths)
    for key, value in tensors(weighted).items():
        assert_close((value,), (0.75 * one[key] + 0.25 * two[key],), 1e-6)
    assert mm.load_adapter(BERT.fresh(), weighted).name == "mix"
    first = tensors(mm.average(paths, tmp_path / "first", weights=(1, 0)))
    assert_equal(tuple(first.values()), tuple(one.values()))


def test_every_language_takes_its_best_checkpoint_or_the_mean_of_some(tmp_path: Path) -> None:
    """One backbone, a language from each file, and what each said alone."""
    batch = mels(2)
    model: Any = BERT.fresh()
    for name, seeds in (("deu", (0, 1)), ("fra", (2,))):
        paths = [written(tmp_path, seed, name=name) for seed in seeds]
        mm.load_adapter(model, mm.average(paths, tmp_path / name))
    for name in ("deu", "fra"):
        other: Any = BERT.fresh()
        mm.load_adapter(other, tmp_path / name)
        mm.set_active(model, name)
        assert_equal(BERT.outputs(model, batch), BERT.outputs(other, batch))


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (mm.Bottleneck.language(5), "adapters or sites"),
        (mm.Bottleneck.language(4, at="audio.layers[0]"), "adapters or sites"),
        (mm.LoRA(2), "adapters or sites"),
    ],
    ids=repr,
)
def test_what_is_not_alike_has_no_mean(tmp_path: Path, other: Any, what: str) -> None:
    paths = [written(tmp_path, 0), written(tmp_path, 1, other)]
    with pytest.raises(AdapterFileError, match=rf"(?s)deu-1 differs from .*deu-0 in its {what}"):
        mm.average(paths, tmp_path / "mean")
    assert not (tmp_path / "mean").exists()


def test_another_backbone_is_named(tmp_path: Path) -> None:
    model = ALL["hf_parakeet"].fresh()
    mm.attach(model, mm.Bottleneck.language(4), name="deu")
    other = mm.save(model, tmp_path / "other")
    with pytest.raises(AdapterFileError, match="backbone's family, backbone's facts"):
        mm.average([written(tmp_path, 0), other], tmp_path / "mean")


def test_packed_bits_have_no_mean(tmp_path: Path) -> None:
    low = mm.BiAdaptFormer(4, at="audio.layers[*].mlp")
    paths = [written(tmp_path, seed, low) for seed in range(2)]
    with pytest.raises(AdapterFileError, match="uint8 that differ"):
        mm.average(paths, tmp_path / "mean")
    same = mm.average([paths[0], paths[0]], tmp_path / "same")
    assert tensors(same).keys() == tensors(paths[0]).keys()


@pytest.mark.parametrize("weights", [(1,), (1, -1), (0, 0), (1, float("inf")), "ab", (1, "2"), 3])
def test_weights_are_as_many_numbers(tmp_path: Path, weights: Any) -> None:
    paths = [written(tmp_path, seed) for seed in range(2)]
    with pytest.raises(AdapterFileError, match="expected 2 numbers"):
        mm.average(paths, tmp_path / "mean", weights=weights)


def test_paths_and_names_are_checked(tmp_path: Path) -> None:
    for paths in ("./deu", [], Path("./deu"), None):
        with pytest.raises(AdapterFileError, match="expected the folders"):
            mm.average(paths, tmp_path / "mean")  # type: ignore[arg-type]
    with pytest.raises(AttachError, match="cannot name"):
        mm.average([written(tmp_path, 0)], tmp_path / "mean", name="a b")
    with pytest.raises(AdapterFileError, match="no adapter folder"):
        mm.average([tmp_path / "nowhere"], tmp_path / "mean")
