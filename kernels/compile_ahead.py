"""Compile every kernel for several architectures, without a GPU, and read what ptxas says of it.

    python -m mmadapt.kernels.compile_ahead            # a table; exit status 1 if any kernel spills
    python -m mmadapt.kernels.compile_ahead --quick    # what the tests compile
    python -m mmadapt.kernels.compile_ahead --out kernels/bench/compiled.json

It needs Triton, which brings ptxas and cuobjdump with it, and for the CUDA kernel NVRTC.
TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .backward import input_kernel, weight_kernel
from .cuda import compiler
from .cuda import instance as clusters
from .cuda.instance import Instance, instance_for
from .forward import forward_kernel
from .settings import NUMBERS, PROCESSORS, Tiles, forward_tiles, input_tiles, units, weight_tiles

ARCHITECTURES = (80, 90, 100)
TRITON_KERNELS = ("forward", "input", "weight")
_TOOLS = Path(triton.backends.nvidia.__file__).parent / "bin"


class Case(NamedTuple):
    """A shape to compile for: operands "bf16", "fp16" or "fp32"; few rows or many; mixed or not."""

    channels: int
    width: int
    dtype: str = "bf16"
    rows: int = 65_536
    mixed: bool = False


class Report(NamedTuple):
    """What one compiled kernel takes. `spilled` bytes of a thread lie in local memory."""

    kernel: str
    architecture: int
    case: Case
    tiles: Tiles | Instance
    registers: int
    spilled: int
    shared: int
    tensor_cores: int


QUICK = (Case(768, 64), Case(4096, 16, mixed=True))
CASES = (
    *QUICK,
    Case(768, 64, "fp16"),
    Case(768, 64, rows=1576),
    Case(768, 128),
    Case(1280, 32),
    Case(4096, 64),
    Case(4096, 16, rows=256, mixed=True),
    Case(768, 32, "fp32"),
    Case(768, 64, "fp32", mixed=True),
)

#: of the CUDA forward pass, with the blocks of a cluster
QUICK_CLUSTERS = ((Case(768, 64), 4), (Case(4096, 16, "fp16"), 2))
CLUSTERS = (
    *QUICK_CLUSTERS,
    (Case(768, 64), 1),
    (Case(768, 64), 2),
    (Case(768, 64, rows=1576), 4),
    (Case(768, 16), 4),
    (Case(768, 128), 4),
    (Case(256, 64), 4),
    (Case(1024, 64), 4),
    (Case(1280, 32), 4),
    (Case(2048, 16), 4),
    (Case(4096, 16), 4),
    (Case(4096, 64), 4),
    (Case(5120, 128), 4),
)

_FLOATS = ("slopes", "shift", "bias", "gain", "statistics", "factor", "eps")
_PARTS = ("down_parts", "up_parts", "dy_parts", "column_parts")
_WHOLE = ("order", "tiles", "first")
_NUMBERS = ("rows", "parts")


def compiled(name: str, case: Case, architecture: int) -> Report:
    """Compile one kernel as `launch` would for this case."""
    wide = case.dtype == "fp32"
    kernel: Any = {"forward": forward_kernel, "input": input_kernel, "weight": weight_kernel}[name]
    if name == "forward":
        tiles = forward_tiles(case.rows, case.width, wide)
    elif name == "input":
        tiles = input_tiles(case.rows, case.width, wide)
    else:
        tiles = weight_tiles(case.width, wide)
    values = dict(
        C_IN=case.channels, C_OUT=case.channels, C_MOST=case.channels, WIDTH=case.width,
        BLOCK_T=tiles.rows, BLOCK_C=tiles.channels, BLOCK_H=units(case.width), NORM=True,
        SHIFT=True, BIAS=True, GAIN=True, RESIDUAL=True, KEEP=True, SAME=True, MIXED=case.mixed,
        ACTIVATION=NUMBERS["gelu"], PRECISION="ieee",
    )  # fmt: skip
    constants = {key: value for key, value in values.items() if key in kernel.arg_names}
    signature, attributes = {}, {}
    for place, argument in enumerate(kernel.arg_names):
        signature[argument] = _type(argument, constants, case.dtype)
        if signature[argument].startswith("*") or argument.startswith("stride"):
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = dict(num_warps=tiles.warps, num_stages=tiles.stages)
    found = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    registers, spilled, cores = _resources(found.asm["cubin"])
    shared = found.metadata.shared
    return Report(name, architecture, case, tiles, registers, spilled, shared, cores)


def compiled_cluster(case: Case, size: int, architecture: int) -> Report:
    """Compile the CUDA forward pass as it would be launched for this case, in clusters of `size`."""
    number = {"bf16": "Bfloat16", "fp16": "Float16"}[case.dtype]
    instance = instance_for(
        case.rows, case.channels, case.width, processors=PROCESSORS, number=number, norm=True,
        activation=NUMBERS["gelu"], cluster=size,
    )  # fmt: skip
    if instance is None:
        raise ValueError(f"{case} does not fit the shared memory of a block")
    name = clusters.ARCHITECTURES[divmod(architecture, 10)]
    cubin = compiler.compile_(instance.expression, name).cubin
    registers, spilled, cores = _resources(cubin)
    return Report(
        "cluster", architecture, case, instance, registers, spilled, instance.shared, cores
    )


def _type(argument: str, constants: dict[str, Any], dtype: str) -> str:
    if argument in constants:
        return "constexpr"
    if argument in ("factor", "eps"):
        return "fp32"
    if argument in _NUMBERS or argument.startswith("stride"):
        return "i32"
    if argument in _FLOATS or argument in _PARTS:
        return "*fp32"
    return "*i32" if argument in _WHOLE else f"*{dtype}"


def _resources(cubin: bytes) -> tuple[int, int, int]:
    """Registers a thread, bytes of local memory a thread, and instructions of the tensor cores."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _said("cuobjdump", "-res-usage", path)
        code = _said("nvdisasm", "-c", path)
    numbers = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage))
    # local memory is used by what was spilled, which the stack alone does not tell
    local = len(re.findall(r"\b(?:STL|LDL)\b", code))
    spilled = int(numbers["LOCAL"]) + (int(numbers["STACK"]) if local else 0)
    cores = len(re.findall(r"\b(?:HGMMA|HMMA|UTC[A-Z]*MMA)\b", code))
    return int(numbers["REG"]), spilled, cores


