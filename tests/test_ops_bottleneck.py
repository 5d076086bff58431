"""The bottleneck operation: its paths, its registration, its choice, and what it refuses."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mmadapt as mm
from mmadapt.errors import OpsError
from mmadapt.ops import bottleneck as ops
from mmadapt.ops import choice, plain, reference, registered
from mmadapt.ops.choice import Case, Choice, Thresholds, choose

C, H, N = 16, 4, 3


def drawn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, requires_grad=True)


def parameters(*several: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Norm's weight and bias, down and its bias, up and its bias."""
    shapes = ((C,), (C,), (H, C), (H,), (C, H), (C,))
    return tuple(drawn(*several, *shape, dtype=dtype) for shape in shapes)


@pytest.fixture(autouse=True)
def unforced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "FORCED", None)


# -- the definition -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("normed", [False, True])
def test_a_cpu_computes_the_references_own_lines(dtype: torch.dtype, normed: bool) -> None:
    weight, bias, *rest = parameters(dtype=torch.float32)
    x, residual = torch.randn(2, 5, C).to(dtype), torch.randn(2, 5, C).to(dtype)
    found = ops.bottleneck(residual, x, *rest, "gelu", 0.7, 0.0, (weight, bias) if normed else None)
    z = reference.layer_norm(x, weight, bias) if normed else x
    change = reference.bottleneck(z, *rest, "gelu", 0.7)
    assert found.dtype == dtype
    assert torch.equal(found, residual + change.to(dtype))
    if not normed:
        assert torch.equal(ops.bottleneck(None, x, *rest, "gelu", 0.7), change)


@pytest.mark.parametrize("activation", sorted(reference.ACTIVATIONS))
@pytest.mark.parametrize("scale", ["number", "trained", "channel"])
def test_the_operator_and_its_gradient_are_the_references(activation: str, scale: str) -> None:
    x, residual, tensors = drawn(2, 5, C), drawn(2, 5, C), parameters()
    s = {"number": 0.7, "trained": drawn(), "channel": drawn(C)}[scale]
    weight, bias, *rest = tensors
    expected = residual + reference.bottleneck(
        reference.layer_norm(x, weight, bias), *rest, activation, s
    )
    found = ops.fused(residual, x, tensors, s, None, activation, torch.float64)
    assert torch.allclose(found, expected, atol=1e-12)
    leaves = [x, residual, *tensors, *([s] if isinstance(s, Tensor) else [])]
    probe = torch.randn_like(expected)
    for new, old in zip(
        torch.autograd.grad((found * probe).sum(), leaves),
        torch.autograd.grad((expected * probe).sum(), leaves),
        strict=True,
    ):
        assert torch.allclose(new, old, atol=1e-10)


def test_a_mixed_batch_is_each_rows_own_bottleneck_and_others_pass() -> None:
    tensors, scale, x = parameters(N), drawn(N), drawn(6, 5, C)
    ids = torch.tensor([2, -1, 0, 2, -1, 0])
    norm, rest = tensors[:2], tensors[2:]
    expected = torch.stack([
        row if n < 0 else ops.bottleneck(
            row, row, *(t[n] for t in rest), "silu", scale[n], 0.0, (norm[0][n], norm[1][n])
        )
        for row, n in zip(x, ids.tolist(), strict=True)
    ])  # fmt: skip
    leaves, probe = [x, scale, *tensors], torch.randn(6, 5, C, dtype=torch.float64)
    before = torch.autograd.grad((expected * probe).sum(), leaves)
    for found in (
        ops.mixed(x, x, ids, *rest, "silu", scale, norm),
        ops.mixed(x, x, ids.tolist(), *rest, "silu", scale, norm),
        ops.fused(x, x, tensors, scale, ids, "silu", torch.float64),
    ):
        assert torch.allclose(found, expected, atol=1e-12)
        assert torch.equal(found[ids < 0], x[ids < 0])
        after = torch.autograd.grad((found * probe).sum(), leaves)
        assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("ids", [None, torch.tensor([2, -1])])
def test_gradients_are_those_of_small_steps(ids: Any) -> None:
    several = () if ids is None else (N,)
    tensors, scale = parameters(*several), drawn(*several, *(() if several else (C,)))

    def run(x: Tensor, residual: Tensor, scale: Tensor, *tensors: Tensor) -> Tensor:
        return ops.fused(residual, x, tensors, scale, ids, "gelu", torch.float64)

    inputs = (drawn(2, 3, C), drawn(2, 3, C), scale, *tensors)
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


