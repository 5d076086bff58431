"""Time the fused bottleneck against eager and compiled torch, on a GPU, and say what was reached.

    python kernels/bench/run.py --out kernels/bench/<device>.json [--minutes 8]

Correctness comes first: every shape is checked against float64 and for equal bits in two runs before
it is timed. Inputs rotate through more memory than the last cache holds. Rows are written as they
finish, so that a run that is cut short leaves what it has. `--dry` walks through it in the
interpreter with one tiny shape and times nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SHAPES = ((768, 64), (1024, 64), (1280, 32), (4096, 64), (4096, 16))
TOKENS = (1_576, 16_384, 65_536, 262_144)
ROTATED = 2e9  # bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--dry", action="store_true")
    asked = parser.parse_args()
    if asked.dry:
        sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
        os.environ["TRITON_INTERPRET"] = "1"
        import interpreter  # noqa: F401  # pyright: ignore[reportMissingImports]
    import torch

    if not asked.dry and not torch.cuda.is_available():
        sys.exit("there is no GPU here; --dry walks through it without one")
    bench = Bench("cpu" if asked.dry else "cuda", asked.dry, asked.minutes)
    bench.everything()
    if asked.out and not asked.dry:
        asked.out.write_text(json.dumps(bench.found, indent=1) + "\n")


class Bench:
    """One run: ceilings of the device, then a row for each shape."""

    def __init__(self, device: str, dry: bool, minutes: float) -> None:
        import torch

        from mmadapt.ops import choice

        choice.FORCED = "triton"
        self.torch, self.device, self.dry = torch, device, dry
        self.end = time.monotonic() + 60 * minutes
        name = "interpreter" if dry else torch.cuda.get_device_name()
        self.found: dict[str, Any] = {"device": name, "torch": torch.__version__, "rows": []}

    def everything(self) -> None:
        if not self.dry:
            self.found["copy_bytes_per_second"] = self.copying()
        shapes = ((64, 8),) if self.dry else SHAPES
        for channels, width in shapes:
            self.checked(channels, width)
            for tokens in (33,) if self.dry else TOKENS:
                if time.monotonic() > self.end:
                    print("out of time; later shapes were not measured")
                    return
                row = self.row(channels, width, tokens)
                self.found["rows"].append(row)
                print(json.dumps(row), flush=True)

    def copying(self) -> float:
        """Bytes a second, read and written, of a copy of 4 GB."""
        source = self.torch.empty(4 << 30, dtype=self.torch.uint8, device=self.device)
        target = self.torch.empty_like(source)
        return 2 * source.numel() / (1e-6 * self.microseconds(lambda: target.copy_(source)))

    def drawn(self, channels: int, width: int, tokens: int) -> tuple[Any, list[Any]]:
        """x (T, C) of bfloat16, and float32 parameters: norm's two, down, bias, up, bias."""

        def normal(*shape: int) -> Any:
            return self.torch.randn(shape, device=self.device)

        tensors = [
            1 + 0.2 * normal(channels),
            0.2 * normal(channels),
            normal(width, channels) / channels**0.5,
            0.3 * normal(width),
            normal(channels, width) / width**0.5,
            0.3 * normal(channels),
        ]
        x = normal(tokens, channels).bfloat16().requires_grad_()
        return x, [tensor.requires_grad_() for tensor in tensors]

    def fused(self, x: Any, tensors: list[Any]) -> Any:
        from mmadapt.ops.bottleneck import bottleneck

        weight, bias, down, down_bias, up, up_bias = tensors
        rest = (down, down_bias, up, up_bias)
        return bottleneck(x, x, *rest, "gelu", 0.7, 0.0, (weight, bias))

    def eager(self, x: Any, tensors: list[Any]) -> Any:
        """The same under autocast's rules: parameters rounded to x's dtype, five operations."""
        F = self.torch.nn.functional
        weight, bias, down, down_bias, up, up_bias = (t.to(x.dtype) for t in tensors)
        z = F.layer_norm(x, x.shape[-1:], weight, bias)
        change = F.linear(F.gelu(F.linear(z, down, down_bias)), up, up_bias)
        return self.torch.add(x, change, alpha=0.7)

    def checked(self, channels: int, width: int) -> None:
        """Raise unless the kernels agree with float64 and with themselves, bit for bit."""
        x, tensors = self.drawn(channels, width, 33 if self.dry else 1001)
        exact = self.eager(x.double(), [tensor.double() for tensor in tensors])
        once, twice = self.fused(x, tensors), self.fused(x, tensors)
        error = float((once.double() - exact).norm() / exact.norm())
        if not error < 1e-2 or not self.torch.equal(once, twice):
            raise RuntimeError(f"{channels} → {width}: error {error:.1e}, or bits that differ")

    def row(self, channels: int, width: int, tokens: int) -> dict[str, Any]:
        """Microseconds of forward and of forward and backward, by path."""
        size = 2 * tokens * channels * 2
        many = 1 if self.dry else max(1, min(8, int(ROTATED // size)))
        inputs = [self.drawn(channels, width, tokens) for _ in range(many)]
        dy = self.torch.randn_like(inputs[0][0])
        paths: dict[str, Any] = {"fused": self.fused, "eager": self.eager}
        if not self.dry:
            paths["compiled"] = self.torch.compile(self.eager)
        row: dict[str, Any] = {"channels": channels, "width": width, "tokens": tokens}
        for name, path in paths.items():
            turn = [0]

            def forward(path: Any = path, turn: list[int] = turn) -> Any:
                turn[0] += 1
                return path(*inputs[turn[0] % many])

            def quietly(forward: Any = forward) -> None:
                with self.torch.no_grad():
                    forward()

            row[f"{name}_forward_us"] = self.microseconds(quietly)
            row[f"{name}_step_us"] = self.microseconds(
                lambda forward=forward: forward().backward(dy)
            )
        if not self.dry:
            reached = size / (1e-6 * row["fused_forward_us"])
            row["share_of_copy"] = reached / self.found["copy_bytes_per_second"]
        return row

    def microseconds(self, call: Callable[[], Any]) -> float:
        """The median of a call; nothing is timed on a dry walk."""
        if self.dry:
            call()
            return 0.0
        from triton.testing import do_bench

        return 1000 * float(do_bench(call, warmup=25, rep=100, return_mode="median"))  # pyright: ignore[reportArgumentType]


if __name__ == "__main__":
    main()
