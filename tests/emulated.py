"""The CUDA kernel's own source, compiled by g++ with `emulation.h`, in the place of the driver."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import mmadapt.kernels.cuda
from mmadapt.kernels.cuda.compiler import SOURCES
from mmadapt.kernels.cuda.instance import RESIDUALS, Arguments, Instance

HERE = Path(__file__).parent
SOURCE = Path(mmadapt.kernels.cuda.__file__).parent
COMPILER = shutil.which("g++")

_MAIN = """
#include "{here}/emulation.h"
{kernel}

typedef std::string (*Run)(const Arguments&, int, u32);
template <typename N, int C, int W, int WARPS, int B, int S, bool NORM, int ACT, int RES, int SIZE>
std::string run(const Arguments& arguments, int blocks, u32 seed) {{
  return run_grid(bottleneck_forward<N, C, W, WARPS, B, S, NORM, ACT, RES, SIZE>, arguments, blocks, SIZE,
                  32 * WARPS + 32, Forward<N, C, W, WARPS, B, S, NORM, ACT, RES, SIZE>::BYTES, seed);
}}
static const Run RUNS[] = {{ {runs} }};
static const int BYTES[] = {{ {sizes} }};
static std::string said;
extern "C" const char* emulate(int which, const Arguments* arguments, int blocks, u32 seed) {{
  said = RUNS[which](*arguments, blocks, seed);
  return said.c_str();
}}
extern "C" int shared_bytes(int which) {{ return BYTES[which]; }}
extern "C" void clear_reachable() {{ reachable.clear(); }}
extern "C" void make_reachable(const char* from, long long bytes) {{ reachable.push_back({{from, from + bytes}}); }}
"""


class Emulator:
    """Instances of the kernel in one library; `start` stands for `driver.start`."""

    def __init__(
        self, instances: Sequence[Instance], folder: Path, changes: Sequence[tuple[str, str]] = ()
    ) -> None:
        kernel = "\n".join((SOURCE / name).read_text() for name in SOURCES[1:])
        for old, new in changes:
            if old not in kernel:
                raise ValueError(f"{old!r} is not in the kernel")
            kernel = kernel.replace(old, new)
        self.instances = list(dict.fromkeys(instances))
        expressions = [i.expression.removeprefix("bottleneck_forward") for i in self.instances]
        main = folder / "main.cpp"
        main.write_text(
            _MAIN.format(
                here=HERE,
                kernel=kernel,
                runs=", ".join(f"run{each}" for each in expressions),
                sizes=", ".join(f"Forward{each}::BYTES" for each in expressions),
            )
        )
        command = ["g++", "-std=c++17", "-O1", "-w", "-shared", "-fPIC"]
        done = subprocess.run(
            [*command, "-o", str(folder / "emulated.so"), str(main)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(done.stderr[:4000])
        self.library = ctypes.CDLL(str(folder / "emulated.so"))
        self.library.emulate.restype = ctypes.c_char_p
        self.clusters, self.seed = 1, 0

    def shared(self, instance: Instance) -> int:
        """Bytes of shared memory, as C++ counts them."""
        return self.library.shared_bytes(self.instances.index(instance))

    def start(self, instance: Instance, arguments: Arguments, device: object) -> None:
        """Run the kernel; RuntimeError for what it may not do."""
        self.library.clear_reachable()
        rows, size = arguments.rows, 2 * instance.channels
        chunks, width = instance.channels // 64, instance.width
        self._reach(arguments.x, 2 * (rows - 1) * arguments.stride_x + size)
        self._reach(arguments.down, 2 * chunks * width * 72)
        self._reach(arguments.up, 2 * chunks * 64 * (width + 8))
        self._reach(arguments.y, rows * size)
        if RESIDUALS[instance.residual] == "other":
            self._reach(arguments.residual, 2 * (rows - 1) * arguments.stride_residual + size)
        error = self.library.emulate(
            self.instances.index(instance),
            ctypes.byref(arguments),
            self.clusters * instance.cluster,
            self.seed,
        )
        if error:
            raise RuntimeError(error.decode())

    def _reach(self, pointer: int, size: int) -> None:
        self.library.make_reachable(ctypes.c_void_p(pointer), ctypes.c_longlong(size))