def test_backward_keeps_x_and_two_numbers_a_row() -> None:
    x, tensors = drawn(50, C, dtype=torch.float32), parameters(dtype=torch.float32)
    known = {t.data_ptr() for t in (x, *tensors)}
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ops.fused(x, x, tensors, 1.0, None, "gelu", torch.float32)
    assert x.data_ptr() in {tensor.data_ptr() for tensor in kept}
    assert [t.shape for t in kept if t.data_ptr() not in known] == [(50, 2)]


# -- registration -------------------------------------------------------------------------------------


@pytest.mark.parametrize("ids", [None, torch.tensor([2, -1])], ids=["one", "mixed"])
def test_torch_finds_nothing_wrong_with_the_operators(ids: Any) -> None:
    several = () if ids is None else (N,)
    tensors = [t.detach() for t in parameters(*several, dtype=torch.float32)]
    scale, x = torch.randn(*several, C), torch.randn(2, 3, C)
    rest = (*tensors, scale, ids, "gelu", 0.5, 1e-5)
    forward, backward = torch.ops.mmadapt.bottleneck, torch.ops.mmadapt.bottleneck_backward
    torch.library.opcheck(forward.default, (None, x, *rest, True, torch.float32))
    torch.library.opcheck(forward.default, (x, x, *rest, False, torch.float32))
    dy, statistics = forward(None, x, *rest, True, torch.float32)
    for weights in (True, False):
        arguments = (dy, x, statistics, *rest, True, torch.float32, weights)
        torch.library.opcheck(backward.default, arguments)


