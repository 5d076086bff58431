"""Publishing over sockets: what arrives, what a dry run shows, and how refusals are told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import BACKBONES
from hub import Hub
from snapshot import assert_equal, randomise

import mmadapt as mm
from mmadapt.errors import (
    AdapterFileError,
    AttachError,
    DownloadError,
    GatedError,
    OfflineError,
    ZooError,
)

HOME = BACKBONES["open_clip"]
NAMES = ["README.md", "adapter.json", "adapter.safetensors"]


@pytest.fixture
def model(empty_home: Path, online: None) -> Any:
    """A backbone with an adapter of random weights, on a machine whose hub is the local one."""
    model = HOME.fresh()
    randomise(mm.attach(model, mm.Bottleneck(4), name="sketch"))
    return model


def outputs(model: Any) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        return HOME.outputs(model)


@pytest.mark.parametrize("mode", ["regular", "lfs"])
def test_what_was_pushed_loads_elsewhere_by_its_hub_id(
    model: Any, hub: Hub, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.mode = mode
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    sent = mm.zoo.push(model, "me/sketch", token="good", licence="CC0-1.0")
    repo = hub.repos["me/sketch"]
    assert sorted(repo.files) == NAMES and not repo.private
    assert sent.url == f"{hub.url}/me/sketch/commit/{repo.head}"
    assert sent.notes == ()
    assert all(r.token == "good" for r in hub.requests if r.method != "PUT")
    assert not any(r.token for r in hub.requests if r.method == "PUT")  # what was signed needs none
    fresh = HOME.fresh()
    assert mm.load_adapter(fresh, "hf:me/sketch").name == "sketch"
    assert_equal(outputs(fresh), outputs(model))
    pinned = HOME.fresh()
    mm.load_adapter(pinned, f"hf:me/sketch@{repo.head}", name="pinned")
    assert_equal(outputs(pinned), outputs(model))


def test_a_second_push_replaces_what_the_first_sent(model: Any, hub: Hub) -> None:
    mm.zoo.push(model, "me/sketch", token="good")
    first = dict(hub.repos["me/sketch"].files)
    mm.detach(model)
    mm.attach(model, mm.LoRA(2), name="other")
    mm.zoo.push(model, "hf:me/sketch", token="good")
    second = hub.repos["me/sketch"].files
    assert sorted(second) == NAMES and all(second[name] != first[name] for name in NAMES)
    assert len(hub.repos["me/sketch"].commits) == 2


def test_a_private_repository_is_made_private_and_needs_a_token_to_load(
    model: Any, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = mm.zoo.push(model, "me/secret", token="good", private=True)
    assert hub.repos["me/secret"].private and sent.private
    fresh = HOME.fresh()
    with pytest.raises(DownloadError, match="shows no repository me/secret"):
        mm.load_adapter(fresh, "hf:me/secret")
    assert mm.attachments(fresh) == {}
    monkeypatch.setenv("HF_TOKEN", "good")
    assert mm.load_adapter(fresh, "hf:me/secret").name == "sketch"


def test_the_token_of_the_environment_is_used(
    model: Any, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "good")
    assert mm.zoo.push(model, "me/sketch").url


def test_a_dry_run_shows_what_would_be_sent_and_asks_nobody(model: Any, hub: Hub) -> None:
    shown = mm.zoo.push(model, "me/sketch", private=True, dry_run=True)
    assert hub.requests == [] and hub.repos == {}
    assert sorted(shown.files) == NAMES and all(shown.files.values())
    assert "would be sent to me/sketch (private), nothing was" in repr(shown)
    assert 'no licence is told: licence="Apache-2.0"' in repr(shown)
    assert "# sketch" in shown.card and "&lt;!--" in shown._repr_html_()


def test_the_card_tells_backbone_method_data_licence_and_how_to_load_and_cite(
    empty_home: Path,
) -> None:
    clip = mm.load("tiny/clip")
    attachment = mm.attach(clip, [mm.Bottleneck(4), mm.LoRA(2, alpha=4.0)], name="sketch")
    told = {"licence": "MIT", "metrics": {"accuracy": 0.5}, "data": "digits | 16 a class"}
    card = mm.zoo.push(clip, "me/sketch", dry_run=True, **told).card
    assert card.startswith(
        "---\nlibrary_name: mmadapt\ntags:\n- mmadapt\n- adapter\n- bottleneck\n- lora\n"
    )
    assert "license: mit\n---" in card
    assert f"| sha256 of its weights | {clip.entry.sha256} |" in card
    assert "`LoRA(rank=2, alpha=4.0)` at 12 sites: `vision.layers[*].attn.q:weight`" in card
    assert f"| parameters | {attachment.num_parameters / 1e3:.3g} k |" in card
    assert "| trained on | digits \\| 16 a class |" in card
    assert "| metrics | accuracy 0.5 |" in card and "| licence | MIT |" in card
    assert 'backbone = mm.load("tiny/clip")' in card
    assert 'mm.load_adapter(backbone, "hf:me/sketch")' in card
    assert "- Hu et al. 2021, arXiv:2106.09685" in card


def test_a_card_of_another_hand_stays(model: Any, hub: Hub) -> None:
    hub.add("me/sketch", {"README.md": b"# Mine"})
    sent = mm.zoo.push(model, "me/sketch", token="good", licence="MIT")
    assert hub.repos["me/sketch"].files["README.md"] == b"# Mine"
    assert sorted(hub.repos["me/sketch"].files) == NAMES
    assert sent.notes == ("the README.md that was there stays",)


# -- refusals -----------------------------------------------------------------------------------------


def test_without_a_token_nothing_is_asked(model: Any, hub: Hub) -> None:
    with pytest.raises(GatedError, match="me/sketch needs a token, and there is none") as caught:
        mm.zoo.push(model, "me/sketch")
    assert "hf auth login" in caught.value.hint
    assert hub.requests == []


def test_a_token_the_hub_does_not_know_is_named(model: Any, hub: Hub) -> None:
    with pytest.raises(GatedError, match="does not know the token"):
        mm.zoo.push(model, "me/sketch", token="bad")
    assert hub.repos == {}


@pytest.mark.parametrize("there", [False, True])
def test_a_token_that_only_reads_is_refused(model: Any, hub: Hub, there: bool) -> None:
    hub.readers = ("reader",)
    if there:
        hub.add("me/sketch", {"config.json": b"{}"})
    with pytest.raises(GatedError, match=r"may not write to me/sketch \(HTTP 403\)") as caught:
        mm.zoo.push(model, "me/sketch", token="reader")
    assert "of an account that may write there" in caught.value.hint
    assert not there or list(hub.repos["me/sketch"].files) == ["config.json"]


def test_without_a_network_nothing_waits(
    model: Any, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(OfflineError, match="nothing was sent to me/sketch") as caught:
        mm.zoo.push(model, "me/sketch", token="good")
    assert "nothing answers there" in caught.value.message
    assert "mmadapt.save keeps the adapter here" in caught.value.hint
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(OfflineError, match="the network is not to be used"):
        mm.zoo.push(model, "me/sketch", token="good")


def test_a_server_that_fails_is_told(model: Any, hub: Hub) -> None:
    hub.faults.status, hub.faults.only = 500, "/commit/"
    with pytest.raises(DownloadError, match="me/sketch was refused"):
        mm.zoo.push(model, "me/sketch", token="good")
    assert hub.repos["me/sketch"].files == {}


@pytest.mark.parametrize("repo", ["sketch", "a/b/c", "../x", "me/", "", 3])
def test_what_names_no_repository_is_refused(model: Any, repo: Any, hub: Hub) -> None:
    with pytest.raises(ZooError, match="names no repository"):
        mm.zoo.push(model, repo, token="good")
    assert hub.requests == []


def test_what_is_not_attached_or_cannot_be_written_is_told_first(model: Any, hub: Hub) -> None:
    with pytest.raises(AttachError, match="no attachment is named 'sketsh'"):
        mm.zoo.push(model, "me/sketch", name="sketsh", token="good")
    with pytest.raises(AdapterFileError, match="cannot be written as JSON"):
        mm.zoo.push(model, "me/sketch", metrics={"loss": float("nan")}, token="good")
    assert hub.requests == []
