"""Adapters from wherever they are: what is recognised, and that a refusal changes nothing."""

from __future__ import annotations

import functools
import os
import shutil
import stat
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import ALL, BACKBONES
from hub import Hub
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from snapshot import assert_equal, randomise, state
from test_interop_peft import FILES as PEFT

import mmadapt as mm
from mmadapt.errors import (
    AdapterFileError,
    DownloadError,
    OfflineError,
    WrongBackboneError,
    ZooError,
)
from mmadapt.interop import archive

HOME = BACKBONES["open_clip"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good adapter folder."""
    return randomise(mm.attach(HOME.fresh(), mm.Bottleneck(4), name="sketch")).save(
        tmp_path / "sketch"
    )


def zipped(folder: Path, inside: str = "") -> Path:
    """A zip of a folder's files, below `inside`."""
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for file in sorted(folder.iterdir()):
            packed.write(file, inside + file.name)
    return path


def unpacked() -> list[str]:
    """What lies in the folder for temporary files that mmadapt made."""
    return [name for name in os.listdir(tempfile.gettempdir()) if name.startswith("mmadapt-")]


def outputs(model: Any) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        return HOME.outputs(model)


def loaded(source: Any, **options: Any) -> Any:
    model = HOME.fresh()
    mm.load_adapter(model, source, **options)
    return model


def refused(source: Any, kind: type[Exception] = AdapterFileError) -> str:
    """The text of the error; the model is as it was, and nothing was left in temporary folders."""
    model = HOME.fresh()
    before = state(model)
    with pytest.raises(kind) as caught:
        mm.load_adapter(model, source)
    assert state(model) == before
    assert mm.attachments(model) == {}
    assert unpacked() == []
    return str(caught.value)


@pytest.fixture(autouse=True)
def own_temporary_folder(tmp_path_factory: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What is unpacked goes where no other test writes."""
    place = tmp_path_factory.mktemp("temporary")
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    return place


# -- where it comes from ----------------------------------------------------------------------------


@pytest.mark.parametrize("inside", ["", "sketch/"], ids=["files", "a folder"])
def test_a_zip_is_as_good_as_its_folder(folder: Path, inside: str) -> None:
    expected = outputs(loaded(folder))
    model = loaded(zipped(folder, inside))
    assert list(mm.attachments(model)) == ["sketch"]
    assert_equal(outputs(model), expected)
    assert unpacked() == []


def test_a_zip_needs_no_suffix(folder: Path) -> None:
    path = zipped(folder).rename(folder.with_suffix(".adapter"))
    assert_equal(outputs(loaded(path)), outputs(loaded(folder)))


def test_paths_are_paths_or_start_as_such(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    monkeypatch.setenv("HOME", str(folder.parent))
    expected = outputs(loaded(folder))
    for source in ("./sketch", f"../{folder.parent.name}/sketch", "~/sketch", Path("sketch")):
        assert_equal(outputs(loaded(source)), expected)


def test_other_text_is_a_zoo_name_and_a_folder_of_that_name_is_hinted_at(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    text = refused("sketch", ZooError)
    assert "the zoo has no 'sketch'" in text
    assert "for the folder or file of that name: './sketch'" in text
    assert "tiny/clip is a backbone" in refused("tiny/clip", ZooError)
    assert "expected a path, a hub id or a zoo name, got int" in refused(3)


def test_a_folder_with_one_adapter_below_it_is_entered(folder: Path) -> None:
    assert_equal(outputs(loaded(folder.parent)), outputs(loaded(folder)))
    shutil.copytree(folder, folder.parent / "second")
    text = refused(folder.parent)
    assert "holds several adapters: second, sketch" in text
    assert f"give one of them, for example {str(folder.parent / 'second')!r}" in text


def test_a_folder_without_any_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing")
    assert "holds no adapter; it holds notes.txt" in refused(tmp_path)


# -- the hub and the zoo ------------------------------------------------------------------------------


def test_a_hub_id_is_fetched_once_and_only_its_adapter(
    folder: Path, hub: Hub, empty_home: Path
) -> None:
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    commit = hub.add("me/sketch", {**files, "model.safetensors": b"large", "notes.txt": b"no"})
    expected = outputs(loaded(folder))
    assert_equal(outputs(loaded("hf:me/sketch")), expected)
    fetched = {request.path.rpartition("/")[2] for request in hub.fetched("resolve")}
    assert fetched == {"adapter.json", "adapter.safetensors"}
    hub.requests.clear()
    assert_equal(outputs(loaded("hf:me/sketch")), expected)
    assert_equal(outputs(loaded(f"hf:me/sketch@{commit}")), expected)
    assert hub.requests == []


def test_a_peers_repository_is_recognised(hub: Hub, empty_home: Path) -> None:
    with zipfile.ZipFile(PEFT / "open_clip.zip") as packed:
        hub.add("them/lora", {name: packed.read(name) for name in packed.namelist()})
    text = refused("hf:them/lora")
    assert "does not fit" in text  # it is another CLIP's


def test_a_repository_without_an_adapter_and_a_hub_that_is_away_are_told(
    hub: Hub, empty_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("them/model", {"model.safetensors": b"weights"})
    assert "has no file that matches adapter.json" in refused("hf:them/model", DownloadError)
    assert "shows no repository them/none" in refused("hf:them/none", DownloadError)
    assert "'hf:none' is no hub id" in refused("hf:none", ZooError)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert "hf:me/away" in refused("hf:me/away", OfflineError)


@pytest.mark.parametrize("packed", [False, True], ids=["files", "a zip"])
def test_a_zoo_name_stands_for_a_published_adapter(
    folder: Path, hub: Hub, empty_home: Path, packed: bool
) -> None:
    from mmadapt.zoo import Entry, File, register

    names = ["sketch.zip"] if packed else ["adapter.json", "adapter.safetensors"]
    place = zipped(folder).parent if packed else folder
    hub.plain |= {f"/a/{name}": (place / name).read_bytes() for name in names}
    licence = {"weights": "MIT", "declared_by": "test"}
    files = tuple(File(name, "weights") for name in names)
    register(
        Entry(
            "lab/clip+sketch",
            "a sketch",
            "",
            {"urls": [f"{hub.url}/a/"]},
            files,
            licence,
            "adapter",
        )
    )
    assert_equal(outputs(loaded("lab/clip+sketch")), outputs(loaded(folder)))


def test_a_published_adapter_for_another_backbone_is_refused_before_it_is_fetched(
    hub: Hub, empty_home: Path
) -> None:
    from mmadapt.zoo import Entry, register

    licence = {"weights": "MIT", "declared_by": "test"}
    facts: Any = {"kind": "adapter", "base": "tiny/sam", "licence": licence}
    register(Entry("tiny/sam+sketch", "a sketch", "", {"hf": "me/sketch"}, **facts))
    clip = mm.load("tiny/clip")
    with pytest.raises(WrongBackboneError) as error:
        mm.load_adapter(clip, "tiny/sam+sketch")
    assert "tiny/sam+sketch was made for tiny/sam, this is tiny/clip" in str(error.value)
    assert not hub.requests and not mm.attachments(clip)


# -- released checkpoints -----------------------------------------------------------------------------


def test_files_of_methods_authors_are_recognised_by_their_keys(tmp_path: Path) -> None:
    for key, reader in (
        ("adapter_query.weight", "read_llama_adapter"),
        ("image_encoder.blocks.0.MLP_Adapter.D_fc1.weight", "read_med_sa"),
        ("image_encoder.blocks.0.Adapter.norm.weight", "read_sam_med2d"),
        ("wav2vec2.encoder.layers.0.adapter_layer.norm.weight", "read_mms"),
        ("transformer.h.1.attn.gating_factor", "read_llama_adapter"),
    ):
        path = tmp_path / "file.pth"
        torch.save({"model": {key: torch.zeros(2, 2)}}, path)
        text = refused(path)
        assert f"mmadapt.interop.{reader} takes what the file does not say" in text, key
    torch.save({"encoder_dict": {}, "decoder_dict": {}}, tmp_path / "file.pth")
    assert "read_three_d_sam" in refused(tmp_path / "file.pth")


def test_a_language_of_mms_is_read_from_its_file(tmp_path: Path) -> None:
    from test_interop_mms import hers, logits, speech

    hers(tmp_path, "deu", 20)
    model, again = speech(), speech()
    mm.interop.read_mms(model, tmp_path, "deu")
    attachment = mm.load_adapter(again, tmp_path / "adapter.deu.safetensors", name="german")
    assert attachment.name == "german"
    assert_equal(logits(again), logits(model))
    mm.load_adapter(again, tmp_path, name="german", replace=True)
    assert list(mm.attachments(again)) == ["german"]


def test_prompts_of_peft_are_read(tmp_path: Path) -> None:
    tiny = ALL["hf_llama"]
    model = tiny.fresh()
    adapter = mm.LlamaAdapter(3, layers=1, gate="layer", activation="identity")
    randomise(mm.attach(model, adapter))
    mm.interop.write_llama_adapter(model, tmp_path / "prompt", "peft")
    again = tiny.fresh()
    assert (
        mm.load_adapter(again, tmp_path / "prompt", name="p").metadata["origin"].startswith("peft")
    )
    with torch.no_grad():
        assert_equal(tiny.outputs(again), tiny.outputs(model))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"nothing", "cannot be read as tensors"),
        (b"", "cannot be read as tensors"),
    ],
)
def test_a_file_that_is_none_is_told(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "x.pth").write_bytes(content)
    assert said in refused(tmp_path / "x.pth")


def test_unknown_tensors_and_configurations_are_listed(tmp_path: Path) -> None:
    torch.save({"a.weight": torch.zeros(2), "b": 3}, tmp_path / "x.pth")
    assert "is no adapter that is known: it holds a.weight, b" in refused(tmp_path / "x.pth")
    torch.save([1], tmp_path / "x.pth")
    assert "holds list, expected tensors by name" in refused(tmp_path / "x.pth")
    (tmp_path / "adapter_config.json").write_text('{"b": 1, "a": 2}')
    assert "is neither PEFT's nor AdapterHub's: it has a, b" in refused(tmp_path)


# -- zips that are not to be trusted -------------------------------------------------------------------


def packed(path: Path, *members: tuple[Any, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return path


def member(name: str, mode: int = 0) -> zipfile.ZipInfo:
    found = zipfile.ZipInfo("x")
    found.filename = name  # past the constructor's own mending
    found.external_attr = mode << 16
    return found


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("../evil", "leads out of the folder"),
        ("a/../../evil", "leads out of the folder"),
        ("./a", "leads out of the folder"),
        ("/evil", "is an absolute name"),
        ("//evil", "is an absolute name"),
        ("C:evil", "is no plain name"),
        ("..\\evil", "is no plain name"),
        ("a//b", "is no plain name"),
    ],
)
def test_names_that_lead_elsewhere_are_refused(folder: Path, name: str, said: str) -> None:
    good = [(file.name, file.read_bytes()) for file in sorted(folder.iterdir())]
    path = packed(folder.with_suffix(".zip"), *good, (member(name), b"evil"))
    before = sorted(folder.parent.rglob("*"))
    text = refused(path)
    assert f"is refused: {name!r} {said}" in text and "nothing was unpacked" in text
    assert sorted(folder.parent.rglob("*")) == before
    assert unpacked() == []


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR, stat.S_IFSOCK])
def test_links_and_devices_are_refused(folder: Path, kind: int) -> None:
    path = packed(
        folder.with_suffix(".zip"), (member("adapter.json", kind | 0o644), b"/etc/passwd")
    )
    assert "'adapter.json' is a link or a device" in refused(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("second", ["adapter.json", "ADAPTER.json", "adapter.json/"])
def test_names_that_stand_there_twice_are_refused(folder: Path, second: str) -> None:
    path = packed(folder.with_suffix(".zip"), ("adapter.json", b"{}"), (second, b""))
    assert "stands there twice" in refused(path)


def test_a_file_below_another_file_is_refused(folder: Path) -> None:
    path = packed(folder.with_suffix(".zip"), ("a", b"file"), ("a/b", b"below it"))
    assert "cannot be unpacked at 'a/b'" in refused(path)


def test_bombs_are_refused_before_a_byte_is_written(folder: Path) -> None:
    path = packed(folder.with_suffix(".zip"), ("adapter.safetensors", bytes(20 << 20)))
    text = refused(path)
    assert "would unpack to 1 files of 20,971,520 bytes" in text
    many = packed(
        folder.with_suffix(".zip"), *((str(i), b"") for i in range(archive.MOST_FILES + 1))
    )
    assert f"would unpack to {archive.MOST_FILES + 1} files" in refused(many)


def test_a_member_that_is_longer_than_it_says_is_refused(folder: Path) -> None:
    path = packed(folder.with_suffix(".zip"), ("adapter.json", bytes(5000)))
    content = bytearray(path.read_bytes())
    for start in (content.index(b"PK\x01\x02") + 24, 22):  # the sizes its two headers tell
        content[start : start + 4] = (10).to_bytes(4, "little")
    path.write_bytes(content)
    assert "cannot be unpacked at 'adapter.json'" in refused(path)


def test_encrypted_and_damaged_zips_are_refused(folder: Path) -> None:
    path = zipped(folder)
    content = bytearray(path.read_bytes())
    locked = bytearray(content)
    locked[locked.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(locked)
    assert "is encrypted" in refused(path)
    path.write_bytes(content[: len(content) // 2])
    assert "is damaged or no zip" in refused(path)
    flipped = bytearray(content)
    flipped[len(flipped) // 3] ^= 255
    path.write_bytes(flipped)
    assert "cannot be unpacked at" in refused(path)


def test_a_disk_without_room_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = zipped(folder)
    usage = shutil.disk_usage(folder)._replace(free=10)
    monkeypatch.setattr(archive.shutil, "disk_usage", lambda _: usage)
    assert "has 10 left" in refused(path)


@functools.cache
def made() -> tuple[bytes, Any, tuple[torch.Tensor, ...]]:
    """A good zip, a bare backbone, and what it gives with the adapter."""
    with tempfile.TemporaryDirectory() as place:
        model = HOME.fresh()
        attachment = randomise(mm.attach(model, mm.Bottleneck(2, at="vision.layers[0].mlp")))
        good = zipped(attachment.save(Path(place) / "a")).read_bytes()
    bare = HOME.fresh()
    outputs(bare)  # the first forward's check is gone then
    return good, bare, outputs(model)


NAMES = st.text(st.sampled_from("ab./\\:\x00é~"), min_size=1, max_size=8)
MODES = st.sampled_from(
    [0, 0o644, stat.S_IFREG | 0o644, stat.S_IFLNK | 0o777, stat.S_IFDIR | 0o755]
)
COST: Any = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}


@settings(max_examples=60, **COST)
@given(st.lists(st.tuples(NAMES, MODES, st.binary(max_size=20)), max_size=5))
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_whatever_a_zip_names_nothing_lands_outside(
    tmp_path: Path, own_temporary_folder: Path, members: list[tuple[str, int, bytes]]
) -> None:
    path = tmp_path / "fuzz.zip"
    with zipfile.ZipFile(path, "w") as made:
        for name, mode, content in members:
            made.writestr(member(name, mode), content)
    with zipfile.ZipFile(path) as made:
        names = made.namelist()  # as they are read: cut at a null byte
    try:
        with archive.unpacked(path) as place:
            assert place.parent == own_temporary_folder
            inside = [file for file in place.rglob("*") if file.is_file()]
            assert not any(file.is_symlink() for file in place.rglob("*"))
            assert len(inside) == sum(not name.endswith("/") for name in names)
    except AdapterFileError:
        pass
    assert unpacked() == []
    assert [file.name for file in tmp_path.rglob("*") if "fuzz" in file.name] == ["fuzz.zip"]


@settings(max_examples=60, **COST)
@given(st.data())
def test_a_zip_with_flipped_bytes_loads_rightly_or_not_at_all(
    tmp_path: Path, own_temporary_folder: Path, data: Any
) -> None:
    good, model, expected = made()
    place = data.draw(st.integers(0, len(good) - 1))
    length = data.draw(st.integers(1, 8))
    content = (
        good[:place]
        + data.draw(st.binary(min_size=length, max_size=length))
        + good[place + length :]
    )
    path = tmp_path / "fuzz.zip"
    path.write_bytes(content)
    before = state(model)
    try:
        mm.load_adapter(model, path)
    except AdapterFileError:
        assert state(model) == before
    else:
        assert_equal(outputs(model), expected)
        mm.detach(model)
    assert unpacked() == []
