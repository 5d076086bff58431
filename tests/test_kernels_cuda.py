"""The CUDA forward pass: what its source computes on a CPU, what it compiles to, how it is launched."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from emulated import COMPILER, Emulator
from interpreted import Case, computed, rounded
from mmadapt.kernels.cuda import compiler, cubins, driver, launch
from mmadapt.kernels.cuda.instance import SHARED, Arguments, Instance, fits, instance_for
from mmadapt.kernels.settings import NUMBERS, PROCESSORS
from test_kernels import BOUNDS, KINKED
from torch import Tensor

from mmadapt.errors import OpsError
from mmadapt.ops import bottleneck as ops
from mmadapt.ops import choice
from mmadapt.ops.reference import ACTIVATIONS

#: of y alone, against float64 with the same rounded inputs
ROUNDED_ONCE = {"f16": 6e-4, "bf16": 3e-3}


class Plan(NamedTuple):
    """A case and how it is cut into tiles, stages and clusters."""

    case: Case
    warps: int
    buffers: int
    stages: int
    cluster: int
    #: clusters that a device would hold at a time; they stay until no tile is left
    clusters: int = 1

    @property
    def instance(self) -> Instance:
        case = self.case
        found = instance_for(
            case.rows,
            case.channels_in,
            case.width,
            processors=PROCESSORS,
            number={"bf16": "Bfloat16", "f16": "Float16"}[case.dtype],
            norm=case.norm,
            activation=NUMBERS[case.activation],
            residual="other" if case.channels else "same",
        )
        assert found is not None
        return found._replace(**self.cut)

    @property
    def cut(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in ("warps", "buffers", "stages", "cluster")}


QUICK = (
    Plan(Case(37, 64, 12, "bf16"), 1, 2, 4, 4),
    Plan(Case(21, 64, 16, "f16", "relu", False, "channel", channels=64), 1, 2, 4, 4),
)
SLOW = (
    Plan(Case(45, 128, 16, "bf16"), 2, 2, 3, 1),
    Plan(Case(37, 64, 64, "bf16", "relu", norm=False), 1, 1, 2, 1),
    Plan(Case(70, 192, 32, "bf16", "silu", scale="channel"), 2, 1, 4, 1, 2),
    Plan(Case(100, 128, 64, "bf16", "tanh"), 2, 2, 2, 1),
    Plan(Case(197, 256, 10, "f16", "identity"), 4, 2, 3, 1, 2),
    Plan(Case(61, 128, 64, "bf16", "quick_gelu", channels=128), 1, 2, 2, 2),
    Plan(Case(150, 128, 50, "f16", "gelu_new", bias=False), 1, 2, 3, 4),
    Plan(Case(93, 256, 32, "bf16", norm=False, channels=256), 1, 1, 2, 2, 2),
    Plan(Case(300, 64, 128, "bf16", "relu"), 2, 2, 2, 4),
    Plan(Case(1, 64, 5, "f16", "silu"), 1, 2, 4, 4),
    Plan(Case(100, 320, 64, "bf16", offset=30.0), 4, 1, 2, 1),
    Plan(Case(100, 320, 64, "f16", offset=3.0), 2, 1, 3, 2),
)

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="g++ is not installed here")
needs_nvrtc = pytest.mark.skipif(
    compiler.missing() is not None, reason="torch brought no NVRTC here"
)


@pytest.fixture(autouse=True)
def filled_with_nan() -> Iterator[None]:
    """What is allocated and not written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    return Emulator([plan.instance for plan in QUICK], tmp_path_factory.mktemp("quick"))


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    return Emulator([plan.instance for plan in SLOW], tmp_path_factory.mktemp("slow"))


@contextlib.contextmanager
def emulating(emulator: Emulator, plan: Plan) -> Iterator[None]:
    """The CUDA path, with the emulator in the driver's place and the plan's tiles."""

    def cut(*arguments: Any, **options: Any) -> Instance | None:
        found = instance_for(*arguments, **options)
        return found and found._replace(**plan.cut)

    emulator.clusters = plan.clusters
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choice, "FORCED", "cuda")
        patch.setattr(choice, "cuda_unreached_on", lambda device: None)
        patch.setattr(launch, "instance_for", cut)
        patch.setattr(driver, "start", emulator.start)
        yield


def found_and_exact(emulator: Emulator, plan: Plan) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    given = rounded(plan.case)
    with emulating(emulator, plan):
        found = computed(plan.case, given, False)
    return found, computed(plan.case, given, True)


