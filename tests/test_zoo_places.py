"""Where files are found beside the own cache, how they come by hand, and how they are kept."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from downloads import COST, FILES, LICENCE, WEIGHTS, entry
from hub import Hub

from mmadapt.errors import (
    ChecksumError,
    DownloadError,
    MissingDependencyError,
    OfflineError,
    ZooError,
)
from mmadapt.zoo import Entry, File, get, register
from mmadapt.zoo.keeping import cached, import_file, rm, verify, where


@pytest.fixture
def net(hub: Hub, empty_home: Path) -> Entry:
    """A pinned entry of one file."""
    hub.plain["/net.pth"] = WEIGHTS
    return entry(f"{hub.url}/net.pth")


# -- other places --------------------------------------------------------------------------------------


def test_a_shared_root_is_filled_once_and_read_elsewhere(
    net: Entry, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = tmp_path / "shared"
    get(net, to=shared, **COST)
    with pytest.raises(OfflineError):
        get(net, offline=True)
    monkeypatch.setenv("MMADAPT_ZOO_PATH", f"{tmp_path / 'none'}{os.pathsep}{shared}")
    folder = get(net, offline=True)
    assert folder.is_relative_to(shared) and len(hub.fetched()) == 1
    with pytest.raises(ZooError, match="nothing in the cache matches"):
        rm("lab/net")
    assert (folder / "net.pth").exists()


def test_the_cache_of_huggingface_hub_is_used_in_place(
    hub: Hub, empty_home: Path, online: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import snapshot_download

    commit = hub.add("org/model", FILES)
    cache = empty_home.parent / "huggingface" / "hub"
    snapshot = snapshot_download("org/model", endpoint=hub.url, cache_dir=cache)
    hub.requests.clear()
    assert str(get("hf:org/model", offline=True)) == snapshot
    assert str(get(f"hf:org/model@{commit}", **COST)) == snapshot and not hub.requests
    moved = cache.rename(empty_home.parent / "elsewhere")
    with pytest.raises(OfflineError):
        get("hf:org/model", offline=True)
    monkeypatch.setenv("HF_HUB_CACHE", str(moved))
    assert get("hf:org/model", offline=True).is_relative_to(moved)
    blob = (get("hf:org/model", offline=True) / "model.safetensors").resolve()
    blob.write_bytes(WEIGHTS[::-1])  # what another's cache got wrong is not used
    assert get("hf:org/model", **COST).is_relative_to(empty_home)


def test_files_that_torch_hub_has_are_used_where_their_digest_is_right(
    net: Entry, hub: Hub, empty_home: Path
) -> None:
    place = empty_home.parent / "torch" / "hub" / "checkpoints"
    place.mkdir(parents=True)
    (place / "net.pth").write_bytes(WEIGHTS)
    assert get(net, offline=True) == place and hub.requests == []
    (place / "net.pth").write_bytes(WEIGHTS[::-1])
    assert get(net, **COST).is_relative_to(empty_home)
    assert (place / "net.pth").read_bytes() == WEIGHTS[::-1]


def test_a_file_fetched_by_hand_is_taken_in_by_its_digest(
    net: Entry, hub: Hub, tmp_path: Path
) -> None:
    register(net)
    given = tmp_path / "download (1).pth"
    given.write_bytes(WEIGHTS)
    folder = import_file(given)
    assert get("lab/net", offline=True) == folder and given.exists() and not hub.requests
    given.write_bytes(b"!" + WEIGHTS[1:])
    with pytest.raises(ZooError, match="no entry has a file with sha256"):
        import_file(given)
    with pytest.raises(ChecksumError, match=r"is not lab/net's net\.pth: its sha256 is"):
        import_file(given, "lab/net")


def test_a_manual_entry_names_its_page_and_takes_the_file(empty_home: Path, tmp_path: Path) -> None:
    page = {"manual": "https://drive.example/x"}
    whole = register(Entry("lab/any-file", "", "", page, (), LICENCE))
    register(Entry("lab/by-hand", "", "x:y", page, (File("a.pth"),), LICENCE))
    with pytest.raises(DownloadError, match=r"in a browser, from https://drive\.example/x") as told:
        get("lab/by-hand", **COST)
    assert "mmadapt zoo import FILE --as lab/by-hand" in str(told.value)
    (tmp_path / "a.pth").write_bytes(WEIGHTS)
    import_file(tmp_path / "a.pth", "lab/by-hand")
    assert (get("lab/by-hand", offline=True) / "a.pth").read_bytes() == WEIGHTS
    import_file(tmp_path / "a.pth", whole)
    assert (get(whole, offline=True) / "a.pth").read_bytes() == WEIGHTS


def test_a_folder_fetched_by_hand_serves_a_hub_id(
    hub: Hub, empty_home: Path, tmp_path: Path
) -> None:
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "later").mkdir()
    import_file(tmp_path, "hf:org/model")
    folder = get("hf:org/model", offline=True)
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    with pytest.raises(ZooError, match=r"there is no"):
        import_file(tmp_path / "none")


def test_what_is_kept_can_be_listed_verified_and_removed(
    net: Entry, hub: Hub, empty_home: Path
) -> None:
    register(net)
    path = get(net, **COST) / "net.pth"
    assert [row[:3] for row in cached()] == [("lab/net", "0.3", "whole")]
    assert [row[3] for row in verify("lab/net")] == [
        "sound"
    ] and verify().title == "1 files, 0 damaged"
    stat = path.stat()
    path.write_bytes(b"!" + WEIGHTS[1:])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as a failing disk does it
    assert "its sha256 is" in verify("lab/net").rows[0][3]
    assert "would be removed" in rm("lab/*", dry_run=True).title and path.exists()
    rm("lab/*")
    assert not path.exists() and len(cached()) == 0
    with pytest.raises(ZooError, match=r"nothing in the cache matches 'lab/\*'"):
        rm("lab/*")
    with pytest.raises(ZooError, match="lab/net is not on this machine"):
        verify("lab/net")
    assert [row[0] for row in where()] == ["bundled", "cached", "hub cache"]


def test_what_no_manifest_names_any_more_is_verified_by_its_record(
    net: Entry, empty_home: Path
) -> None:
    path = get(net, **COST) / "net.pth"  # the entry was never registered
    assert verify().rows == [("lab/net", "net.pth", "0.3", "sound")]
    path.write_bytes(b"!")
    assert verify().title == "1 files, 1 damaged"


def test_missing_libraries_are_named_before_the_download(hub: Hub, empty_home: Path) -> None:
    item = entry(f"{hub.url}/net.pth", requires={"no-such-library": ">=1"})
    with pytest.raises(MissingDependencyError, match=r"pip install 'no-such-library>=1'"):
        get(item, **COST)
    item = entry(f"{hub.url}/net.pth", requires={"torch": ">=900"})
    with pytest.raises(MissingDependencyError, match=r"needs torch>=900, this is 2"):
        get(item, **COST)
    assert hub.requests == []
    hub.plain["/net.pth"] = WEIGHTS
    get(item, to=empty_home / "shared", **COST)  # for machines that have it
    assert hub.fetched("net.pth")
