"""Adapter files over time and trouble: old schemas, broken bytes, processes that die while saving."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import BACKBONES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from snapshot import assert_same_values, randomise, state, values

import mmadapt as mm
from mmadapt.errors import AdapterFileError

GOLDEN = sorted((Path(__file__).parent / "golden").glob("schema-*"))
#: what a schema's own file does not hold: methods whose files changed behind it
METHODS = sorted((Path(__file__).parent / "golden").glob("methods-*"))
TINY = BACKBONES["open_clip"]


def filled() -> Any:
    """The backbone the golden files were made for: values by a formula, not by a library's start."""
    model = TINY.fresh()
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            numbers = torch.arange(parameter.numel(), dtype=torch.float32)
            parameter.copy_(((numbers * 0.37 + index).sin() * 0.1).view(parameter.shape))
    return model


@pytest.mark.parametrize("folder", [*GOLDEN, *METHODS], ids=lambda folder: folder.name)
def test_files_of_every_schema_still_load_and_mean_the_same(folder: Path) -> None:
    model = filled()
    attachment = mm.load_adapter(model, folder)
    assert attachment.name == "golden"
    assert attachment.metadata == {"licence": "Apache-2.0", "metrics": {"accuracy": 0.5}}
    expected = load_file(folder / "outputs.safetensors")
    with torch.no_grad():
        for index, output in enumerate(TINY.outputs(model)):
            assert torch.allclose(output, expected[f"output {index}"], atol=1e-5)


def test_there_is_a_golden_file_for_every_schema() -> None:
    from mmadapt.core.store import SCHEMA

    assert [folder.name for folder in GOLDEN] == [f"schema-{n + 1}" for n in range(SCHEMA)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    model = TINY.fresh()
    randomise(mm.attach(model, mm.LoRA(2)))
    folder = mm.save(model, tmp_path_factory.mktemp("saved"))
    return (folder / "adapter.json").read_bytes(), (folder / "adapter.safetensors").read_bytes()


def load_broken(folder: Path, manifest: bytes, tensors: bytes) -> None:
    """Either it loads, or an explained error leaves the model untouched; nothing else may happen."""
    folder.mkdir(exist_ok=True)
    (folder / "adapter.json").write_bytes(manifest)
    (folder / "adapter.safetensors").write_bytes(tensors)
    model = TINY.fresh()
    before, kept = state(model), values(model)
    refused = None
    try:
        mm.load_adapter(model, folder)
    except AdapterFileError as error:  # any other exception fails the test
        refused = error
    if refused:
        assert state(model) == before
        assert_same_values(kept, values(model))


FUZZ = settings(
    max_examples=120,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@FUZZ
@given(data=st.data())
def test_no_bytes_of_the_tensor_file_break_more_than_loading(
    data: st.DataObject, saved: tuple[bytes, bytes], tmp_path: Path
) -> None:
    manifest, tensors = saved
    broken = bytearray(tensors)
    header = int.from_bytes(tensors[:8], "little") + 8
    for _ in range(data.draw(st.integers(1, 4))):
        broken[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    load_broken(tmp_path / "adapter", manifest, bytes(broken))


@FUZZ
@given(length=st.floats(0, 1))
def test_no_truncation_breaks_more_than_loading(
    length: float, saved: tuple[bytes, bytes], tmp_path: Path
) -> None:
    manifest, tensors = saved
    load_broken(tmp_path / "adapter", manifest, tensors[: int(length * (len(tensors) - 1))])


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 5)
    | st.floats(allow_nan=False)
    | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


@FUZZ
@given(data=st.data())
def test_no_manifest_breaks_more_than_loading(
    data: st.DataObject, saved: tuple[bytes, bytes], tmp_path: Path
) -> None:
    import json

    from safetensors.torch import load, save

    manifest = json.loads(saved[0])
    place: Any = manifest
    while isinstance(place, dict) and place:  # put something else somewhere in the tree
        key = data.draw(st.sampled_from(sorted(place)))
        if not isinstance(place[key], (dict, list)) or data.draw(st.booleans()):
            place[key] = data.draw(JSON)
            break
        place = place[key][0] if isinstance(place[key], list) and place[key] else place[key]
    text = json.dumps(manifest)
    load_broken(tmp_path / "adapter", text.encode(), save(load(saved[1]), {"mmadapt": text}))


SAVER = """
import sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from backbones import BACKBONES
import mmadapt as mm
model = BACKBONES["open_clip"].fresh()
attachment = mm.attach(model, mm.LoRA(2))
count = 0
while True:
    count += 1
    with torch.no_grad():
        for parameter in attachment.parameters():
            parameter.fill_(count)
    mm.save(model, {folder!r}, metrics={{"count": count}})
    print(count, flush=True)
"""


@pytest.mark.parametrize("lines", [1, 3, 8])
def test_a_save_that_is_killed_leaves_the_old_adapter_or_the_new_one(
    tmp_path: Path, lines: int
) -> None:
    folder = tmp_path / "adapter"
    code = SAVER.format(tests=str(Path(__file__).parent), folder=str(folder))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    last = [int(process.stdout.readline()) for _ in range(lines)][-1]
    os.kill(process.pid, signal.SIGKILL)  # somewhere within the next saves
    process.wait()
    process.stdout.close()
    model = TINY.fresh()
    attachment = mm.load_adapter(model, folder)
    count = attachment.metadata["metrics"]["count"]
    assert count >= last
    assert all(bool((parameter == count).all()) for parameter in attachment.parameters())
