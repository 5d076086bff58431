"""The fused kernels on a GPU: `pytest -m gpu`. Without one every test here is skipped, and says so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from interpreted import QUICK, SLOW, Case, computed, rounded
from test_kernels import BOUNDS, KINKED

from mmadapt.ops import bottleneck as ops
from mmadapt.ops import choice, reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="there is no GPU here, and the kernels run on one"
    ),
]


@pytest.fixture(autouse=True)
def forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "FORCED", "triton")


def on_gpu(given: dict[str, Any]) -> dict[str, Any]:
    return {n: v.cuda() if isinstance(v, torch.Tensor) else v for n, v in given.items()}


@pytest.mark.parametrize("case", [*QUICK, *SLOW], ids=lambda case: case.key)
def test_outputs_and_gradients_are_the_references(case: Case) -> None:
    bound = (KINKED if case.activation == "relu" else BOUNDS)[case.dtype]
    given = rounded(case)
    exact, found = computed(case, given, True), computed(case, on_gpu(given), False)
    for name, value in exact.items():
        error = (found[name].double().cpu() - value).norm() / value.norm().clamp_min(1e-12)
        assert float(error) <= bound, name


def test_the_same_bits_every_time() -> None:
    given = on_gpu(rounded(Case(1001, 768, 64, "bf16")))
    once, twice = (computed(Case(1001, 768, 64, "bf16"), given, False) for _ in range(2))
    assert all(torch.equal(once[name], twice[name]) for name in once)


def test_a_captured_graph_follows_the_ids_it_meets() -> None:
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
def test_compiled_by_inductor_whole(dynamic: bool) -> None:
    given = on_gpu(rounded(Case(130, 768, 64, "bf16")))
    weights = (given["down"], given["down_bias"], given["up"], given["up_bias"])

    def run(x: torch.Tensor) -> torch.Tensor:
        return ops.bottleneck(x, x, *weights, "gelu", 0.5) * 2

    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic)
    for rows in (130, 65):
        x = given["x"][:rows]
        assert torch.allclose(compiled(x).float(), run(x).float(), atol=0.05, rtol=0.02)


def test_a_mixed_batch_waits_for_nothing() -> None:
    case = Case(130, 256, 16, "bf16", adapters=5, length=26)
    given = on_gpu(rounded(case))
    computed(case, given, False)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        computed(case, given, False)
    finally:
        torch.cuda.set_sync_debug_mode("default")
