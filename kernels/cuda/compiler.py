"""Compiling the kernel by NVRTC, which torch's CUDA builds bring: no header and no compiler is needed."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mmadapt.errors import OpsError

#: what the kernel is made of, in this order
SOURCES = ("primitives.cuh", "activations.cuh", "forward.cuh")
OPTIONS = ("--std=c++17",)


class Compiled(NamedTuple):
    """Machine code, and the name in it of what was asked for."""

    cubin: bytes
    function: str


@functools.cache
def source() -> str:
    """The kernel's whole source."""
    return "\n".join((Path(__file__).parent / name).read_text("utf-8") for name in SOURCES)


def missing() -> str | None:
    """Why nothing can be compiled here, or None."""
    try:
        _nvrtc()
    except OSError:
        return (
            "NVRTC, which compiles the CUDA kernel and comes with torch's CUDA builds, is not here"
        )
    return None


@functools.cache
def version() -> tuple[int, int]:
    """NVRTC's version."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(_nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    return major.value, minor.value


def compile_(expression: str, architecture: str) -> Compiled:
    """Machine code of one instance of the template, for an architecture such as "sm_90a"."""
    nvrtc, program = _nvrtc(), ctypes.c_void_p()
    text, name = source().encode(), expression.encode()
    options = [option.encode() for option in (f"--gpu-architecture={architecture}", *OPTIONS)]
    _check(nvrtc.nvrtcCreateProgram(ctypes.byref(program), text, b"bottleneck.cu", 0, None, None))
    try:
        _check(nvrtc.nvrtcAddNameExpression(program, name))
        given = (ctypes.c_char_p * len(options))(*options)
        if nvrtc.nvrtcCompileProgram(program, len(options), given):
            said = _fetched(program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
            raise OpsError(
                f"NVRTC {'.'.join(map(str, version()))} did not compile {expression} for "
                f"{architecture}:\n{said.strip()}",
                "set MMADAPT_OPS to 'triton' or 'reference', and report this",
            )
        lowered = ctypes.c_char_p()
        _check(nvrtc.nvrtcGetLoweredName(program, name, ctypes.byref(lowered)))
        return Compiled(_fetched(program, "CUBIN"), (lowered.value or b"").decode())
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _fetched(program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _check(getattr(_nvrtc(), f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(getattr(_nvrtc(), f"nvrtcGet{what}")(program, buffer))
    return buffer.raw


def _check(status: int) -> None:
    if status:
        read = _nvrtc().nvrtcGetErrorString
        read.restype = ctypes.c_char_p
        raise OpsError(
            f"NVRTC says {read(status).decode()}", "set MMADAPT_OPS to 'triton' or 'reference'"
        )


@functools.cache
def _nvrtc() -> Any:
    """The library; OSError where there is none."""
    for path in _libraries():
        try:
            return ctypes.CDLL(str(path))
        except OSError:
            continue
    raise OSError("no NVRTC")


def _libraries() -> Iterator[str | Path]:
    """Where it may be: loaded by torch already, in NVIDIA's packages, in torch's own folder."""
    import torch

    major = (torch.version.cuda or "").partition(".")[0]
    if not major:
        return
    windows = sys.platform == "win32"
    name = f"nvrtc64_{major}0_0.dll" if windows else f"libnvrtc.so.{major}"
    yield name
    packages = importlib.util.find_spec("nvidia")
    for folder in packages.submodule_search_locations or () if packages else ():
        yield from sorted(Path(folder).glob(f"*/{'bin' if windows else 'lib'}/{name}"))
    yield from sorted((Path(torch.__file__).parent / "lib").glob(f"{name}*"))
