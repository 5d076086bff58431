"""What the benchmark runs on: a GPU, or on a dry walk the interpreter and the emulator; and its clock."""

# pyright: reportMissingImports=false

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

TESTS = Path(__file__).parents[2] / "tests"


class Route(NamedTuple):
    """A way to compute a bottleneck: a path of `mmadapt.ops.choice`, and a cluster's blocks for CUDA."""

    name: str
    forced: str
    cluster: int = 0


TRITON = Route("triton", "triton")
CLUSTERS = tuple(Route(f"cluster {size}", "cuda", size) for size in (1, 2, 4))


class Device:
    """Where things are computed and how long they take. `end` is when measuring has to stop."""

    def __init__(self, dry: bool, minutes: float) -> None:
        if dry:
            sys.path.insert(0, str(TESTS))
            os.environ["TRITON_INTERPRET"] = "1"
            import interpreter  # noqa: F401
        import torch

        from mmadapt.ops import choice

        self.torch, self.dry = torch, dry
        self.choice: Any = choice
        self.name = "cpu" if dry else "cuda"
        self.end = time.monotonic() + 60 * minutes
        self.paths = [TRITON]
        against = self._emulate() if dry else choice.cuda_unreached_on(torch.device("cuda:0"))
        if against is None:
            self.paths += CLUSTERS
        else:
            print(f"the cluster kernel is left out: {against}")

    def facts(self) -> dict[str, Any]:
        """What every figure depends on."""
        torch = self.torch
        facts = {"torch": torch.__version__, "cuda": torch.version.cuda}
        if self.dry:
            return {"device": "interpreter and emulator", **facts}
        properties = torch.cuda.get_device_properties(0)
        return {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "processors": properties.multi_processor_count,
            **facts,
        }

    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()

    @contextlib.contextmanager
    def on(self, path: Route | None) -> Iterator[None]:
        """Bottlenecks take this path; the reference for None."""
        before = self.choice.FORCED, self.choice.CLUSTER
        self.choice.FORCED = path.forced if path else "reference"
        self.choice.CLUSTER = path.cluster if path and path.cluster else before[1]
        try:
            yield
        finally:
            self.choice.FORCED, self.choice.CLUSTER = before

    def microseconds(self, call: Callable[[], Any], milliseconds: int = 100) -> float:
        """The median over so many milliseconds; on a dry walk one call, and the clock stands still."""
        if self.dry:
            call()
            return 1.0
        from triton.testing import do_bench

        return 1000 * float(do_bench(call, warmup=25, rep=milliseconds, return_mode="median"))  # pyright: ignore[reportArgumentType]

    def captured(self, call: Callable[[], Any]) -> float:
        """The same of a captured graph of the call: what the device takes without the host."""
        if self.dry:
            return self.microseconds(call)
        call()  # compiles
        graph = self.torch.cuda.CUDAGraph()
        with self.torch.cuda.graph(graph):
            call()
        return self.microseconds(graph.replay)

    def _emulate(self) -> str | None:
        """Put the emulator in the driver's place for the dry walk's shape; or why not."""
        from emulated import COMPILER, Emulator
        from mmadapt.kernels.cuda import driver
        from mmadapt.kernels.cuda.instance import instance_for
        from mmadapt.kernels.settings import NUMBERS, PROCESSORS

        if COMPILER is None:
            return "g++ is not installed here"
        options: dict[str, Any] = dict(processors=PROCESSORS, activation=NUMBERS["gelu"])
        instances = [
            instance_for(33, 64, 8, norm=norm, cluster=path.cluster, **options)
            for norm in (True, False)
            for path in CLUSTERS
        ]
        folder = Path(tempfile.mkdtemp(prefix="mmadapt-emulated-"))
        driver.start = Emulator(instances, folder).start
        self.choice.cuda_unreached_on = lambda device: None
        return None