def is_the_references(emulator: Emulator, plan: Plan) -> None:
    case = plan.case
    found, exact = found_and_exact(emulator, plan)
    bound = (KINKED if case.activation == "relu" else BOUNDS)[case.dtype]
    errors = {
        name: float((found[name].double() - value).norm() / value.norm().clamp_min(1e-12))
        for name, value in exact.items()
    }
    assert {name: error for name, error in errors.items() if not error <= bound} == {}
    assert errors["y"] <= ROUNDED_ONCE[case.dtype]


# -- on a CPU -------------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("plan", QUICK, ids=lambda plan: plan.case.key)
def test_outputs_are_the_references_and_so_are_gradients_made_of_them(
    plan: Plan, quick: Emulator
) -> None:
    is_the_references(quick, plan)
    assert quick.shared(plan.instance) == plan.instance.shared


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("plan", SLOW, ids=lambda plan: plan.case.key)
def test_and_for_other_tiles_and_clusters_in_any_order_of_copies(
    plan: Plan, slow: Emulator
) -> None:
    assert slow.shared(plan.instance) == plan.instance.shared
    slow.seed = 0
    is_the_references(slow, plan)
    first = found_and_exact(slow, plan)[0]["y"]
    for seed in range(1, 5):
        slow.seed = seed
        assert torch.equal(found_and_exact(slow, plan)[0]["y"], first)


def test_every_activation_is_tried() -> None:
    assert {plan.case.activation for plan in (*QUICK, *SLOW)} == set(ACTIVATIONS)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("forward.run();", "forward.run();"),
        ("copies_fence();", ""),
        ("copies_wait_read();", ""),
        ("copies_wait();", ""),
        ("copies_commit();", ""),
        ("barrier_init(emptied + i, WARPS * CLUSTER);", "barrier_init(emptied + i, WARPS);"),
        ("if (CLUSTER > 1) cluster_meet();  // others", "// others"),
        ("turn = {0, turn.parity ^ 1}", "turn = {0, turn.parity}"),
        ("if (lane < count)", "if (lane < 16)"),
        ("stage + rank * share, from + rank", "stage, from + rank"),
        ("value[row][odd] = used ?", "value[row][odd] = true ?"),
        ("barrier_wait(filled + turn.stage, turn.parity);", ""),
    ],
)
def test_a_broken_kernel_is_found_out(old: str, new: str, tmp_path: Path) -> None:
    plan = Plan(Case(150, 64, 10, "bf16", "tanh", norm=False, channels=64), 2, 2, 2, 2)
    given = rounded(plan.case)
    given["x"][3, 5] = torch.inf  # whose row is the reference's if no unit is computed beyond 10
    with torch.no_grad():
        expected = in_words(given)

    def is_whole() -> bool:
        try:
            with emulating(emulator, plan), torch.no_grad():
                y = in_words(given)
        except RuntimeError:
            return False
        return torch.allclose(y, expected, atol=0.05, rtol=0.05, equal_nan=True)

    emulator = Emulator([plan.instance], tmp_path, [(old, new)])
    results = []
    for emulator.seed in range(20):
        results.append(is_whole())
    # the first of them changes nothing
    assert all(results) if old == new else not all(results)


def in_words(given: dict[str, Any]) -> Tensor:
    """The sum of a case's own residual and the bottleneck of its x without a norm, by the path there is."""
    weights = (given["down"], given["down_bias"], given["up"], given["up_bias"], "tanh")
    return ops.bottleneck(given["residual"], given["x"], *weights, 0.7)


@needs_compiler
@pytest.mark.parametrize("how", ["apart", "off", "overlapping", "axes"])
def test_any_layout_in_memory_gives_the_same_bits(how: str, quick: Emulator) -> None:
    plan = QUICK[0]
    given = rounded(plan.case)
    weights = (given["down"], given["down_bias"], given["up"], given["up_bias"], "gelu", 0.7, 0.0)
    norm = (given["norm_weight"], given["norm_bias"])
    wider = torch.full((74, 80), torch.nan, dtype=torch.bfloat16)
    x = {
        "apart": wider[::2, 8:72],
        "off": wider[::2, 3:67],  # rows that begin at odd addresses
        "overlapping": given["x"][:1].expand(37, 64),
        "axes": torch.randn(3, 5, 64).bfloat16().transpose(0, 1),
    }[how]
    if how in ("apart", "off"):
        x.copy_(given["x"])
    with emulating(quick, plan), torch.no_grad():
        found = ops.bottleneck(x, x, *weights, norm)
        whole = x.contiguous()
        expected = ops.bottleneck(whole, whole, *weights, norm)
    assert torch.equal(found, expected) and bool(found.isfinite().all())


