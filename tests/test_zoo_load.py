"""From a name to a model: real formats, from a real server, mapped, and nothing run that a file holds."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import pickle
import shutil
import subprocess
import sys
import threading
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from backbones import hf_clip, hf_vit, segment_anything
from hub import Hub
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import mmadapt as mm
from mmadapt.errors import ChecksumError, MissingDependencyError, ZooError
from mmadapt.zoo import Entry, File, register, weights
from mmadapt.zoo.manifest import data_folder
from mmadapt.zoo.obtain import get

LICENCE = {"weights": "MIT", "declared_by": "test"}


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def pictures(side: int = 40) -> numpy.ndarray:
    return numpy.random.default_rng(0).integers(0, 256, (2, side, side, 3), dtype=numpy.uint8)


@pytest.fixture(scope="module")
def vit_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small transformers ViT with its image processor, as a repository has it."""
    folder = tmp_path_factory.mktemp("vit")
    model: Any = hf_vit()
    model.save_pretrained(folder)
    side = model.config.image_size
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": side, "width": side},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "rescale_factor": 1 / 255,
        "resample": 2,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


@pytest.fixture(scope="module")
def timm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small timm ViT as timm pushes it to the hub."""
    import timm

    folder = tmp_path_factory.mktemp("timm")
    arguments = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 32, "patch_size": 8}
    torch.manual_seed(1)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=5, **arguments)
    save_file(model.state_dict(), folder / "model.safetensors")
    config = {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 5,
        "model_args": arguments,
        "pretrained_cfg": {"input_size": [3, 32, 32], "mean": [0.1] * 3, "std": [0.5] * 3,
                           "num_classes": 5, "crop_pct": 1.0, "interpolation": "bicubic"},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def is_mapped(path: Path) -> bool:
    """Whether this process reads the file through the address space, not from a copy of it."""
    return str(path.resolve()) in Path("/proc/self/maps").read_text()


# -- providers, from the hub --------------------------------------------------------------------------


def test_a_transformers_model_comes_from_the_hub_with_its_preprocessing(
    hub: Hub, empty_home: Path, vit_folder: Path
) -> None:
    commit = hub.add("org/vit", files_of(vit_folder))
    state = torch.get_rng_state()
    vit = mm.load(f"hf:org/vit@{commit}", progress=False)
    assert torch.equal(torch.get_rng_state(), state) and not vit.model.training
    assert vit.entry.name == "hf:org/vit" and vit.entry.revision == commit
    weights_file = (vit_folder / "model.safetensors").read_bytes()
    assert vit.entry.sha256 == hashlib.sha256(weights_file).hexdigest()
    assert vit.preprocess is not None
    pixels = vit.preprocess(pictures())
    side = vit.model.config.image_size  # type: ignore[union-attr]
    assert pixels.shape == (2, 3, side, side) and -1 <= pixels.min() < pixels.max() <= 1
    with torch.no_grad():
        own: Any = mm.load(vit_folder).model
        assert torch.equal(vit(pixels).last_hidden_state, own(pixels).last_hidden_state)


def test_transformers_itself_loads_the_same_repository(
    hub: Hub, empty_home: Path, online: None, vit_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    hub.add("org/vit", files_of(vit_folder))
    with own_endpoint(hub, monkeypatch):
        model = transformers.ViTModel.from_pretrained("org/vit", cache_dir=empty_home)
    mine = mm.load("hf:org/vit", progress=False).model
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), mine.parameters(), strict=True)
    )


@contextlib.contextmanager
def own_endpoint(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """huggingface_hub reads its endpoint at import; here it is the local server."""
    import huggingface_hub.constants as constants

    with monkeypatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield


def test_open_clip_loads_from_the_hub_itself_and_through_the_zoo(
    hub: Hub, empty_home: Path, online: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import open_clip

    files = files_of(data_folder() / "tiny" / "clip")
    files["open_clip_model.safetensors"] = files["model.safetensors"]
    files["model.safetensors"] = b"what timm would read, and open_clip does not"
    hub.add("org/clip", files)
    with own_endpoint(hub, monkeypatch):
        model = open_clip.create_model("hf-hub:org/clip", cache_dir=str(empty_home))
    pixels = torch.rand(2, 3, 32, 32)
    register(
        Entry("lab/clip", "", "open_clip:tiny", {"hf": "org/clip"}, (
            File("open_clip_config.json", "config"), File("open_clip_model.safetensors")
        ), LICENCE, config={"model_cfg": {"quick_gelu": False}})
    )  # fmt: skip
    with torch.no_grad():
        for name in ("hf:org/clip", "lab/clip"):
            mine = mm.load(name, progress=False)
            assert torch.equal(model.eval().encode_image(pixels), mine.model.encode_image(pixels))  # type: ignore[operator]
            assert mine.tokenize is not None and mine.tokenize("a red circle").shape == (1, 20)


def test_a_vocabulary_of_its_own_and_the_licence_come_along(hub: Hub, empty_home: Path) -> None:
    page = b"---\nlicense: cc-by-4.0\n---\n"
    hub.add("org/clip", {**files_of(data_folder() / "tiny" / "clip"), "README.md": page})
    clip, original = mm.load("hf:org/clip", progress=False), mm.load("tiny/clip")
    words = "a red circle beside a seven"
    assert clip.tokenize is not None and original.tokenize is not None
    assert torch.equal(clip.tokenize(words), original.tokenize(words))
    licence = clip.entry.licence
    assert licence["weights"] == "cc-by-4.0" and licence["declared_by"] == "its page on the hub"


def test_an_entry_may_correct_the_configuration_of_open_clip(hub: Hub, empty_home: Path) -> None:
    hub.add("org/clip", files_of(data_folder() / "tiny" / "clip"))
    facts: dict[str, Any] = {"config": {"model_cfg": {"quick_gelu": True}}}
    register(Entry("lab/quick", "", "open_clip:tiny", {"hf": "org/clip"}, (), LICENCE, **facts))
    found = {
        type(module).__name__ for module in mm.load("lab/quick", progress=False).model.modules()
    }
    assert "QuickGELU" in found


def test_timm_loads_from_the_hub_itself_and_through_the_zoo(
    hub: Hub, empty_home: Path, online: None, timm_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import timm

    hub.add("org/timm", files_of(timm_folder))
    with own_endpoint(hub, monkeypatch):
        monkeypatch.setattr(torch.hub, "get_dir", lambda: str(empty_home))
        model = timm.create_model("hf-hub:org/timm", pretrained=True).eval()
    mine = mm.load("hf:org/timm", progress=False)
    pixels = mine.preprocess(pictures())  # type: ignore[misc]
    assert pixels.shape == (2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(pixels), mine.model(pixels))
    assert mine.anatomy is not None and mine.anatomy.family == "timm-vit"
    assert "mean=" in repr(mine.preprocess)


def test_a_pickled_checkpoint_of_segment_anything_is_mapped_into_an_empty_model(
    hub: Hub, empty_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import segment_anything as library

    monkeypatch.setitem(
        library.sam_model_registry, "small", lambda checkpoint=None: segment_anything()
    )
    torch.manual_seed(3)
    original = segment_anything()
    torch.save(original.state_dict(), tmp_path / "sam.pth")
    hub.plain["/sam.pth"] = (tmp_path / "sam.pth").read_bytes()
    source = {"urls": [f"{hub.url}/sam.pth"]}
    register(Entry("lab/sam", "", "segment_anything:small", source, (File("sam.pth"),), LICENCE))
    state = torch.get_rng_state()
    sam = mm.load("lab/sam", progress=False)
    assert torch.equal(torch.get_rng_state(), state) and not sam.model.training
    assert is_mapped(get("lab/sam") / "sam.pth")
    own = original.state_dict()
    assert all(torch.equal(value, own[key]) for key, value in sam.model.state_dict().items())
    mean: Any = sam.model.pixel_mean
    assert mean.flatten().tolist() == pytest.approx([123.675, 116.28, 103.53])  # in no file
    assert all(p.requires_grad for p in sam.model.parameters())
    register(Entry("lab/odd", "", "segment_anything:odd", source, (File("sam.pth"),), LICENCE))
    with pytest.raises(ZooError, match="segment_anything has no 'odd'"):
        mm.load("lab/odd", progress=False)


def test_precision_and_device_are_chosen_at_load(timm_folder: Path, vit_folder: Path) -> None:
    for folder in (timm_folder, vit_folder, data_folder() / "tiny" / "clip"):
        model = mm.load(folder, dtype="bf16", device="cpu").model
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert next(mm.load("tiny/sam", dtype=torch.float64).model.parameters()).dtype == torch.float64
    with pytest.raises(ZooError, match=r"dtype is 'bf61'.*\n.*did you mean 'bf16'"):
        mm.load("tiny/clip", dtype="bf61")
    with pytest.raises(ZooError, match="expected a floating dtype"):
        mm.load("tiny/clip", dtype=torch.int8)


def test_safetensors_of_the_models_precision_are_mapped_not_copied(timm_folder: Path) -> None:
    model = mm.load(timm_folder).model
    assert is_mapped(timm_folder / "model.safetensors")
    with torch.no_grad():  # written to memory, never to the file
        before = (timm_folder / "model.safetensors").read_bytes()
        next(model.parameters()).add_(1)
    assert (timm_folder / "model.safetensors").read_bytes() == before


def test_an_adapter_is_no_backbone() -> None:
    with pytest.raises(ZooError, match=r"is an adapter for llama/7b\n.*load_adapter"):
        mm.load("llama/7b+llama-adapter/v1")


def test_missing_providers_are_named(
    hub: Hub, empty_home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "segment_anything", None)
    register(
        Entry("lab/sam", "", "segment_anything:vit_b", {"manual": "x"}, (File("s.pth"),), LICENCE)
    )
    (tmp_path / "s.pth").write_bytes(b"x")
    mm.zoo.import_file(tmp_path / "s.pth", "lab/sam")
    with pytest.raises(MissingDependencyError, match=r"pip install 'mmadapt\[sam\]'"):
        mm.load("lab/sam")


# -- empty models ------------------------------------------------------------------------------------


class Masked(nn.Module):
    """Buffers in the file and beside it, as CLIP and SAM have them."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.register_buffer("mask", torch.triu(torch.ones(2, 2)), persistent=False)
        self.register_buffer("kept", torch.zeros(2))


