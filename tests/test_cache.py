"""Cached features: named by what they depend on, made again when damaged, refused when stale."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from backbones import BACKBONES
from snapshot import randomise
from torch import Tensor

import mmadapt as mm
from mmadapt.errors import AttachError
from mmadapt.folders import cache_folder
from mmadapt.train.cache import cached, data_digest, require_frozen, weights_digest


class Maker:
    """Makes features and counts how often."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> Tensor:
        self.calls += 1
        return torch.arange(6.0).reshape(2, 3).T  # not contiguous


def test_features_are_made_once(tmp_path: Path) -> None:
    make = Maker()
    first, second = (cached("key", make, tmp_path / "features") for _ in range(2))
    assert make.calls == 1
    assert torch.equal(first, second)
    assert cached("other", make, tmp_path / "features").shape == (3, 2)
    assert make.calls == 2


@pytest.mark.parametrize("content", [b"", b"not safetensors", bytes(100)])
def test_a_damaged_file_is_made_again(tmp_path: Path, content: bytes) -> None:
    make = Maker()
    cached("key", make, tmp_path)
    (tmp_path / "key.safetensors").write_bytes(content)
    cached("key", make, tmp_path)
    assert make.calls == 2
    cached("key", make, tmp_path)
    assert make.calls == 2


def test_a_folder_that_cannot_be_written_is_passed_over_with_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(UserWarning, match="features were not kept"):
        assert cached("key", Maker(), tmp_path / "file" / "features").shape == (3, 2)


def test_the_folder_follows_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MMADAPT_CACHE", str(tmp_path / "here"))
    assert cache_folder() == tmp_path / "here"
    monkeypatch.delenv("MMADAPT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "mmadapt"


def test_the_digest_is_of_the_backbones_weights_and_of_nothing_else() -> None:
    tiny = BACKBONES["open_clip"]
    model: Any = tiny.fresh()
    before = weights_digest(model)
    assert before == weights_digest(tiny.build()) == weights_digest(mm.Backbone(tiny.fresh()))
    randomise(mm.attach(model, mm.Bottleneck(4)))
    assert weights_digest(model) == before
    with torch.no_grad():
        model.visual.proj[0, 0] += 1e-3
    assert weights_digest(model) != before


def test_the_digest_of_data_sees_values_order_shape_and_kind() -> None:
    one, two = numpy.zeros((2, 3), numpy.uint8), numpy.ones((2, 3), numpy.uint8)
    digests = [
        data_digest(images)
        for images in ([one, two], [two, one], [one], [one.T, two.T], [one.astype(float), two], [])
    ]
    assert len(set(digests)) == len(digests)
    assert data_digest([one.copy(), two.copy()]) == digests[0]


def test_features_behind_a_frozen_tower_may_be_cached() -> None:
    model = BACKBONES["open_clip"].fresh()
    require_frozen(model, "vision", "vision.pooled")
    mm.attach(model, mm.ClipAdapter())
    require_frozen(model, "vision", "vision.pooled")
    mm.attach(model, mm.Bottleneck(4), name="text", at="text.layers[*].mlp")
    require_frozen(model, "vision", "vision.pooled")


def test_features_that_an_active_adapter_changes_are_refused() -> None:
    model = BACKBONES["open_clip"].fresh()
    mm.attach(model, mm.Bottleneck(4))
    with pytest.raises(AttachError) as caught:
        require_frozen(model, "vision", "vision.pooled")
    assert "changes them at vision.layers[0].mlp:out and 1 more sites" in str(caught.value)
    assert "mmadapt.disabled(model)" in caught.value.hint
    with mm.disabled(model):
        require_frozen(model, "vision", "vision.pooled")


def test_features_of_a_backbone_that_trains_are_refused() -> None:
    model = BACKBONES["open_clip"].fresh()
    mm.attach(model, mm.ClipAdapter())
    model.get_parameter("visual.proj").requires_grad_(True)
    with pytest.raises(AttachError, match=r"1 backbone tensors train, first 'visual\.proj'"):
        require_frozen(model, "vision", "vision.pooled")
