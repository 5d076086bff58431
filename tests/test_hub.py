"""The local hub answers as the clients of the real one expect; transformers, open_clip and timm load from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hub import Hub

FILES = {"config.json": b'{"a": 1}', "model.safetensors": bytes(range(256)) * 500}


def test_huggingface_hub_downloads_and_finds_a_pinned_commit_without_asking(
    hub: Hub, tmp_path: Path, online: None
) -> None:
    from huggingface_hub import hf_hub_download, snapshot_download

    commit = hub.add("org/model", FILES)
    place: dict[str, Any] = {"endpoint": hub.url, "cache_dir": tmp_path}
    path = hf_hub_download("org/model", "model.safetensors", **place)
    assert Path(path).read_bytes() == FILES["model.safetensors"]
    folder = Path(snapshot_download("org/model", **place))
    assert sorted(file.name for file in folder.iterdir()) == sorted(FILES)
    hub.requests.clear()
    again = hf_hub_download("org/model", "config.json", revision=commit, **place)
    assert Path(again).read_bytes() == FILES["config.json"] and not hub.requests


def test_huggingface_hub_names_what_is_missing_or_closed(
    hub: Hub, tmp_path: Path, online: None
) -> None:
    from huggingface_hub import errors, hf_hub_download

    hub.add("org/model", FILES)
    hub.add("org/closed", FILES, gated=True)
    place: dict[str, Any] = {"endpoint": hub.url, "cache_dir": tmp_path}
    with pytest.raises(errors.RemoteEntryNotFoundError):
        hf_hub_download("org/model", "none.txt", **place)
    with pytest.raises(errors.RevisionNotFoundError):
        hf_hub_download("org/model", "config.json", revision="v9", **place)
    with pytest.raises(errors.RepositoryNotFoundError):
        hf_hub_download("org/none", "config.json", **place)
    with pytest.raises(errors.GatedRepoError):
        hf_hub_download("org/closed", "config.json", token=False, **place)
    assert hf_hub_download("org/closed", "config.json", token="good", **place)


def test_huggingface_hub_writes_a_repository(hub: Hub, tmp_path: Path, online: None) -> None:
    from huggingface_hub import HfApi

    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# Model\n")
    api = HfApi(endpoint=hub.url, token="good")
    api.create_repo("org/new", private=True)
    api.upload_folder(repo_id="org/new", folder_path=tmp_path)
    assert hub.repos["org/new"].private and hub.repos["org/new"].files.items() >= FILES.items()
    assert api.model_info("org/new").card_data["license"] == "mit"
