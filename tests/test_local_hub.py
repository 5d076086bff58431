"""The hub of demonstrations, over sockets: it serves, breaks, lies and takes uploads as it says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from snapshot import randomise

import mmadapt as mm
from mmadapt.demos.local_hub import Answer, LocalHub
from mmadapt.errors import ChecksumError, DownloadError, GatedError, OfflineError
from mmadapt.zoo import Entry, File, register
from mmadapt.zoo.manifest import data_folder

CLIP = data_folder() / "tiny" / "clip"
WEIGHTS = CLIP / "model.safetensors"


@pytest.fixture
def local(empty_home: Path, online: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    """A demonstration's hub that serves a small CLIP, used as its `environment` says."""
    with LocalHub() as hub:
        for name, value in hub.environment.items():
            monkeypatch.setenv(name, value)
        files = {path.name: path.read_bytes() for path in CLIP.iterdir()}
        commit = hub.add("lab/scenes", files)
        register(
            Entry("lab/scenes", "", "open_clip:tiny", {"hf": "lab/scenes"},
                  tuple(map(File.of, sorted(CLIP.iterdir()))),
                  {"weights": "MIT", "declared_by": "test"}, revision=commit)
        )  # fmt: skip
        yield hub


def test_a_pulled_cable_leaves_a_part_that_is_gone_on_with(local: LocalHub) -> None:
    local.break_after = 1_000_000
    with pytest.raises(OfflineError, match="are kept in"):
        mm.zoo.get("lab/scenes", progress=False)
    sent = {answer.path: answer for answer in local.answers}
    size, kept = WEIGHTS.stat().st_size, sent["model.safetensors"].sent
    assert sum(answer.sent for answer in local.answers) == 1_000_000 and 0 < kept < size
    local.break_after = None
    folder = mm.zoo.get("lab/scenes", progress=False)
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS.read_bytes()
    assert Answer("model.safetensors", kept, size, size - kept) in local.answers
    asked = local.requests
    local.break_after = 0
    assert mm.zoo.get("lab/scenes", progress=False) == folder and local.requests == asked > 0


def test_altered_bytes_are_refused(local: LocalHub) -> None:
    right = WEIGHTS.read_bytes()
    local.altered["model.safetensors"] = right[:-1] + bytes([right[-1] ^ 1])
    with pytest.raises(ChecksumError, match="what came was deleted"):
        mm.zoo.get("lab/scenes", progress=False)


def test_what_it_does_not_have_is_said_as_the_hub_says_it(local: LocalHub) -> None:
    with pytest.raises(DownloadError, match="no repository lab/other"):
        mm.zoo.get("hf:lab/other", progress=False)
    with pytest.raises(DownloadError, match="no revision 'v2'"):
        mm.zoo.get("hf:lab/scenes@v2", progress=False)


def test_a_branch_moves_when_asked_again(local: LocalHub) -> None:
    old = mm.zoo.get("hf:lab/scenes", progress=False)
    new = local.add("lab/scenes", {"note.txt": b"newer"})
    assert mm.zoo.get("hf:lab/scenes", progress=False) == old
    assert mm.zoo.get("hf:lab/scenes", progress=False, refresh=True).name == new


def test_an_adapter_is_pushed_and_loaded(local: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    clip: Any = mm.load("lab/scenes", progress=False)
    randomise(mm.attach(clip, mm.LoRA(2), name="sketch"))
    mm.zoo.push(clip, "me/sketch", licence="MIT")
    again: Any = mm.load("lab/scenes", progress=False)
    mm.load_adapter(again, "hf:me/sketch")
    pixels = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again.model.encode_image(pixels), clip.model.encode_image(pixels))
    monkeypatch.setenv("HF_TOKEN", "another's")
    with pytest.raises(GatedError, match="does not know the token"):
        mm.zoo.push(clip, "me/sketch", licence="MIT")