@needs_compiler
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_so_where_the_reference_has_it(value: float, quick: Emulator) -> None:
    plan = QUICK[1]
    given = rounded(plan.case)
    given["x"][2, 3] = value
    weights = (given["down"], given["down_bias"], given["up"], given["up_bias"], "relu", 0.7)
    with emulating(quick, plan), torch.no_grad():
        found = ops.bottleneck(given["residual"], given["x"], *weights)
    expected = ops.bottleneck(given["residual"], given["x"], *weights)
    assert not bool(expected.isfinite().all())
    assert torch.allclose(found, expected, atol=0.02, equal_nan=True)


@needs_compiler
def test_torch_finds_nothing_wrong_with_the_operator_on_this_path(quick: Emulator) -> None:
    given = rounded(QUICK[0].case)
    names = ("norm_weight", "norm_bias", "down", "down_bias", "up", "up_bias", "scale")
    rest = (*(given[name] for name in names), None, "gelu", 1.0, 1e-5, True, torch.bfloat16)
    with emulating(quick, QUICK[0]):
        torch.library.opcheck(torch.ops.mmadapt.bottleneck.default, (None, given["x"], *rest))


# -- shapes and what they take ---------------------------------------------------------------------------


def test_what_fits_takes_no_more_than_there_is() -> None:
    for channels in range(64, 8193, 64):
        for width in (1, 16, 33, 64, 128):
            for rows in (1, 1576, 65_536):
                found = instance_for(rows, channels, width, processors=PROCESSORS)
                assert (found is not None) == fits(channels, width)
                if found:
                    assert found.shared <= SHARED and found.width >= width
                    assert found.stages >= 2 and found.rows * found.channels > 0
    assert fits(4096, 128) and fits(5120, 128) and not fits(8192, 16)


def test_few_rows_are_cut_into_as_many_tiles_as_there_are_processors() -> None:
    few = instance_for(1576, 768, 64, processors=132)
    many = instance_for(65_536, 768, 64, processors=132)
    assert few and many and (few.rows, many.rows) == (16, 64)


def test_packed_weights_are_those_that_were_given_with_zeros_behind() -> None:
    down, up = torch.randn(12, 128), torch.randn(128, 12)
    to_down, to_up = launch.packed(down, up)
    assert to_down.shape == (2, 16, 72) and to_up.shape == (2, 64, 24)
    assert torch.equal(to_down[:, :12, :64].transpose(0, 1).reshape(12, 128), down)
    assert torch.equal(to_up[:, :, :12].reshape(128, 12), up)
    assert not to_down[:, 12:].any() and not to_up[:, :, 12:].any()


# -- ahead of time ----------------------------------------------------------------------------------------


@needs_nvrtc
def test_nvrtc_compiles_it_without_a_header() -> None:
    instance = QUICK[0].instance
    found = compiler.compile_(instance.expression, "sm_90a")
    assert found.cubin.startswith(b"\x7fELF") and found.function.startswith(
        "_Z18bottleneck_forward"
    )


@needs_nvrtc
def test_what_nvrtc_refuses_is_an_error_with_its_own_words() -> None:
    with pytest.raises(OpsError, match=r"did not compile bottleneck_forward<Bfloat16, 65") as seen:
        compiler.compile_(QUICK[0].instance._replace(channels=65).expression, "sm_90a")
    assert "chunks and fragments are whole" in str(seen.value)
    assert "set MMADAPT_OPS to 'triton'" in seen.value.hint


@pytest.mark.slow
@needs_nvrtc
@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="cuobjdump comes with Triton"
)
@pytest.mark.parametrize("architecture", [90, 100])
def test_no_instance_uses_local_memory(architecture: int) -> None:
    from mmadapt.kernels.compile_ahead import CLUSTERS, compiled_cluster

    for case, size in CLUSTERS:
        found = compiled_cluster(case, size, architecture)
        assert found.spilled == 0, found
        # a block has to find its registers on a processor
        assert found.registers <= 255 and found.registers * found.tiles.threads <= 65_536
        assert found.tensor_cores >= found.tiles.width, found


# -- the driver -------------------------------------------------------------------------------------------