def test_buffers_are_real_where_parameters_are_empty() -> None:
    state = torch.get_rng_state()
    with weights.without_values():
        model = Masked()
        assert nn.Linear(2, 2).weight.is_meta
    assert torch.equal(torch.get_rng_state(), state)
    assert model.linear.weight.is_meta and torch.equal(model.mask, torch.triu(torch.ones(2, 2)))  # type: ignore[arg-type]
    assert not nn.Linear(2, 2).weight.is_meta
    tensors = {
        "linear.weight": torch.ones(2, 3),
        "linear.bias": torch.ones(2),
        "kept": torch.ones(2),
    }
    weights.fill(model, tensors, Path("file"))
    assert torch.equal(model.kept, torch.ones(2)) and model.linear.weight.requires_grad  # type: ignore[arg-type]


def test_an_error_while_building_leaves_torch_as_it_was() -> None:
    with pytest.raises(ValueError, match="stop"), weights.without_values():
        raise ValueError("stop")
    assert not nn.Linear(2, 2).weight.is_meta


def test_models_that_two_threads_build_at_once_leave_torch_as_it_was() -> None:
    inside, entered, leave = threading.Event(), threading.Event(), threading.Event()

    def build_first() -> None:
        with weights.without_values():
            inside.set()
            leave.wait(10)

    def build_second() -> None:
        inside.wait(10)
        with weights.without_values():
            entered.set()
            first.join(10)
            assert nn.Linear(2, 2).weight.is_meta

    original = nn.Module.register_parameter
    first, second = (threading.Thread(target=each) for each in (build_first, build_second))
    first.start()
    second.start()
    assert not entered.wait(0.2)
    leave.set()
    second.join(10)
    assert entered.is_set() and nn.Module.register_parameter is original