class Whole(nn.Module):
    """Something before and behind the operator, which is called whatever the device."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors = nn.ParameterList(t.detach() for t in parameters(dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        z = x * 1.5
        return ops.fused(z, z, tuple(self.tensors), 0.5, None, "gelu", torch.float32).tanh()


def gradients(module: nn.Module, run: Any, x: Tensor) -> list[Tensor]:
    module.zero_grad()
    run(x).square().sum().backward()
    return [p.grad.clone() for p in module.parameters() if p.grad is not None]


def test_compiled_whole_for_any_number_of_tokens() -> None:
    module = Whole()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (5, 9):
        x = torch.randn(2, tokens, C)
        assert torch.equal(compiled(x), module(x))
        for new, old in zip(
            gradients(module, compiled, x), gradients(module, module, x), strict=True
        ):
            assert torch.allclose(new, old, atol=1e-6)


@pytest.mark.parametrize("forced", ["triton", "cuda"])
def test_the_choice_compiles_whole(forced: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "FORCED", forced)
    for name in ("unreached_on", "cuda_unreached_on"):
        monkeypatch.setattr(choice, name, torch.compiler.assume_constant_result(lambda d: None))
    half = torch.bfloat16
    x, down, up = torch.randn(2, 3, 64), torch.randn(H, 64) / 8, torch.randn(64, H) / 8
    x, down, up = x.to(half), down.to(half), up.to(half)
    run = torch.compile(
        lambda x: ops.bottleneck(x, x, down, None, up, None, "gelu", 0.5),
        fullgraph=True,
        backend="eager",
    )
    monkeypatch.setattr(registered, "_backend", lambda x: plain)
    asked: list[choice.Case] = []
    monkeypatch.setattr(choice, "cluster_for", lambda case: asked.append(case) or 0)
    expected = x + reference.bottleneck(x, down, None, up, None, "gelu", 0.5)
    assert torch.allclose(run(x), expected, atol=0.05)
    assert len(asked) == 1  # the operator is in the graph, whose kernel is chosen when it runs


def test_exported_it_is_one_node() -> None:
    module, x = Whole(), torch.randn(2, 7, C)
    tokens = torch.export.Dim("tokens", min=2, max=512)
    program = torch.export.export(module, (x,), dynamic_shapes=({1: tokens},))
    names = [str(node.target) for node in program.graph.nodes]
    assert names.count("mmadapt.bottleneck.default") == 1
    other = torch.randn(2, 11, C)
    assert torch.equal(program.module()(other), module(other))


def test_autocast_decides_the_products_and_not_the_residual() -> None:
    tensors = parameters(dtype=torch.float32)
    x = torch.randn(3, C)
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.operands_of(x) == torch.bfloat16
        y = ops.fused(x, x, (None, None, *tensors[2:]), 1.0, None, "gelu", ops.operands_of(x))
        y.sum().backward()
    expected = x + reference.bottleneck(x, *tensors[2:], "gelu", 1.0)
    assert y.dtype == torch.float32
    assert torch.allclose(y, expected, atol=0.1)
    assert not torch.allclose(y, expected, atol=1e-5)
    assert {t.grad.dtype for t in tensors[2:] if t.grad is not None} == {torch.float32}


def test_recomputed_under_checkpointing_gradients_stay() -> None:
    module, x = Whole(), torch.randn(2, 5, C)
    before = gradients(module, module, x)
    again = gradients(module, lambda x: checkpoint(module, x, use_reentrant=False), x)
    assert all(torch.equal(a, b) for a, b in zip(again, before, strict=True))


def test_transforms_of_torch_func_take_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "FORCED", "triton")
    monkeypatch.setattr(choice, "unreached_on", lambda device: None)
    rest = [t.detach() for t in parameters(dtype=torch.float32)[2:]]
    x = torch.randn(4, 6, C)
    with pytest.warns(UserWarning, match=r"a transform of torch\.func is at work"):
        found = torch.vmap(lambda row: ops.bottleneck(row, row, *rest, "gelu", 0.5))(x)
    assert torch.allclose(found, x + reference.bottleneck(x, *rest, "gelu", 0.5), atol=1e-6)


# -- the choice ----------------------------------------------------------------------------------------

CASE = Case(65_536, 768, 768, 64, torch.bfloat16, torch.bfloat16, torch.device("cuda"))
LIMITS = Thresholds(2e7, 128, 96, 32, "somewhere.json")


@pytest.mark.parametrize(
    ("changes", "against"),
    [
        ({}, None),
        ({"dropout": 0.1}, "dropout"),
        ({"functorch": True}, "functorch"),
        ({"activation": "softplus"}, "activation"),
        ({"tokens": 0}, "empty"),
        ({"dtype": torch.float64, "operands": torch.float64}, "dtype"),
        ({"dtype": torch.float32, "norm": True}, "rounding"),
        ({"width": 129}, "width"),
        ({"channels": 770}, "channels"),
        ({"channels_in": 12}, "channels"),
        ({"last_contiguous": False}, "layout"),
        ({"width": 97}, "products"),
        ({"width": 97, "training": False}, None),
        ({"width": 33, "dtype": torch.float32, "operands": torch.float32}, "products"),
        ({"tokens": 100}, "launch"),
    ],
)
def test_a_kernel_runs_where_it_fits_and_was_measured_faster(
    changes: dict[str, Any], against: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "unreached_on", lambda device: None)
    monkeypatch.setattr(choice, "thresholds_on", lambda device: LIMITS)
    case = CASE._replace(**changes)
    found = choose(case)
    assert found == Choice("reference" if against else "triton", False, against)
    assert found.why(case)


def test_without_a_measurement_no_kernel_is_chosen_by_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(choice, "unreached_on", lambda device: None)
    assert choice.MEASURED == {}
    assert choose(CASE) == Choice("reference", False, "unmeasured")
    monkeypatch.setattr(choice, "FORCED", "triton")
    assert choose(CASE) == Choice("triton", True, None)


def test_a_forced_kernel_falls_back_where_it_cannot_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(choice, "FORCED", "triton")
    monkeypatch.setattr(choice, "unreached_on", lambda device: None)
    choice._say_once.cache_clear()
    down, up, x = torch.randn(200, C), torch.randn(C, 200), torch.randn(3, C)
    expected = x + reference.bottleneck(x, down, None, up, None, "relu", 1.0)
    with pytest.warns(UserWarning, match="200 wide, and the kernels' registers hold 128") as seen:
        outputs = [ops.bottleneck(x, x, down, None, up, None, "relu", 1.0) for _ in range(2)]
    assert len(seen) == 1
    assert torch.equal(outputs[0], expected) and torch.equal(outputs[1], expected)


@pytest.mark.parametrize(
    ("changes", "against", "instead"),
    [
        ({}, None, "cuda"),
        ({"dtype": torch.float16, "operands": torch.float16}, None, "cuda"),
        ({"residual": torch.bfloat16}, None, "cuda"),
        ({"norm": True, "training": True, "tokens": 1}, None, "cuda"),
        ({"mixed": True}, "mixed", "triton"),
        ({"residual": torch.float32}, "halves", "triton"),
        ({"dtype": torch.float32}, "halves", "triton"),
        ({"dtype": torch.float32, "operands": torch.float32}, "halves", "triton"),
        ({"channels_in": 512}, "chunks", "triton"),
        ({"channels": 520, "channels_in": 520}, "chunks", "triton"),
        ({"channels": 8192, "channels_in": 8192}, "memory", "triton"),
        ({"width": 129}, "width", "reference"),
        ({"dropout": 0.1}, "dropout", "reference"),
        ({"last_contiguous": False}, "layout", "reference"),
        ({"dtype": torch.float64, "operands": torch.float64}, "dtype", "reference"),
    ],
)
def test_the_cuda_path_leaves_to_triton_what_it_cannot_and_says_so_once(
    changes: dict[str, Any], against: str | None, instead: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "FORCED", "cuda")
    monkeypatch.setattr(choice, "unreached_on", lambda device: None)
    monkeypatch.setattr(choice, "cuda_unreached_on", lambda device: None)
    choice._say_once.cache_clear()
    case = CASE._replace(**changes)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert [choose(case) for _ in range(2)] == [Choice(instead, True, against)] * 2
    assert len(seen) == (against is not None)
    if against:
        assert str(seen[0].message).startswith(
            "Triton computes" if instead == "triton" else "the reference computes"
        )
        assert choice.REASONS[against](case) in str(seen[0].message)
    assert choice.cluster_for(case) == (0 if against else choice.CLUSTER)


def test_the_cuda_path_is_chosen_by_itself_only_where_it_was_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(choice, "unreached_on", lambda device: None)
    monkeypatch.setattr(choice, "cuda_unreached_on", lambda device: None)
    for limits, path in (
        (None, "reference"),
        (LIMITS, "triton"),
        (dataclasses.replace(LIMITS, cluster=2), "cuda"),
    ):
        monkeypatch.setattr(choice, "thresholds_on", lambda device, limits=limits: limits)
        assert choose(CASE).path == path
        assert choice.cluster_for(CASE) == (2 if path == "cuda" else 0)
    assert choose(CASE._replace(mixed=True)).path == "triton"
    for forced in ("triton", "reference"):
        monkeypatch.setattr(choice, "FORCED", forced)
        assert choose(CASE).path == forced and choice.cluster_for(CASE) == 0


def test_a_path_that_is_not_there_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "FORCED", "tritn")
    x, tensors = torch.randn(3, C), parameters(dtype=torch.float32)
    with pytest.raises(OpsError, match="expected reference, triton, cuda"):
        ops.bottleneck(x, x, *tensors[2:], "gelu", 1.0)


def test_the_cuda_path_on_a_cpu_is_the_references(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "FORCED", "cuda")
    choice._say_once.cache_clear()
    x, tensors = torch.randn(3, C), parameters(dtype=torch.float32)
    with pytest.warns(UserWarning, match="MMADAPT_OPS asks for cuda, but on a CPU"):
        found = ops.bottleneck(x, x, *tensors[2:], "gelu", 1.0)
    assert torch.equal(found, x + reference.bottleneck(x, *tensors[2:], "gelu", 1.0))


@pytest.mark.slow
def test_the_environment_forces_a_path() -> None:
    code = (
        "import torch, mmadapt as mm\nfrom mmadapt.ops import choice\n"
        "print(choice.FORCED, mm.ops.explain(10, 16, 4).why)"
    )
    env = {**os.environ, "MMADAPT_OPS": "reference"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout == "reference MMADAPT_OPS asks for reference\n", done.stderr


def test_explain_says_which_path_and_why_in_text_and_in_a_notebook() -> None:
    found = mm.ops.explain(65_536, 768, 64, dtype=torch.bfloat16, norm=True)
    assert found.path == "reference"
    assert str(found).startswith("reference: on a CPU torch's own operations are the fast path\n")
    assert "bfloat16[65,536, 768] on cpu" in str(found)
    assert "unmeasured on this device" in str(found)
    assert "Triton here" in str(found) and "CUDA here" in str(found)
    assert found._repr_html_().startswith("<div><b>reference</b>: on a CPU torch&#x27;s own")
    on_apple = mm.ops.explain(10, 16, 4, device="mps")
    assert on_apple.why == "the kernels are for NVIDIA's devices, not for 'mps'"


# -- what has no answer ----------------------------------------------------------------------------------


@pytest.mark.parametrize("forced", [None, "reference"])
def test_integers_are_refused(forced: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "FORCED", forced)
    x, tensors = torch.ones(3, C, dtype=torch.int64), parameters(dtype=torch.float32)
    with pytest.raises(OpsError, match="x is int64, and a bottleneck is for hidden states"):
        ops.bottleneck(None, x, *tensors[2:], "gelu", 1.0)


def test_shapes_and_devices_that_do_not_fit_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "FORCED", "reference")
    _, _, *rest = (t.detach() for t in parameters(dtype=torch.float32))
    x = torch.randn(3, C)
    with pytest.raises(OpsError, match="x has 8 channels and the bottleneck reads 16"):
        ops.bottleneck(None, torch.randn(3, 8), *rest, "gelu", 1.0)
    with pytest.raises(OpsError, match=r"the residual is \(2, 16\), expected \(3, 16\)"):
        ops.bottleneck(x[:2], x, *rest, "gelu", 1.0)
    with pytest.raises(OpsError, match="tensors lie on cpu, meta"):
        ops.bottleneck(x, x, rest[0].to("meta"), *rest[1:], "gelu", 1.0)


@pytest.mark.parametrize("shape", [(0, C), (2, 0, C), (0, 5, C)])
def test_nothing_gives_nothing_and_gradients_of_zero(shape: tuple[int, ...]) -> None:
    tensors = parameters(dtype=torch.float32)
    x = torch.randn(shape, requires_grad=True)
    for y in (
        ops.bottleneck(x, x, *tensors[2:], "gelu", 1.0, 0.0, tensors[:2]),  # type: ignore[arg-type]
        ops.fused(x, x, tensors, 1.0, None, "gelu", torch.float32),
    ):
        assert y.shape == shape
        for gradient in torch.autograd.grad(y.sum(), [x, *tensors]):
            assert not gradient.any()


@pytest.mark.parametrize("how", ["apart", "crossed", "overlapping", "channels first"])
def test_any_layout_in_memory_gives_the_same(how: str) -> None:
    tensors = tuple(t.detach() for t in parameters(dtype=torch.float32))
    base = torch.randn(6, 4, C)
    x = {
        "apart": base[::2],
        "crossed": base.transpose(0, 1),
        "overlapping": base[:1].expand(5, 4, C),
        "channels first": torch.randn(3, C, 4).movedim(1, -1),
    }[how]
    assert not x.is_contiguous()
    whole = x.contiguous()
    for run in (
        lambda x: ops.bottleneck(x, x, *tensors[2:], "gelu", 0.5, 0.0, tensors[:2]),  # type: ignore[arg-type]
        lambda x: ops.fused(x, x, tensors, 0.5, None, "gelu", torch.float32),
    ):
        assert torch.allclose(run(x), run(whole), atol=1e-6)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_what_is_not_finite_stays_in_its_row(value: float, activation: str) -> None:
    tensors = tuple(t.detach() for t in parameters(dtype=torch.float32))
    x = torch.randn(5, C)
    x[2, 3] = value
    expected = ops.bottleneck(x, x, *tensors[2:], activation, 0.5)
    found = ops.fused(x, x, (None, None, *tensors[2:]), 0.5, None, activation, torch.float32)
    assert torch.allclose(found, expected, atol=1e-5, equal_nan=True)
    others = torch.arange(5) != 2
    assert bool(found[others].isfinite().all())


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([0, 3], "ids reach from 0 to 3, and there are 3 adapters"),
        ([-2, 0], "ids reach from -2 to 0"),
        ([0], r"ids are int64\[1\], expected a whole number for each of 2 rows"),
        ([0.0, 1.0], r"ids are float32\[2\]"),
    ],
)
def test_ids_out_of_range_are_refused(ids: Any, message: str) -> None:
    tensors = [t.detach() for t in parameters(N, dtype=torch.float32)[2:]]
    x = torch.randn(2, 5, C)
    with pytest.raises(OpsError, match=message):
        ops.mixed(x, x, torch.tensor(ids), *tensors, "gelu", 1.0)


def test_ids_known_on_the_device_alone_are_refused_there() -> None:
    ids = torch.tensor([0, 3])
    run = torch.compile(
        lambda ids: ops.checked_ids(ids, torch.zeros(2, 1), 3) + 0,
        fullgraph=True,
        backend="aot_eager",
    )
    assert run(torch.tensor([-1, 2])).tolist() == [-1, 2]
    with pytest.raises(RuntimeError, match="an id of a mixed batch is out of range"):
        run(ids)
