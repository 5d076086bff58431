"""A file from which a run goes on as if it had not been stopped."""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmadapt.core.store import replace_file
from mmadapt.errors import AdapterFileError, DataError
from mmadapt.train.processes import like, whole

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """A file written every so many steps, at the end and on Ctrl-C, and read at the start.

    It holds what trains, the optimiser, the place in the schedule and in the data, the random state
    and the history. With `resume`, a file that is there is gone on from; on the CPU, in one process,
    the result is then bit-equal to that of an uninterrupted run.
    """

    path: str | Path
    every: int = 100
    resume: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.every, int) or self.every < 1:
            raise DataError(f"every is {self.every!r}, expected a whole number of at least 1")

    @property
    def file(self) -> Path:
        """The path, with the home folder in place of ~."""
        return Path(self.path).expanduser()


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """What changes while training, by name: trained parameters, buffers of modules in train mode."""
    found: dict[str, Tensor] = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for path, module in model.named_modules():
        if module.training:
            for name, buffer in module.named_buffers(prefix=path, recurse=False):
                found[name] = buffer
    return found


def optimiser_state(optimiser: Optimizer) -> dict[str, Any]:
    """The optimiser's state with sharded tensors gathered; every process has to call it."""
    state = optimiser.state_dict()
    return {
        "state": {
            index: {key: _cpu(whole(value)) for key, value in one.items()}
            for index, one in state["state"].items()
        },
        "param_groups": state["param_groups"],
    }


def set_optimiser_state(optimiser: Optimizer, state: dict[str, Any]) -> None:
    """Bring back what `optimiser_state` returned, divided as the parameters are now."""
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    divided = {
        index: {
            key: like(value, parameters[index])
            if getattr(value, "shape", None) == parameters[index].shape
            else value
            for key, value in one.items()
        }
        for index, one in state["state"].items()
    }
    peaks = [group["peak"] for group in optimiser.param_groups]
    optimiser.load_state_dict({"state": divided, "param_groups": state["param_groups"]})
    for group, peak in zip(optimiser.param_groups, peaks, strict=True):
        group["peak"] = peak  # a rate that was changed for the rest of the run is meant


def _cpu(value: Any) -> Any:
    return value.detach().cpu().clone() if hasattr(value, "detach") else value


def gathered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole copies on the CPU; every process has to call it."""
    return {name: _cpu(whole(tensor)) for name, tensor in tensors.items()}


def write(path: Path, state: dict[str, Any]) -> None:
    """Write a run's state so that a crash leaves the file of before or this one."""
    import torch

    content = io.BytesIO()
    torch.save({"format": FORMAT, **state}, content)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, content.getvalue())


def read(path: Path) -> dict[str, Any]:
    """A run's state; raises `AdapterFileError` where the file is damaged or of another kind.

    Read with torch's `weights_only`: a file can hold numbers and tensors, and no code.
    """
    import torch

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, pickle.UnpicklingError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise AdapterFileError(
            f"{path} cannot be read as the state of a run: {reason[:200]}",
            "delete it to start anew",
        ) from None
    if not isinstance(state, dict) or "format" not in state:
        raise AdapterFileError(
            f"{path} is not the state of a run of mmadapt.fit",
            "adapters that mmadapt.save wrote are loaded with mmadapt.load_adapter",
        )
    if state["format"] != FORMAT:
        raise AdapterFileError(
            f"{path} has format {state['format']}; this mmadapt reads {FORMAT}",
            "delete it to start anew",
        )
    return state


def restore(path: Path, tensors: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Copy saved values into what trains; nothing is copied unless names and shapes agree."""
    import torch

    wrong = [f"{name} is missing" for name in tensors if name not in saved]
    wrong += [f"{name} is not here" for name in saved if name not in tensors]
    wrong += [
        f"{name} has {math.prod(saved[name].shape)} numbers there, {tensor.numel()} here"
        for name, tensor in tensors.items()
        if name in saved and saved[name].shape != tensor.shape
    ]
    if wrong:
        raise AdapterFileError(
            f"{path} is the state of another run: {'; '.join(wrong[:4])}"
            + (f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""),
            "attach what was attached then, or start anew with resume=False",
        )
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(like(saved[name], tensor))
