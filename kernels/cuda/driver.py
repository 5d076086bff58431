"""Loading and launching compiled kernels through the driver's own interface, on torch's current stream."""

from __future__ import annotations

import ctypes
import functools
import sys
from typing import Any, NamedTuple

import torch

from mmadapt.errors import OpsError

from .cubins import kept
from .instance import ARCHITECTURES, Arguments, Instance

_MOST_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


class Loaded(NamedTuple):
    """A kernel on one device, and how many of its clusters the device holds at a time."""

    function: ctypes.c_void_p
    clusters: int


class _Launch(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = [
        *((f"{what}_{axis}", ctypes.c_uint) for what in ("grid", "block") for axis in "xyz"),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("attribute_count", ctypes.c_uint),
    ]


def missing() -> str | None:
    """Why nothing can be launched here, or None."""
    try:
        _driver()
    except OSError:
        return "NVIDIA's driver library, which launches the CUDA kernel, is not here"
    return None


def start(instance: Instance, arguments: Arguments, device: torch.device) -> None:
    """Launch on the device's current stream, as many blocks as it holds or as there are tiles."""
    with torch.cuda.device(device):
        loaded = _loaded(instance, torch.cuda.current_device())
        tiles = -(-arguments.rows // instance.rows)
        clusters = min(-(-tiles // instance.cluster), loaded.clusters)
        parameters = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        _check(
            _driver().cuLaunchKernel(
                loaded.function,
                *(clusters * instance.cluster, 1, 1),
                *(instance.threads, 1, 1),
                instance.shared,
                stream,
                parameters,
                None,
            )
        )


@functools.cache
def _loaded(instance: Instance, index: int) -> Loaded:
    """The kernel in the context that torch uses on this device."""
    driver = _driver()
    _enter_context(index)
    architecture = ARCHITECTURES[torch.cuda.get_device_capability(index)]
    compiled = kept(instance.expression, architecture)
    module, function, clusters = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_int()
    _check(driver.cuModuleLoadData(ctypes.byref(module), compiled.cubin))
    name = compiled.function.encode()
    _check(driver.cuModuleGetFunction(ctypes.byref(function), module, name))
    _check(driver.cuFuncSetAttribute(function, _MOST_SHARED, instance.shared))
    launch = _Launch(
        *(instance.cluster, 1, 1, instance.threads, 1, 1),
        shared=instance.shared,
    )
    _check(
        driver.cuOccupancyMaxActiveClusters(ctypes.byref(clusters), function, ctypes.byref(launch))
    )
    return Loaded(function, max(1, clusters.value))


def _enter_context(index: int) -> None:
    """Make torch's context this thread's, where torch has not done so yet."""
    driver, context, device = _driver(), ctypes.c_void_p(), ctypes.c_int()
    _check(driver.cuCtxGetCurrent(ctypes.byref(context)))
    if not context:
        _check(driver.cuDeviceGet(ctypes.byref(device), index))
        _check(driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device))
        _check(driver.cuCtxSetCurrent(context))


def _check(status: int) -> None:
    if status:
        said = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(said))
        raise OpsError(
            f"the CUDA driver says {(said.value or b'error ' + str(status).encode()).decode()}",
            "set MMADAPT_OPS to 'triton' or 'reference'",
        )


@functools.cache
def _driver() -> Any:
    """The library, initialised by torch; OSError where there is none."""
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
