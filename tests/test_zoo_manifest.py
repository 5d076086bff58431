"""The registry: what an entry has to say, where entries come from, how they are found, and the command line."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from downloads import entry
from hub import Hub
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import mmadapt as mm
from mmadapt import zoo
from mmadapt.cli import main
from mmadapt.core.known import KNOWN
from mmadapt.errors import WrongBackboneError, ZooError
from mmadapt.zoo import Entry, File, manifest
from mmadapt.zoo.entries import from_json
from mmadapt.zoo.files import require_inside

ROOT = Path(__file__).resolve().parent.parent
LICENCE = {"weights": "MIT", "declared_by": "test"}
PLAIN: dict[str, Any] = {
    "name": "lab/net",
    "summary": "a net",
    "builder": "timm:net",
    "source": {"urls": ["https://example.org/net.pth"]},
    "files": [{"path": "net.pth"}],
    "licence": LICENCE,
}


# -- the entries that come with mmadapt ---------------------------------------------------------------


def test_every_family_that_is_promised_is_there() -> None:
    families = {item.name.partition("/")[0] for item in manifest.shipped()}
    assert families >= {
        "ast", "clip", "dinov2", "hubert", "llama", "mms", "sam", "sam2", "siglip", "tiny", "vit",
        "wav2vec2", "wavlm", "whisper",
    }  # fmt: skip
    builders = {
        item.builder for item in manifest.shipped() if item.name.startswith("clip/vit-b-32")
    }
    assert builders == {"transformers:CLIPModel", "open_clip:ViT-B-32"}


@pytest.mark.parametrize("item", manifest.shipped(), ids=lambda item: item.name)
def test_every_entry_is_complete_and_claims_no_more_than_it_knows(item: Entry) -> None:
    assert item.summary and item.licence["weights"] and item.licence["declared_by"]
    assert from_json(item.to_json()) == item
    assert not item.revision or re.fullmatch("[0-9a-f]{40}", item.revision), "a branch is no pin"
    assert ("not pinned" in repr(item)) == (not item.pinned)
    if "restrict" in item.licence.get("note", "") or item.licence["weights"] == "GPL-3.0":
        assert item.licence["restrictions"]
    if item.base:
        assert zoo.entry(item.base).kind == "backbone"
    if item.kind == "backbone" and "manual" not in item.source:
        provider, _, argument = item.builder.partition(":")
        assert provider in ("transformers", "open_clip", "segment_anything", "timm")
        if provider == "transformers" and argument:
            assert any(name.endswith(f".{argument}") for name in KNOWN), "no anatomy describes it"
    if item.builder.startswith("interop:"):
        assert callable(getattr(mm.interop, item.builder.partition(":")[2]))


def test_the_pins_of_sam_are_those_that_its_authors_files_have() -> None:
    sizes = {item.name: item.size for item in zoo.list("sam/vit-?")}
    assert sizes == {"sam/vit-b": 375042383, "sam/vit-l": 1249524607, "sam/vit-h": 2564550879}
    assert all(item.pinned for item in zoo.list("sam/vit-?"))


def test_upstream_names_lead_to_entries() -> None:
    for alias, name in {
        "ViT-B-16:openai": "clip/vit-b-16/openai-open-clip",
        "openai/clip-vit-base-patch16": "clip/vit-b-16/openai",
        "sam_vit_b_01ec64.pth": "sam/vit-b",
        "openai/whisper-tiny": "whisper/tiny",
    }.items():
        assert zoo.entry(alias).name == name
    aliases = [alias for item in manifest.shipped() for alias in item.aliases]
    assert len(aliases) == len(set(aliases))


# -- finding ------------------------------------------------------------------------------------------


def test_lists_are_filtered_and_in_natural_order() -> None:
    names = [item.name for item in zoo.list("tiny/*", max_params="1M", licence="permissive")]
    assert names == ["tiny/ast", "tiny/llama"]
    assert {item.kind for item in zoo.list(kind="adapter")} == {"adapter"}
    assert [item.name for item in zoo.list("mms/*", licence="permissive")] == []
    assert [item.name for item in zoo.list("mms/*", licence="CC-BY-NC-4.0")] == ["mms/1b-all"]
    assert {item.name for item in zoo.list("tiny/*", cached=True)} == {
        item.name for item in zoo.list("tiny/*")
    }
    assert manifest._natural("b-2") < manifest._natural("b-16")
    few = zoo.list("tiny/*")[:2]
    assert repr(few).startswith("2 entries") and few[0].name == "tiny/ast"
    for wrong in ("many", "1.2.3M", "."):
        with pytest.raises(ZooError, match=f"max_params is '{wrong}'"):
            zoo.list(max_params=wrong)
    with pytest.raises(ZooError, match="kind is 'model'"):
        zoo.list(kind="model")


def test_an_adapter_for_another_backbone_is_refused_by_both_names() -> None:
    adapter = zoo.entry("sam/vit-b+med-sa/zoo")
    for name in ("sam/vit-b", "sam/vit-b/transformers"):
        adapter.require_base(zoo.entry(name))
    adapter.require_base(None)
    adapter.require_base(Entry("hf:org/sam", "", "", {"hf": "org/sam"}, licence=LICENCE))
    with pytest.raises(WrongBackboneError, match=r"made for sam/vit-b, this is sam/vit-h"):
        adapter.require_base(zoo.entry("sam/vit-h"))


def test_a_search_ranks_by_what_the_words_hit() -> None:
    assert zoo.search("whisper tiny")[0].name == "whisper/tiny"
    assert zoo.search("segmentation volume")[0].anatomy == "sam"
    assert "audio" in zoo.search("tagging")[0].modality
    assert zoo.search("xyzzy") == []


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("clip/vit-b16/openai", "clip/vit-b-16/openai"),
        ("clpi/vit-b-16/openai", "clip/vit-b-16/openai"),
        ("sam/vitb", "sam/vit-b"),
        ("wisper/tiny", "whisper/tiny"),
        ("tiny/lama", "tiny/llama"),
        ("sam_vit_b_01ec46.pth", "sam/vit-b"),
        ("Whisper/Small", "whisper/small"),
    ],
)
def test_a_mistyped_name_is_answered_with_at_most_three(typed: str, meant: str) -> None:
    with pytest.raises(ZooError) as told:
        zoo.entry(typed)
    near = re.findall(r"'([^']+)'", told.value.hint)
    assert near[0] == meant and len(near) <= 3


def test_a_hub_repository_is_told_how_it_is_written() -> None:
    with pytest.raises(ZooError, match="written 'hf:qqq/zzz'"):
        zoo.entry("qqq/zzz")


def test_an_entry_shows_its_terms() -> None:
    text = repr(zoo.entry("sam/vit-b"))
    assert "375.0 MB, licence Apache-2.0" in text and 'mmadapt.load("sam/vit-b")' in text
    assert "non-commercial use only" in repr(zoo.entry("mms/1b-all"))
    assert "access by request" in zoo.entry("llama/3.2-1b").terms()
    assert "<pre>" in zoo.entry("sam/vit-b")._repr_html_()


# -- one's own entries --------------------------------------------------------------------------------


def test_entries_are_registered_until_the_process_ends(empty_home: Path) -> None:
    item = zoo.register(from_json(PLAIN))
    assert zoo.entry("lab/net") is item
    with pytest.raises(ZooError, match=r"the zoo has lab/net already\n.*replace=True"):
        zoo.register(item)
    zoo.register(item, replace=True)
    with pytest.raises(ZooError, match="expected an Entry, got dict"):
        zoo.register(PLAIN)  # type: ignore[arg-type]


def test_manifests_of_the_environment_are_read_when_they_are_named(
    empty_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "own.json"
    other = {**PLAIN, "name": "tiny/clip", "summary": "ours"}
    own.write_text(json.dumps({"schema": 2, "entries": [PLAIN, other]}))
    monkeypatch.setenv("MMADAPT_ZOO", f"{own}{os.pathsep}")
    assert zoo.entry("lab/net").summary == "a net" and zoo.entry("tiny/clip").summary == "ours"
    monkeypatch.setenv("MMADAPT_ZOO", str(tmp_path / "none.json"))
    with pytest.raises(ZooError, match=r"none\.json cannot be read"):
        zoo.list()
    monkeypatch.delenv("MMADAPT_ZOO")
    assert zoo.entry("tiny/clip").summary != "ours"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"naem": 1}, "unknown field 'naem'\n.*did you mean 'name'"),
        ({"name": "Net"}, "'Net' is no zoo name"),
        ({"name": "lab/a--b"}, "is no zoo name"),
        ({"licence": {}}, "licence of the weights"),
        ({"licence": {"weights": "MIT"}}, "who says so"),
        ({"kind": "model"}, "expected 'backbone' or 'adapter'"),
        ({"source": {"ftp": "x"}}, "expected one of bundled, hf, manual, urls"),
        ({"source": {"urls": ["file:///etc/passwd"]}}, "start with https://"),
        ({"source": {"hf": "no-slash"}}, "org/repo"),
        ({"source": {"bundled": "../../etc"}}, "plain one inside"),
        ({"files": [{"path": "../../evil"}]}, "plain one inside"),
        ({"files": [{"path": "/etc/passwd"}]}, "plain one inside"),
        ({"files": [{"path": "C:\\\\x"}]}, "plain one inside"),
        ({"files": [{"path": "a", "size": -1}]}, "a count of bytes"),
        ({"files": [{"path": "a", "sha256": "XYZ"}]}, "hex digits"),
        ({"files": [{"path": "a", "digest": "0"}]}, "unknown field 'digest'"),
        ({"files": []}, "need the files they lead to"),
        ({"parameters": "many"}, "expected a count"),
        ({"aliases": "one"}, "no list of str"),
        ({"config": []}, "expected dict"),
    ],
)
def test_what_is_wrong_with_an_entry_is_named(change: dict[str, Any], told: str) -> None:
    with pytest.raises(ZooError, match=told):
        from_json({**PLAIN, **change})


def test_one_alias_without_a_list_is_not_taken_apart() -> None:
    with pytest.raises(ZooError, match="lab/net: aliases is 'net'.*\n.*list"):
        entry("https://lab.example/net.pth", aliases="net")


def test_what_is_wrong_with_a_manifest_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    for text, told in [
        ("{", "is no JSON"),
        ("[]", "holds no entries"),
        ('{"schema": 9, "entries": []}', "schema 9, this mmadapt reads up to 2\n.*upgrade"),
        ('{"schema": "2", "entries": []}', "schema '2'"),
        (json.dumps({"entries": [PLAIN, PLAIN]}), "names lab/net twice"),
        (json.dumps({"entries": [{"summary": "x"}]}), "expected an entry with a name"),
        (json.dumps({"entries": [{"name": "a/b"}]}), "a/b: no licence, source, summary"),
        ("[" * 100_000, "is no JSON"),
    ]:
        path.write_text(text)
        with pytest.raises(ZooError, match=told):
            manifest.read_manifest(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
FIELDS = [*PLAIN, "aliases", "kind", "parameters", "revision", "config", "globals", "requires"]


@settings(max_examples=150, deadline=None)
@example({"summary": ""}, set())
@given(st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=4), st.sets(st.sampled_from(FIELDS)))
def test_invented_entries_are_whole_or_refused_cleanly(
    changes: dict[str, Any], dropped: set[str]
) -> None:
    data = {key: value for key, value in {**PLAIN, **changes}.items() if key not in dropped}
    try:
        item = from_json(data)
    except ZooError:
        return
    assert from_json(json.loads(json.dumps(item.to_json()))) == item
    assert repr(item) and item.card()


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode()))
def test_invented_manifests_are_refused_cleanly(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.json"
    path.write_bytes(content)
    with contextlib.suppress(ZooError):  # and no other error
        manifest.read_manifest(path)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=20) | st.lists(st.sampled_from(["a", "..", ".", "", "/", "\\", "b.pth"]), max_size=5).map("/".join))  # fmt: skip
def test_paths_that_are_let_through_stay_inside(path: str) -> None:
    try:
        require_inside(path)
    except ZooError:
        return
    base = Path("/root-of-all/folder")
    assert Path(os.path.normpath(base / path)).is_relative_to(base) and Path(path) != Path(".")


# -- the command line ----------------------------------------------------------------------------------


def test_each_action_speaks_json(
    hub: Hub, empty_home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.add("org/model", {"config.json": b"{}", "model.safetensors": b"x" * 2000})

    def said(*arguments: str) -> Any:
        assert main(["zoo", *arguments, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    assert [item["name"] for item in said("list", "tiny/c*")] == ["tiny/clip", "tiny/ctc"]
    assert said("search", "whisper", "tiny")[0]["name"] == "whisper/tiny"
    assert said("show", "sam/vit-b")["pinned"] is True
    folder = said("get", "hf:org/model", "--quiet")["hf:org/model"]
    assert Path(folder, "model.safetensors").exists()
    assert {row["state"] for row in said("verify", "hf:org/model")} == {"sound"}
    assert said("where")["downloads"][0]["name"] == "hf:org/model"
    assert said("rm", "hf:org/*")[0]["name"] == "hf:org/model" and Path(folder).exists()
    said("rm", "hf:org/*", "--yes")
    assert not Path(folder).exists()
    (tmp_path / "given").mkdir()
    (tmp_path / "given" / "config.json").write_text("{}")
    (tmp_path / "given" / "model.safetensors").write_bytes(b"x")
    assert said("import", str(tmp_path / "given"), "--as", "hf:org/model")["folder"]
    assert said("list", "tiny/*", "--cached")[0]["name"] == "tiny/ast"


def test_exit_codes_tell_what_went_wrong(
    hub: Hub, empty_home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.add("org/closed", {"config.json": b"{}", "model.safetensors": b"x"}, gated=True)
    hub.add("org/open", {"config.json": b"{}", "model.safetensors": b"x" * 2000})
    assert main(["zoo", "show", "no/such"]) == 2
    assert main(["zoo", "get", "hf:org/open", "--offline"]) == 3
    hub.faults.instead = {"model.safetensors": b"y" * 2000}
    assert main(["zoo", "get", "hf:org/open", "--quiet"]) == 4
    hub.faults.instead = {}
    assert main(["zoo", "get", "hf:org/closed", "--quiet"]) == 6
    blocked = empty_home.parent / "blocked"
    blocked.parent.mkdir(parents=True, exist_ok=True)
    blocked.write_text("")
    assert main(["zoo", "get", "hf:org/open", "--quiet", "--to", str(blocked)]) == 5
    capsys.readouterr()
    assert main(["zoo", "get", "no/such", "hf:org/open"]) == 2  # the second is fetched all the same
    captured = capsys.readouterr()
    assert Path(captured.out.strip(), "model.safetensors").exists()
    assert "hf:org/open: 2 kB, licence unknown" in captured.err and "the zoo has no" in captured.err
    folder = Path(captured.out.strip())
    (folder / "model.safetensors").write_bytes(b"z" * 2000)
    assert main(["zoo", "verify", "hf:org/open"]) == 4


def test_output_that_nobody_reads_to_the_end_is_no_error() -> None:
    command = f"{sys.executable} -m mmadapt zoo list | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.stderr == "" and "entries" in done.stdout


# -- scripts for maintainers and clusters ---------------------------------------------------------------


def script(path: str) -> Any:
    """A script of the repository as a module."""
    spec = importlib.util.spec_from_file_location(f"script_{Path(path).stem}", ROOT / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_maintainer_fills_pins_from_the_hub(
    hub: Hub, empty_home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commit = hub.add("org/model", {"config.json": b"{}", "model.safetensors": b"x" * 100,
                                   "README.md": b"---\nlicense: gpl-3.0\n---\n"})  # fmt: skip
    hub.plain["/net.pth"] = b"n" * 70
    entries = [
        Entry("lab/a", "a", "folder", {"hf": "org/model"}, (), LICENCE),
        Entry(
            "lab/b", "b", "timm:x", {"urls": [f"{hub.url}/net.pth"]}, (File("net.pth"),), LICENCE
        ),
        Entry("lab/c", "c", "folder", {"hf": "org/none"}, (), LICENCE),
        Entry("lab/d", "d", "folder", {"manual": "https://x"}, (), LICENCE),
    ]
    path = tmp_path / "m.json"
    path.write_text(json.dumps({"schema": 2, "entries": [item.to_json() for item in entries]}))
    assert script("zoo/pin.py").main(["--manifest", str(path)]) == 1
    said = capsys.readouterr()
    assert "left as it was: lab/c" in said.err and "hub says gpl-3.0, the manifest MIT" in said.out
    found = {item.name: item for item in manifest.read_manifest(path)}
    assert found["lab/a"].revision == commit and found["lab/a"].pinned
    assert {file.path for file in found["lab/a"].files} == {
        "config.json", "model.safetensors", "README.md"
    }  # fmt: skip
    assert found["lab/b"].size == 70 and found["lab/b"].pinned
    assert found["lab/c"] == entries[2] and found["lab/d"] == entries[3]
    zoo.register(found["lab/a"])
    hub.requests.clear()
    zoo.get("lab/a", progress=False)
    assert not any("/api/" in request.path for request in hub.requests)


def test_a_file_is_pinned_as_it_lies_here() -> None:
    weights = next(f for f in zoo.entry("tiny/clip").files if f.role == "weights")
    assert File.of(manifest.data_folder() / "tiny" / "clip" / weights.path) == weights
    assert (
        File.of(manifest.data_folder() / "tiny" / "clip" / "open_clip_config.json").role == "config"
    )


def test_the_tiny_weights_are_pinned_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    path.write_bytes((ROOT / "zoo" / "manifest.json").read_bytes())
    assert script("zoo/pin.py").main(["tiny/*", "--manifest", str(path)]) == 0
    assert path.read_bytes() == (ROOT / "zoo" / "manifest.json").read_bytes()


def test_a_login_node_fills_a_root_without_installing_anything(
    hub: Hub, empty_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/model", {"config.json": b"{}", "model.safetensors": b"x" * 100})
    names = tmp_path / "names.txt"
    names.write_text("hf:org/model   # ours\n\n")
    command = [sys.executable, "-S", str(ROOT / "zoo" / "get.py"), "--to", str(tmp_path / "shared")]
    done = subprocess.run(
        [*command, "--list", str(names)], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert f"export MMADAPT_ZOO_PATH={tmp_path / 'shared'}" in done.stdout
    monkeypatch.setenv("MMADAPT_ZOO_PATH", str(tmp_path / "shared"))
    assert zoo.get("hf:org/model", offline=True).is_relative_to(tmp_path / "shared")


# -- the page --------------------------------------------------------------------------------------------


def test_the_page_shows_the_entries_and_numbers_that_are_committed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    page = (ROOT / "docs" / "zoo.md").read_text()
    from pages import fill

    assert fill(page, {"entries": script("zoo/recipes/zoo_table.py").table()}) == page
    benchmark = script("benchmarks/zoo_load.py")
    results = json.loads((ROOT / "benchmarks" / "zoo_load.json").read_text())
    assert fill(page, {"load": benchmark.table(results)}) == page
    rows = {(row["model"], row["way"]): row for row in results["rows"]}
    for model in ("SAM ViT-H", "CLIP ViT-B/32, open_clip"):  # at the speed of the disk
        assert rows[model, "zoo"]["cpu"] < 0.25 * rows[model, "library"]["cpu"]