class RecordedDriver:
    """Stands for the driver's library: there is none without a GPU."""

    def __init__(self, clusters: int = 3, broken: str = "") -> None:
        self.clusters, self.broken = clusters, broken
        self.called: list[str] = []
        self.shared = 0
        self.launched: list[tuple[list[int], Arguments]] = []

    def __getattr__(self, name: str) -> Callable[..., int]:
        def call(*arguments: Any) -> int:
            self.called.append(name)
            if name == self.broken:
                return 200
            if name == "cuOccupancyMaxActiveClusters":
                arguments[0]._obj.value = self.clusters
            if name == "cuFuncSetAttribute":
                self.shared = arguments[2]
            if name == "cuGetErrorString":
                arguments[1]._obj.value = b"device kernel image is invalid"
            if name == "cuLaunchKernel":
                assert arguments[8].value == 5  # torch's current stream
                given = Arguments.from_address(arguments[9][0])
                self.launched.append((list(arguments[1:8]), Arguments.from_buffer_copy(given)))
            return 0

        return call


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[RecordedDriver]:
    library = RecordedDriver()
    monkeypatch.setattr(driver, "_driver", lambda: library)
    monkeypatch.setattr(driver, "kept", lambda *of: compiler.Compiled(b"\x7fELF", "name"))
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=5))
    driver._loaded.cache_clear()
    yield library
    driver._loaded.cache_clear()


@pytest.mark.parametrize(("rows", "blocks"), [(1, 4), (64, 4), (65, 8), (1000, 12)])
def test_launched_are_whole_clusters_as_many_as_the_device_holds(
    rows: int, blocks: int, recorded: RecordedDriver
) -> None:
    instance = QUICK[0].instance  # four tiles of 16 rows a cluster
    given = Arguments(x=1, rows=rows, width=12, factor=0.5)
    driver.start(instance, given, torch.device("cuda"))
    driver.start(instance, given, torch.device("cuda"))
    assert recorded.called.count("cuModuleLoadData") == 1  # the second launch finds it loaded
    assert recorded.shared == instance.shared
    for sizes, arguments in recorded.launched:
        assert sizes == [blocks, 1, 1, 64, 1, 1, instance.shared]
        assert (arguments.x, arguments.rows, arguments.width) == (1, rows, 12)
        assert arguments.factor == 0.5
    assert len(recorded.launched) == 2


def test_a_driver_that_fails_is_quoted_and_nothing_is_kept(recorded: RecordedDriver) -> None:
    recorded.broken = "cuModuleLoadData"
    given = Arguments(rows=1)
    with pytest.raises(OpsError, match="the CUDA driver says device kernel image is invalid"):
        driver.start(QUICK[0].instance, given, torch.device("cuda"))
    assert not recorded.launched
    recorded.broken = ""
    driver.start(QUICK[0].instance, given, torch.device("cuda"))
    assert len(recorded.launched) == 1


def test_arguments_are_laid_out_as_in_the_kernel() -> None:
    text = compiler.source()
    body = text.split("struct Arguments {")[1].split("};")[0]
    lines = [line.split("//")[0].strip().rstrip(";") for line in body.splitlines()]
    names: list[str] = []
    kinds = {"*": ctypes.c_void_p, "l": ctypes.c_longlong, "f": ctypes.c_float, "i": ctypes.c_int}
    fields = []
    for line in filter(None, lines):
        for name in line.replace("*", " ").split(",") if "*" not in line else [line]:
            names.append(name.split()[-1].lstrip("*"))
            mark = "*" if "*" in line else line[0]
            fields.append((names[-1], kinds[mark]))
    assert fields == [tuple(field) for field in Arguments._fields_]


def test_without_nvrtc_or_driver_the_reason_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "_libraries", lambda: iter(["libno-such-nvrtc.so"]))
    monkeypatch.setattr(driver.ctypes, "CDLL", _no_library)
    for cached in (compiler._nvrtc, driver._driver, choice._missing_for_cuda):
        cached.cache_clear()
    try:
        assert "NVRTC, which compiles the CUDA kernel" in (compiler.missing() or "")
        assert "driver library, which launches" in (driver.missing() or "")
        case = choice.Case(9, 64, 64, 8, torch.bfloat16, torch.bfloat16, torch.device("cuda"))
        assert "NVRTC" in choice.REASONS["no cuda"](case)
    finally:
        for cached in (compiler._nvrtc, driver._driver, choice._missing_for_cuda):
            cached.cache_clear()


def _no_library(name: str) -> None:
    raise OSError(f"{name}: cannot open shared object file")


def test_digests_depend_on_all_that_the_machine_code_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "version", lambda: (13, 0))
    digests = [cubins.digest("a<1>", "sm_90a")]
    digests += [cubins.digest("a<2>", "sm_90a"), cubins.digest("a<1>", "sm_100a")]
    for name, value in (
        ("version", lambda: (13, 1)),
        ("OPTIONS", ("-G",)),
        ("source", lambda: "x"),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(compiler, name, value)
            digests.append(cubins.digest("a<1>", "sm_90a"))
    assert len(set(digests)) == len(digests)
    assert cubins.digest("a<1>", "sm_90a") == digests[0]
