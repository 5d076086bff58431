"""Weights from files, without running anything they hold and without a copy: built empty, mapped, assigned."""

from __future__ import annotations

import contextlib
import importlib
import pickle
import re
import threading
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmadapt.errors import ChecksumError, ZooError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

PICKLED = (".bin", ".pt", ".pth", ".ckpt")
#: building replaces a method of every module for a while: one thread at a time
_BUILDING = threading.RLock()


@contextlib.contextmanager
def without_values() -> Iterator[None]:
    """Modules built inside have parameters on the meta device, which cost nothing, and real buffers.

    Buffers are what files often leave out (masks, positions), so they are computed as the module computes
    them. The global random state is left alone. Other threads wait until this one has built.
    """
    import torch
    from torch import nn

    _BUILDING.acquire()
    register = nn.Module.register_parameter
    here = threading.get_ident()

    def bare(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and threading.get_ident() == here:
            param = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
        register(self, name, param)

    nn.Module.register_parameter = bare
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        nn.Module.register_parameter = register
        _BUILDING.release()


def fill(
    model: nn.Module, tensors: dict[str, Tensor], source: Path, dtype: torch.dtype | None = None
) -> None:
    """Give an empty model its tensors, as they lie in the file where their precision is the model's.

    Every tensor has to be there and no other; nothing is left without values.
    """
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    ready = {}
    for name, tensor in tensors.items():
        wanted = dtype or (own[name].dtype if name in own else tensor.dtype)
        floats = tensor.is_floating_point() and wanted.is_floating_point
        ready[name] = tensor.to(wanted) if floats else tensor
    try:
        model.load_state_dict(ready, assign=True)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:]]
        told = "; ".join(line if len(line) < 300 else line[:300] + "…" for line in lines[:6])
        raise ZooError(
            f"{source} does not fit a {type(model).__name__}: {told}",
            "is it another size of the model, or a file of another library?",
        ) from None
    empty = [name for name, p in [*model.named_parameters(), *model.named_buffers()] if p.is_meta]
    if empty:
        raise ZooError(
            f"{source} left {len(empty)} tensors of {type(model).__name__} without values: "
            + ", ".join(empty[:6]),
            "this is a defect of the entry or of mmadapt; please report it",
        )
    if dtype is not None:
        model.to(dtype)


def read(path: Path, allowed: Sequence[str] = ()) -> dict[str, Tensor]:
    """The tensors of a safetensors or pickled file, mapped from the disk where its format allows.

    A pickled file is read with `weights_only=True`; of classes beyond tensors it may name those in
    `allowed` only, and others are listed before anything is read.
    """
    if path.suffix == ".safetensors":
        require_safetensors(path)
        from safetensors.torch import load_file

        return load_file(path)
    found = _read_pickled(path, allowed)
    if not isinstance(found, dict) or not all(hasattr(value, "shape") for value in found.values()):
        keys = ", ".join(map(str, list(found)[:6])) if isinstance(found, dict) else type(found)
        raise ZooError(f"{path} holds no plain table of tensors: {keys}")
    return found


def require_readable(path: Path, allowed: Sequence[str] = ()) -> None:
    """Refuse what is damaged or would run code, before another library opens it."""
    if path.suffix == ".safetensors":
        require_safetensors(path)
    elif path.suffix in PICKLED:
        _require_safe(path, allowed)


def require_safetensors(path: Path) -> None:
    """The header of a safetensors file can be read and fits the file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError, ValueError, OverflowError, MemoryError) as error:
        raise ChecksumError(
            f"{path} is no whole safetensors file: {str(error)[:200]}", "fetch it again"
        ) from None


def _read_pickled(path: Path, allowed: Sequence[str]) -> Any:
    import torch

    zipped = _require_safe(path, allowed)
    classes = [_class(name) for name in allowed]
    try:
        with torch.serialization.safe_globals(classes):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))  # how torch names the first one it refuses
        if named:
            raise _refused(path, [named[1]]) from None
        raise ChecksumError(
            f"{path} is no whole checkpoint of torch, or one that has to run code to be read",
            "fetch it again, or ask for safetensors",
        ) from None
    except Exception as error:  # damaged pickles fail in every way there is
        raise ChecksumError(
            f"{path} is no whole checkpoint of torch: {type(error).__name__}: {str(error)[:200]}",
            "fetch it again",
        ) from None


def _class(name: str) -> Any:
    """A class that an entry of the manifest allows, by its dotted name."""
    module, _, own = name.rpartition(".")
    return getattr(importlib.import_module(module), own)


def _require_safe(path: Path, allowed: Sequence[str]) -> bool:
    """Whether it is a zip archive, as torch writes since 1.6; damaged and unsafe ones are refused."""
    import torch

    if not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise ChecksumError(f"{path} is no whole archive: {error}", "fetch it again") from None
    names = {member.filename.rpartition("/")[2] for member in members}
    if "constants.pkl" in names:
        raise ZooError(
            f"{path} is a TorchScript archive, which is code",
            "ask for the safetensors of the model",
        )
    packed = [m.filename for m in members if m.compress_type != zipfile.ZIP_STORED]
    size = path.stat().st_size
    if packed or sum(member.file_size for member in members) > size:
        raise ChecksumError(
            f"{path} promises more than its {size} bytes hold"
            + (f" ({packed[0]} is compressed, which torch never does)" if packed else ""),
            "it was not written by torch",
        )
    try:
        found = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception as error:  # damaged pickles fail in every way there is
        raise ChecksumError(
            f"{path} is no whole checkpoint of torch: {type(error).__name__}: {str(error)[:200]}",
            "fetch it again",
        ) from None
    refused = [name for name in found if name not in allowed]
    if refused:
        raise _refused(path, refused)
    return True


def _refused(path: Path, names: list[str]) -> ZooError:
    return ZooError(
        f"{path} names {', '.join(names[:6])}, which could run code; nothing was read",
        "ask for safetensors; an entry may allow classes by name in `globals`",
    )
