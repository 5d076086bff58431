"""The fused kernels on a GPU: `pytest -m gpu`. Without one every test here is skipped, and says so."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from interpreted import QUICK, SLOW, Case, computed, rounded
from test_kernels import BOUNDS, KINKED
from test_kernels_cuda import QUICK as QUICK_CLUSTERS
from test_kernels_cuda import SLOW as SLOW_CLUSTERS

from mmadapt.ops import bottleneck as ops
from mmadapt.ops import choice, reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="there is no GPU here, and the kernels run on one"
    ),
]

#: what is computed by each path; the CUDA kernel leaves to Triton what it does not compute
CASES = {
    "triton": [*QUICK, *SLOW],
    "cuda": [
        *(plan.case for plan in (*QUICK_CLUSTERS, *SLOW_CLUSTERS)),
        Case(1001, 768, 64, "bf16"),
        Case(20_011, 768, 64, "bf16", "relu", norm=False),
        Case(20_011, 1280, 32, "f16", channels=1280),
        Case(9_001, 4096, 16, "bf16", "silu", scale="channel"),
        Case(3_001, 5120, 128, "bf16", offset=30.0),
    ],
}


@pytest.fixture(autouse=True)
def filled_with_nan() -> Iterator[None]:
    """What is allocated and not written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def force(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take this path, or skip the test where the device cannot."""
    unreached = choice.unreached_on if path == "triton" else choice.cuda_unreached_on
    against = unreached(torch.device("cuda", torch.cuda.current_device()))
    if against:
        pytest.skip(f"the path {path} does not run here: {against}")
    monkeypatch.setattr(choice, "FORCED", path)


@pytest.fixture(params=["triton", "cuda"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    force(request.param, monkeypatch)
    return request.param


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> None:
    force("triton", monkeypatch)


def on_gpu(given: dict[str, Any]) -> dict[str, Any]:
    return {n: v.cuda() if isinstance(v, torch.Tensor) else v for n, v in given.items()}


def drawn(rows: int, channels: int, width: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """x and down, its bias, up, its bias, new every time."""
    given = on_gpu(rounded(Case(1, channels, width, "bf16"), fresh()))
    x = torch.empty(rows, channels, dtype=torch.bfloat16, device="cuda").normal_()
    return x, [given[name] for name in ("down", "down_bias", "up", "up_bias")]


def fresh() -> int:
    return int.from_bytes(os.urandom(4), "little")


@pytest.mark.parametrize(
    ("which", "case"),
    [(which, case) for which, cases in CASES.items() for case in cases],
    ids=lambda each: getattr(each, "key", each),
)
def test_outputs_and_gradients_are_the_references(
    which: str, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    force(which, monkeypatch)
    bound = (KINKED if case.activation == "relu" else BOUNDS)[case.dtype]
    seed = fresh()
    given = rounded(case, seed)
    exact, found = computed(case, given, True), computed(case, on_gpu(given), False)
    for name, value in exact.items():
        error = (found[name].double().cpu() - value).norm() / value.norm().clamp_min(1e-12)
        assert float(error) <= bound, (name, seed)


def test_the_same_bits_every_time(path: str) -> None:
    given = on_gpu(rounded(Case(1001, 768, 64, "bf16"), fresh()))
    once, twice = (computed(Case(1001, 768, 64, "bf16"), given, False) for _ in range(2))
    assert all(torch.equal(once[name], twice[name]) for name in once)


@pytest.mark.parametrize("rows", [65_536, 262_145, 600_001])
def test_rows_do_not_depend_on_how_many_there_are(rows: int, path: str) -> None:
    channels = 4096 if rows == 600_001 else 768  # more numbers than 32 bits count
    x, weights = drawn(rows, channels, 64)
    with torch.no_grad():
        y = ops.bottleneck(x, x, *weights, "gelu", 0.5)
        for part in (slice(0, 999), slice(rows // 2, rows // 2 + 999), slice(rows - 999, rows)):
            change = reference.bottleneck(
                x[part].double(), *(w.double() for w in weights), "gelu", 0.5
            )
            exact = x[part].double() + change
            assert float((y[part].double() - exact).norm() / exact.norm()) <= 3e-3
        assert bool(y.isfinite().all())


def test_work_follows_the_current_stream(path: str) -> None:
    x, weights = drawn(20_000, 768, 64)
    side = torch.cuda.Stream()
    with torch.no_grad():
        expected = ops.bottleneck(x, x, *weights, "gelu", 0.5)
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            later = torch.full_like(x, torch.nan)
            torch.cuda._sleep(20_000_000)  # a kernel on another stream would read NaN
            later.copy_(x)
            found = ops.bottleneck(later, later, *weights, "gelu", 0.5)
        torch.cuda.current_stream().wait_stream(side)
        assert torch.equal(found, expected)


def test_a_captured_graph_follows_its_input(path: str) -> None:
    x, weights = drawn(1576, 768, 64)
    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            ops.bottleneck(x, x, *weights, "gelu", 0.5)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = ops.bottleneck(x, x, *weights, "gelu", 0.5)
        for _ in range(3):
            x.normal_()
            graph.replay()
            assert torch.equal(y, ops.bottleneck(x, x, *weights, "gelu", 0.5))


def test_rows_apart_overlapping_or_not_at_multiples_of_16_bytes(path: str) -> None:
    x, weights = drawn(130, 768, 64)
    wider = torch.full((260, 800), torch.nan, dtype=x.dtype, device="cuda")
    with torch.no_grad():
        expected = ops.bottleneck(x, x, *weights, "gelu", 0.5)
        for columns in (slice(8, 776), slice(3, 771)):
            view = wider[::2, columns]
            view.copy_(x)
            assert torch.equal(ops.bottleneck(view, view, *weights, "gelu", 0.5), expected)
        one = x[:1].expand(130, 768)
        found = ops.bottleneck(one, one, *weights, "gelu", 0.5)
        assert torch.equal(found, expected[:1].expand(130, 768))


def test_what_is_not_finite_stays_in_its_row(path: str) -> None:
    x, weights = drawn(130, 768, 60)
    x[7, 5], x[70, 9] = torch.nan, torch.inf
    with torch.no_grad():
        found = ops.bottleneck(x, x, *weights, "relu", 0.5)
    bad = torch.zeros(130, dtype=torch.bool, device="cuda")
    bad[[7, 70]] = True
    assert bool(found[~bad].isfinite().all()) and bool(found[7].isnan().all())
    assert not bool(found[70].isfinite().all())


def test_a_gradient_computed_while_a_forward_is_repeated(path: str) -> None:
    """Checkpointing runs the forward pass again in autograd's own thread."""
    x, weights = drawn(1001, 768, 64)
    leaves = [w.requires_grad_() for w in weights]

    def run(x: torch.Tensor) -> torch.Tensor:
        return ops.bottleneck(x, x, *weights, "gelu", 0.5)

    def gradients(y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(y.float().square().sum(), leaves)

    plain = gradients(run(x))
    again = gradients(torch.utils.checkpoint.checkpoint(run, x, use_reentrant=False))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_a_captured_graph_follows_the_ids_it_meets(triton: None) -> None:
    draw = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(6, 40, 64, generator=draw, device="cuda", dtype=torch.bfloat16)
    down = torch.randn(3, 8, 64, generator=draw, device="cuda")
    up = torch.randn(3, 64, 8, generator=draw, device="cuda")
    ids = torch.tensor([0, 1, 2, -1, 0, 1], device="cuda")

    def run() -> torch.Tensor:
        return ops.mixed_known(x, x, ids, down, None, up, None, "gelu", 0.5)

    with torch.no_grad():
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = run()
        for new in ([0, 1, 2, -1, 0, 1], [2, 2, -1, 0, 0, 0]):
            ids.copy_(torch.tensor(new))
            graph.replay()
            expected = reference.mixed_bottleneck(x, x, ids, down, None, up, None, "gelu", 0.5)
            assert torch.allclose(y.float(), expected.float(), atol=0.1, rtol=0.05)
            assert torch.equal(y[ids < 0], x[ids < 0])


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_by_inductor_whole(dynamic: bool, path: str) -> None:
    given = on_gpu(rounded(Case(130, 768, 64, "bf16")))
    weights = (given["down"], given["down_bias"], given["up"], given["up_bias"])

    def run(x: torch.Tensor) -> torch.Tensor:
        return ops.bottleneck(x, x, *weights, "gelu", 0.5) * 2

    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic)
    for rows in (130, 65):
        x = given["x"][:rows]
        assert torch.allclose(compiled(x).float(), run(x).float(), atol=0.05, rtol=0.02)


def test_ids_out_of_range_end_the_streams_work_without_a_wait() -> None:
    code = (
        "import torch\nfrom mmadapt.ops import bottleneck as ops\n"
        "x = torch.randn(2, 64, device='cuda', dtype=torch.bfloat16)\n"
        "down, up = torch.randn(3, 8, 64).cuda(), torch.randn(3, 64, 8).cuda()\n"
        "ids = torch.tensor([0, 3]).cuda()\n"
        "torch.cuda.synchronize()\ntorch.cuda.set_sync_debug_mode('error')\n"
        "with torch.no_grad():\n"
        "    ids = ops.checked_ids(ids, x, 3)\n"
        "print('not waited for', flush=True)\n"
        "torch.cuda.set_sync_debug_mode('default')\ntorch.cuda.synchronize()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "not waited for" in done.stdout, done.stderr
    assert done.returncode != 0 and "assert" in done.stderr


def test_a_mixed_batch_waits_for_nothing(triton: None) -> None:
    case = Case(130, 256, 16, "bf16", adapters=5, length=26)
    given = on_gpu(rounded(case))
    computed(case, given, False)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        computed(case, given, False)
    finally:
        torch.cuda.set_sync_debug_mode("default")
