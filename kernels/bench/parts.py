"""The parts of the benchmark; each returns or yields rows of the JSON and stops when time is up."""

# pyright: reportMissingImports=false

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import rules
from device import CLUSTERS, TRITON, Device, Route

SHAPES = ((768, 64), (1024, 64), (1280, 32), (4096, 64), (4096, 16))
DRY_SHAPES = ((64, 8),)
MANY = 65_536
ROTATED = 2e9  # bytes that inputs rotate through: more than any cache holds
Row = dict[str, Any]


class Parts:
    """What is measured, on one device."""

    def __init__(self, device: Device) -> None:
        self.device, self.torch = device, device.torch
        self.shapes = DRY_SHAPES if device.dry else SHAPES

    # -- inputs and ways ----------------------------------------------------------------------------

    def drawn(
        self, channels: int, width: int, tokens: int, dtype: Any = None
    ) -> tuple[Any, list[Any]]:
        """x (T, C) of half precision, and float32 parameters: norm's two, down, bias, up, bias."""

        def normal(*shape: int) -> Any:
            return self.torch.randn(shape, device=self.device.name)

        tensors = [
            1 + 0.2 * normal(channels),
            0.2 * normal(channels),
            normal(width, channels) / channels**0.5,
            0.3 * normal(width),
            normal(channels, width) / width**0.5,
            0.3 * normal(channels),
        ]
        x = self.torch.empty(tokens, channels, device=self.device.name).normal_()
        x = x.to(dtype or self.torch.bfloat16).requires_grad_()
        return x, [tensor.requires_grad_() for tensor in tensors]

    def fused(self, x: Any, tensors: list[Any], norm: bool = True) -> Any:
        from mmadapt.ops.bottleneck import bottleneck

        weight, bias, down, down_bias, up, up_bias = tensors
        rest = (down, down_bias, up, up_bias)
        return bottleneck(x, x, *rest, "gelu", 0.7, 0.0, (weight, bias) if norm else None)

    def eager(self, x: Any, tensors: list[Any], norm: bool = True) -> Any:
        """The same under autocast's rules: parameters rounded to x's dtype, five operations."""
        F = self.torch.nn.functional
        weight, bias, down, down_bias, up, up_bias = (t.to(x.dtype) for t in tensors)
        z = F.layer_norm(x, x.shape[-1:], weight, bias) if norm else x
        change = F.linear(F.gelu(F.linear(z, down, down_bias)), up, up_bias)
        return self.torch.add(x, change, alpha=0.7)

    # -- before anything is timed ----------------------------------------------------------------------

    def ceilings(self) -> dict[str, float]:
        """Bytes a second of a copy of 4 GB, read and written, and operations a second of a product."""
        if self.device.dry:
            return {"copy_bytes_per_second": 4.3e12, "flop_per_second": 7.9e14}
        torch, place = self.torch, self.device.name
        source = torch.empty(4 << 30, dtype=torch.uint8, device=place)
        target = torch.empty_like(source)
        copy = self.device.microseconds(lambda: target.copy_(source))
        a = torch.randn(8192, 8192, dtype=torch.bfloat16, device=place)
        product = self.device.microseconds(lambda: a @ a)
        return {
            "copy_bytes_per_second": 2 * source.numel() / (1e-6 * copy),
            "flop_per_second": 2 * 8192**3 / (1e-6 * product),
        }

    def compiled_ahead(self) -> None:
        """Compile the cluster kernel's instances at the same time, so that the clock need not wait."""
        if self.device.dry or CLUSTERS[0] not in self.device.paths:
            return
        from concurrent.futures import ThreadPoolExecutor

        from mmadapt.kernels.cuda import cubins
        from mmadapt.kernels.cuda.instance import ARCHITECTURES, instance_for
        from mmadapt.kernels.settings import NUMBERS

        properties = self.torch.cuda.get_device_properties(0)
        name = ARCHITECTURES[properties.major, properties.minor]
        asked = set()
        for (channels, width), tokens, norm, path in itertools.product(
            self.shapes, (1576, MANY), (True, False), CLUSTERS
        ):
            found = instance_for(
                tokens, channels, width, processors=properties.multi_processor_count, norm=norm,
                activation=NUMBERS["gelu"], cluster=path.cluster,
            )  # fmt: skip
            if found:
                asked.add(found.expression)
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda expression: cubins.kept(expression, name), sorted(asked)))

    def checked(self) -> Iterator[Row]:
        """Errors against float64 for every shape, path and dtype; a wrong one or another bit raises."""
        torch = self.torch
        torch.use_deterministic_algorithms(True, warn_only=True)  # fills what is allocated with NaN
        for channels, width in self.shapes:
            for dtype in (torch.bfloat16,) if self.device.dry else (torch.bfloat16, torch.float16):
                x, tensors = self.drawn(channels, width, 33 if self.device.dry else 1001, dtype)
                with torch.no_grad():
                    exact = self.eager(x.double(), [tensor.double() for tensor in tensors])
                row: Row = {
                    "channels": channels,
                    "width": width,
                    "dtype": str(dtype)[6:],
                    "error": {},
                }
                for path in self.device.paths:
                    with self.device.on(path), torch.no_grad():
                        once, twice = self.fused(x, tensors), self.fused(x, tensors)
                    error = float((once.double() - exact).norm() / exact.norm())
                    if not error < 1e-2:
                        raise RuntimeError(f"{path.name}, {channels} → {width}: error {error:.1e}")
                    if not torch.equal(once, twice):
                        raise RuntimeError(f"{path.name}, {channels} → {width}: other bits again")
                    row["error"][path.name] = error
                yield row
        torch.use_deterministic_algorithms(False)

    # -- bottlenecks --------------------------------------------------------------------------------------

    def rotating(self, channels: int, width: int, tokens: int) -> tuple[int, Iterator[Any]]:
        """Bytes that a forward pass moves at least, and inputs without end."""
        size = 2 * tokens * channels * 2
        many = 1 if self.device.dry else max(1, min(8, int(ROTATED // size)))
        return size, itertools.cycle([self.drawn(channels, width, tokens) for _ in range(many)])

    def forward(self, tokens: int, norm: bool, ceilings: dict[str, float]) -> Iterator[Row]:
        """Without gradients, by every path and eagerly: captured, as called, and folding alone."""
        for channels, width in self.shapes:
            size, inputs = self.rotating(channels, width, tokens)
            row: Row = {"channels": channels, "width": width, "tokens": tokens, "norm": norm}
            row |= {"us": {}, "called_us": {}, "predicted_us": {}, "share_of_copy": {}}

            def run(way: Callable[..., Any], inputs: Iterator[Any] = inputs) -> None:
                with self.torch.no_grad():
                    way(*next(inputs), norm)

            ways = [(path.name, path, self.fused) for path in self.device.paths]
            for name, path, way in (*ways, ("eager", None, self.eager)):
                with self.device.on(path):
                    row["us"][name] = self.device.captured(lambda way=way: run(way))
                    row["called_us"][name] = self.device.microseconds(lambda way=way: run(way))
                if path:
                    copied = 1e6 * size / ceilings["copy_bytes_per_second"]
                    row["share_of_copy"][name] = copied / row["us"][name]
                    row["predicted_us"][name] = self.predicted(row, ceilings, path)
            row["folding_us"] = self.device.captured(lambda: self.folded(next(inputs)[1], norm))  # noqa: B023
            yield row

    def folded(self, tensors: list[Any], norm: bool) -> Any:
        """What comes before the kernel: norm and scales into the matrices, and those into chunks."""
        from mmadapt.kernels.cuda.launch import packed

        from mmadapt.ops.folding import Parameters, fold

        with self.torch.no_grad():
            weight, bias, down, down_bias, up, up_bias = (tensor[None] for tensor in tensors)
            norms = (weight, bias) if norm else (None, None)
            parameters = Parameters(*norms, down, down_bias, up, up_bias, None)
            found = fold(parameters, self.torch.bfloat16)
            return packed(found.down[0], found.up[0])

    def predicted(self, row: Row, ceilings: dict[str, float], path: Route) -> float:
        """By arithmetic, for the tiles that this path takes."""
        from mmadapt.kernels.cuda.instance import instance_for
        from mmadapt.kernels.settings import PROCESSORS, forward_tiles

        shape = row["tokens"], row["channels"], row["width"]
        tiles: Any = forward_tiles(shape[0], shape[2], False)
        if path.cluster:
            tiles = instance_for(*shape, processors=PROCESSORS, cluster=path.cluster)
        return rules.predicted(row, ceilings, tiles.rows, path.cluster)

    def step(self, tokens: int, norm: bool, compiled: bool) -> Iterator[Row]:
        """Forward and backward, and what was kept in between."""
        for channels, width in self.shapes:
            _, inputs = self.rotating(channels, width, tokens)
            dy = self.torch.randn_like(next(inputs)[0])
            row: Row = {
                "channels": channels,
                "width": width,
                "tokens": tokens,
                "norm": norm,
                "us": {},
            }
            row["kept_mb"] = {}
            ways: dict[str, tuple[Route | None, Any]] = {"eager": (None, self.eager)}
            if compiled and not self.device.dry:
                self.torch._dynamo.reset()  # or the next shape makes code for any shape
                ways["compiled"] = (None, self.torch.compile(self.eager, dynamic=False))
            ways |= {path.name: (path, self.fused) for path in self.device.paths}
            for name, (path, way) in ways.items():

                def run(way: Any = way, inputs: Iterator[Any] = inputs, dy: Any = dy) -> None:
                    way(*next(inputs), norm).backward(dy)

                with self.device.on(path):
                    row["us"][name] = self.device.microseconds(run)
                    row["kept_mb"][name] = self.kept(way, next(inputs), norm)
            yield row

    def kept(self, way: Any, given: tuple[Any, list[Any]], norm: bool) -> float:
        """Megabytes kept for backward beside x and the parameters."""
        x, tensors = given
        known = {t.data_ptr() for t in (x, *tensors)}
        sizes: dict[int, int] = {}

        def pack(t: Any) -> Any:
            if t.data_ptr() not in known:
                sizes[t.data_ptr()] = t.untyped_storage().nbytes()
            return t

        with self.torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            way(x, tensors, norm)
        return sum(sizes.values()) / 1e6

    def tiles(self) -> Iterator[Row]:
        """Triton's forward pass by other tiles than the chosen ones."""
        from mmadapt.kernels import launch
        from mmadapt.kernels.settings import Tiles

        chosen = launch.forward_tiles
        tried = (Tiles(64, 64, 4, 3), Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 4),
                 Tiles(64, 128, 4, 3), Tiles(128, 128, 8, 2))  # fmt: skip
        for channels, width in self.shapes:
            _, inputs = self.rotating(channels, width, 33 if self.device.dry else MANY)
            row: Row = {"channels": channels, "width": width, "us": {}}
            for tiles in tried[:1] if self.device.dry else tried:
                launch.forward_tiles = lambda *_, tiles=tiles: tiles
                try:
                    with self.device.on(TRITON), self.torch.no_grad():
                        row["us"]["×".join(map(str, tiles))] = self.device.microseconds(
                            lambda inputs=inputs: self.fused(*next(inputs))
                        )
                finally:
                    launch.forward_tiles = chosen
            yield row

    def launch(self) -> Iterator[Row]:
        """Few tokens: as they come, and replayed from a captured graph, which takes the host away."""
        for tokens in (33,) if self.device.dry else (197, 1576):
            yield self.launched(*self.shapes[0], tokens)

    def launched(self, channels: int, width: int, tokens: int) -> Row:
        x, tensors = self.drawn(channels, width, tokens)
        row: Row = {"channels": channels, "width": width, "tokens": tokens, "us": {}}
        ways: list[tuple[str, Route | None, Any]] = [("eager", None, self.eager)]
        ways += [(path.name, path, self.fused) for path in self.device.paths]
        for name, path, way in ways:
            with self.device.on(path), self.torch.no_grad():
                row["us"][name] = self.device.microseconds(lambda way=way: way(x, tensors))
                row["us"][f"{name}, graph"] = self.device.captured(lambda way=way: way(x, tensors))
        return row

    def mixed(self) -> Iterator[Row]:
        """Samples that each pick one of N adapters, beside one adapter for all and a loop over them."""
        if self.device.dry:
            yield self.mixed_batch(*self.shapes[0], 3, False)
            return
        for shape in ((768, 64), (4096, 16)):
            for adapters, skewed in ((8, False), (64, False), (64, True)):
                yield self.mixed_batch(*shape, adapters, skewed)

    def mixed_batch(self, channels: int, width: int, adapters: int, skewed: bool) -> Row:
        from mmadapt.ops.bottleneck import mixed_known

        torch = self.torch
        samples, length = (6, 5) if self.device.dry else (256, 256)
        x = torch.randn(samples, length, channels, device=self.device.name).bfloat16()
        drawn = [self.drawn(channels, width, 1)[1] for _ in range(adapters)]
        stacked = [torch.stack(each).detach() for each in zip(*drawn, strict=True)]
        one = [each[0] for each in stacked]
        weight, bias, down, down_bias, up, up_bias = stacked
        rest = (down, down_bias, up, up_bias, "gelu", 0.7, (weight, bias))
        likely = torch.arange(1.0, adapters + 1) ** (-1.0 if skewed else 0.0)
        ids = torch.multinomial(likely, samples, replacement=True).to(x.device)
        row: Row = {"channels": channels, "width": width, "tokens": samples * length}
        row |= {"adapters": adapters, "skewed": skewed, "us": {}}
        with torch.no_grad():
            with self.device.on(TRITON):
                row["us"]["one"] = self.device.microseconds(lambda: self.fused(x, one))
                row["us"]["triton"] = self.device.microseconds(
                    lambda: mixed_known(x, x, ids, *rest)
                )
            with self.device.on(None):
                row["us"]["loop"] = self.device.microseconds(lambda: mixed_known(x, x, ids, *rest))
        return row