def _said(tool: str, *arguments: object) -> str:
    command = [str(_TOOLS / tool), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def reports(quick: bool) -> Iterator[Report]:
    """Every kernel on every architecture."""
    for architecture in ARCHITECTURES:
        for case in QUICK if quick else CASES:
            for name in TRITON_KERNELS:
                yield compiled(name, case, architecture)
        if divmod(architecture, 10) in clusters.ARCHITECTURES and not compiler.missing():
            for case, size in QUICK_CLUSTERS if quick else CLUSTERS:
                yield compiled_cluster(case, size, architecture)


def line(report: Report) -> str:
    """What was found of one kernel."""
    case, tiles = report.case, report.tiles
    kind = f"{case.dtype}{' mixed' if case.mixed else ''}, {case.rows} rows"
    size = f"{tiles.rows}×{clusters.CHUNK if isinstance(tiles, Instance) else tiles.channels}"
    name = f"cluster {tiles.cluster}" if isinstance(tiles, Instance) else report.kernel
    return (
        f"sm_{report.architecture:<4d}{name:10s}{case.channels:5d} → {case.width:<4d}{kind:24s} "
        f"tiles {size:8s} {tiles.warps} warps  {report.registers:3d} registers  "
        f"{report.spilled:4d} B spilled  {report.shared / 1024:6.1f} kB shared  "
        f"{report.tensor_cores:3d} MMA"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="only what the tests compile")
    parser.add_argument("--out", type=Path, help="a JSON file for what was found")
    asked = parser.parse_args()
    found: list[Report] = []
    for report in reports(asked.quick):
        found.append(report)
        print(line(report), flush=True)
    spilling = sum(report.spilled > 0 for report in found)
    nvrtc = compiler.missing() or ".".join(map(str, compiler.version()))
    if asked.out:
        rows = [r._asdict() | {"case": r.case._asdict(), "tiles": r.tiles._asdict()} for r in found]
        lines = ",\n".join(json.dumps(row) for row in rows)
        versions = f'"triton": "{triton.__version__}", "nvrtc": "{nvrtc}"'
        asked.out.write_text(f'{{{versions}, "kernels": [\n{lines}\n]}}\n')
    if compiler.missing():
        print(f"without the CUDA kernel: {nvrtc}")
    print("no kernel spills" if not spilling else f"{spilling} kernels spill")
    return int(spilling > 0)


if __name__ == "__main__":
    sys.exit(main())
