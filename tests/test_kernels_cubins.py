"""Compiled kernels kept on disk: what is read back, what is compiled again, and what never fails a run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from mmadapt.kernels.cuda import compiler, cubins
from mmadapt.kernels.cuda.compiler import Compiled

CODE = Compiled(b"\x7fELF" + bytes(range(256)) * 40 + b"\n", "_Z1f")
WHAT = ("bottleneck_forward<1>", "sm_90a")


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was compiled, in the compiler's place."""
    calls: list[str] = []

    def compile_(expression: str, architecture: str) -> Compiled:
        calls.append(expression)
        return CODE

    monkeypatch.setattr(compiler, "compile_", compile_)
    monkeypatch.setattr(compiler, "version", lambda: (13, 0))
    return calls


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MMADAPT_CUBINS", str(tmp_path / "cubins"))
    cubins._say_once.cache_clear()
    return tmp_path / "cubins"


def test_compiled_once_and_then_read(compiled: list[str], place: Path) -> None:
    assert [cubins.kept(*WHAT) for _ in range(3)] == [CODE] * 3
    assert compiled == [WHAT[0]]
    (file,) = place.iterdir()
    assert file.name == f"{cubins.digest(*WHAT)}.kernel"


def cut(data: bytes) -> bytes:
    return data[:-100]


def changed(data: bytes) -> bytes:
    return data[:-50] + bytes([data[-50] ^ 1]) + data[-49:]


def longer(data: bytes) -> bytes:
    return data + b"\0"


def other_kind(data: bytes) -> bytes:
    return b"\x80\x04K\x01." + data  # a pickle's first bytes


def without_digest(data: bytes) -> bytes:
    head, _, code = data.partition(b"\n")
    return (
        json.dumps({k: v for k, v in json.loads(head).items() if k != "sha256"}).encode()
        + b"\n"
        + code
    )


@pytest.mark.parametrize(
    "damage", [cut, changed, longer, other_kind, without_digest, lambda data: b""]
)
def test_a_damaged_file_is_compiled_again_and_mended(
    damage: Callable[[bytes], bytes], compiled: list[str], place: Path
) -> None:
    cubins.kept(*WHAT)
    (file,) = place.iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert cubins.read(file) is None
    assert cubins.kept(*WHAT) == CODE
    assert len(compiled) == 2
    assert file.read_bytes() == whole
    assert [each.name for each in place.iterdir()] == [file.name]  # and nothing half-written


def test_switched_off_nothing_is_kept(
    compiled: list[str], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MMADAPT_CUBINS", "off")
    assert [cubins.kept(*WHAT) for _ in range(2)] == [CODE] * 2
    assert len(compiled) == 2 and not place.exists()


def test_without_a_word_they_are_with_the_rest_of_the_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("MMADAPT_CUBINS")
    monkeypatch.setenv("MMADAPT_CACHE", str(tmp_path))
    assert cubins.folder() == tmp_path / "cubins"


def test_a_folder_that_takes_no_file_is_named_once_and_the_kernel_is_there(
    compiled: list[str], place: Path
) -> None:
    place.write_text("a file, where the folder should be")
    with pytest.warns(UserWarning, match="compiled kernels cannot be kept in .*cubins") as seen:
        assert [cubins.kept(*WHAT) for _ in range(2)] == [CODE] * 2
    assert len(seen) == 1 and "MMADAPT_CUBINS" in str(seen[0].message)
    assert len(compiled) == 2


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes wherever it likes"
)
def test_a_folder_for_reading_only_is_read(compiled: list[str], place: Path) -> None:
    cubins.kept(*WHAT)
    place.chmod(0o500)
    assert cubins.kept(*WHAT) == CODE and len(compiled) == 1
    with pytest.warns(UserWarning, match="cannot be kept"):
        cubins.kept("another", "sm_90a")
    place.chmod(0o700)


def test_a_write_that_fails_leaves_what_was_there(
    compiled: list[str], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cubins.kept(*WHAT)
    (file,) = place.iterdir()
    whole = file.read_bytes()

    def full(old: str, new: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        cubins.write(file, Compiled(b"new", "_Z1g"))
    assert [each.read_bytes() for each in place.iterdir()] == [whole]


@pytest.mark.slow
@pytest.mark.skipif(compiler.missing() is not None, reason="torch brought no NVRTC here")
def test_two_processes_compile_at_the_same_time_and_a_third_reads(place: Path) -> None:
    expression = "bottleneck_forward<Bfloat16, 64, 16, 1, 2, 4, true, 2, 1, 4>"
    code = (
        "import hashlib\nfrom mmadapt.kernels.cuda import compiler, cubins\n"
        "calls, compile_ = [], compiler.compile_\n"
        "compiler.compile_ = lambda *what: calls.append(0) or compile_(*what)\n"
        f"found = cubins.kept({expression!r}, 'sm_90a')\n"
        "print(len(calls), found.function, hashlib.sha256(found.cubin).hexdigest())"
    )

    def process() -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    both = [process(), process()]
    said = [each.communicate() for each in both]
    assert [each.returncode for each in both] == [0, 0], said
    third = process()
    out, err = third.communicate()
    assert third.returncode == 0, err
    assert out.startswith("0 _Z18bottleneck_forward")  # it compiled nothing
    assert {line.split()[1] for line, _ in said} == {out.split()[1]}
    (file,) = place.iterdir()
    kept = cubins.read(file)
    assert kept is not None and kept.function == out.split()[1]