def test_what_does_not_fit_is_listed_and_nothing_is_left_empty() -> None:
    with weights.without_values():
        model = Masked()
    tensors = {"linear.weight": torch.ones(2, 4), "extra": torch.ones(1)}
    with pytest.raises(ZooError) as told:
        weights.fill(model, tensors, Path("file"))
    text = str(told.value)
    for part in ("linear.bias", "extra", "linear.weight", "[2, 4]", "does not fit a Masked"):
        assert part in text
    with weights.without_values():
        model = Masked()
    model._buffers["mask"] = torch.empty(2, 2, device="meta")
    tensors = {
        "linear.weight": torch.ones(2, 3),
        "linear.bias": torch.ones(2),
        "kept": torch.ones(2),
    }
    with pytest.raises(ZooError, match="left 1 tensors of Masked without values: mask"):
        weights.fill(model, tensors, Path("file"))


# -- files that are not what they seem ---------------------------------------------------------------


class Evil:
    """Runs a command where it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> Any:
        return exec, (f"open({str(self.place)!r}, 'w')",)


def test_code_in_a_checkpoint_is_named_and_not_run(tmp_path: Path) -> None:
    for legacy in (False, True):
        path, mark = tmp_path / f"evil{legacy}.pth", tmp_path / "ran"
        torch.save({"a": Evil(mark)}, path, _use_new_zipfile_serialization=not legacy)
        with pytest.raises(ZooError, match=r"exec.*\n.*safetensors"):
            weights.read(path)
        with pytest.raises(ZooError, match="exec"):
            weights.read(path, ["argparse.Namespace"])
        assert not mark.exists()


def test_a_class_is_read_only_where_the_entry_names_it(tmp_path: Path) -> None:
    import argparse

    path = tmp_path / "with_arguments.pth"
    torch.save({"model": torch.ones(2), "args": argparse.Namespace(a=1)}, path)
    with pytest.raises(ZooError, match=r"names argparse\.Namespace, which could run code; nothing"):
        weights.read(path)
    with pytest.raises(ZooError, match="holds no plain table of tensors: model, args"):
        weights.read(path, ["argparse.Namespace"])


def test_folders_of_others_are_looked_through_before_their_library_opens_them(
    vit_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_bytes((vit_folder / "config.json").read_bytes())
    torch.save({"a": Evil(tmp_path / "ran")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ZooError, match="exec"):
        mm.load(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_what_a_trainer_leaves_beside_the_weights_does_not_matter(
    vit_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(vit_folder, tmp_path / "checkpoint-500")
    for name in ("training_args.bin", "optimizer.pt", "rng_state.pth"):
        torch.save({"a": Evil(tmp_path / "ran")}, folder / name)
    assert mm.load(folder).anatomy is not None
    assert not (tmp_path / "ran").exists()


def test_a_tensor_of_another_shape_is_refused_for_transformers_too(
    vit_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(vit_folder, tmp_path / "vit")
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name, tensor in tensors.items() if tensor.ndim == 2)
    save_file({**tensors, name: torch.zeros(3, 3)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ZooError, match="transformers cannot load"):
        mm.load(folder)


def test_old_checkpoints_without_a_zip_are_read(tmp_path: Path) -> None:
    path = tmp_path / "old.pth"
    torch.save(OrderedDict(a=torch.arange(3.0)), path, _use_new_zipfile_serialization=False)
    assert weights.read(path)["a"].tolist() == [0, 1, 2]


def test_torchscript_is_refused_as_code(tmp_path: Path) -> None:
    path = tmp_path / "ViT-B-32.pt"
    with zipfile.ZipFile(path, "w") as archive:  # how such archives are laid out
        for name in ("data.pkl", "constants.pkl", "code/__torch__.py"):
            archive.writestr(f"ViT-B-32/{name}", b"")
    with pytest.raises(ZooError, match="is a TorchScript archive, which is code"):
        weights.read(path)


def test_a_zip_bomb_is_refused_by_its_directory(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(10)}, tmp_path / "fine.pth")
    with zipfile.ZipFile(tmp_path / "fine.pth") as fine:
        bomb = tmp_path / "bomb.pth"
        with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as out:
            for item in fine.infolist():
                content = fine.read(item)
                out.writestr(
                    item.filename,
                    content + b"\0" * (50_000_000 if "data/0" in item.filename else 0),
                )
    assert bomb.stat().st_size < 200_000
    with pytest.raises(ChecksumError, match="promises more than its"):
        weights.read(bomb)


def _safetensors() -> bytes:
    from safetensors.torch import save

    return save({"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.float16)})


def _checkpoint() -> bytes:
    buffer = io.BytesIO()
    torch.save({"a": torch.arange(6.0), "b": torch.ones(4)}, buffer)
    return buffer.getvalue()


CHANGES = st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), max_size=6)
ANYTHING = {"suppress_health_check": [HealthCheck.function_scoped_fixture], "deadline": None}


def changed(content: bytes, changes: list[tuple[int, int]], keep: int) -> bytes:
    """The content, cut after `keep` bytes, with some bytes replaced."""
    data = bytearray(content[:keep])
    for place, value in changes:
        if data:
            data[place % len(data)] = value
    return bytes(data)


@settings(max_examples=60, **ANYTHING)
@given(CHANGES, st.integers(0, 400))
def test_damaged_safetensors_are_refused_cleanly(
    tmp_path: Path, changes: list[tuple[int, int]], keep: int
) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(changed(_safetensors(), changes, keep))
    with contextlib.suppress(ZooError):
        weights.read(path)


@settings(max_examples=60, **ANYTHING)
@given(
    st.dictionaries(
        st.text(max_size=5),
        st.one_of(
            st.none(),
            st.integers(),
            st.text(max_size=5),
            st.fixed_dictionaries(
                {
                    "dtype": st.sampled_from(["F32", "F16", "X", ""]),
                    "shape": st.lists(st.integers(-(2**63), 2**64), max_size=3),
                    "data_offsets": st.lists(st.integers(-5, 2**65), max_size=3),
                }
            ),
        ),
        max_size=4,
    ),
    st.integers(0, 2**64 - 1) | st.just(-1),
    st.binary(max_size=40),
)
def test_invented_safetensors_headers_are_refused_cleanly(
    tmp_path: Path, header: dict[str, Any], length: int, data: bytes
) -> None:
    text = json.dumps(header).encode()
    size = len(text) if length < 0 else length
    path = tmp_path / "w.safetensors"
    path.write_bytes(size.to_bytes(8, "little") + text + data)
    with contextlib.suppress(ZooError):
        weights.read(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@settings(max_examples=60, **ANYTHING)
@given(CHANGES, st.integers(0, 1500))
def test_damaged_checkpoints_are_refused_cleanly(
    tmp_path: Path, changes: list[tuple[int, int]], keep: int
) -> None:
    path = tmp_path / "w.pth"
    path.write_bytes(changed(_checkpoint(), changes, keep))
    with contextlib.suppress(ZooError):
        weights.read(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@settings(max_examples=40, **ANYTHING)
@given(st.recursive(st.none() | st.booleans() | st.floats() | st.text(max_size=4),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
                    max_leaves=8))  # fmt: skip
def test_pickles_of_anything_are_tensors_or_refused(tmp_path: Path, value: Any) -> None:
    path = tmp_path / "w.bin"
    path.write_bytes(pickle.dumps(value))
    with contextlib.suppress(ZooError):
        assert all(hasattr(v, "shape") for v in weights.read(path).values())


def test_a_listing_needs_no_torch_and_a_load_no_network(tmp_path: Path) -> None:
    code = (
        "import sys, mmadapt as mm\n"
        "mm.zoo.list(); mm.zoo.search('clip'); mm.zoo.entry('sam/vit-b'); mm.zoo.cached(); mm.zoo.where()\n"
        "mm.zoo.get('tiny/clip')\n"
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False)
    assert done.returncode == 0


def test_hf_clip_keeps_its_values_through_a_folder(tmp_path: Path) -> None:
    model: Any = hf_clip()
    model.save_pretrained(tmp_path)
    mine = mm.load(tmp_path).model.state_dict()
    assert all(torch.equal(value, mine[key]) for key, value in model.state_dict().items())
