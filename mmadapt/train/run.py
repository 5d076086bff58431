"""The state of a run under way: what a checkpoint holds and a resumed run takes up."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mmadapt.train.chance import random_state, set_random_state
from mmadapt.train.checkpoint import (
    gathered,
    optimiser_state,
    read,
    restore,
    set_optimiser_state,
    trained_state,
    write,
)
from mmadapt.train.history import History

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from mmadapt.train.batches import Source
    from mmadapt.train.checkpoint import Checkpoint
    from mmadapt.train.evaluation import Watch
    from mmadapt.train.processes import Processes


@dataclass
class Run:
    """Everything that changes from step to step."""

    model: nn.Module
    optimiser: Optimizer
    scaler: Any
    source: Source
    watch: Watch | None
    processes: Processes
    checkpoint: Checkpoint | None
    history: History
    began: float = field(default_factory=time.perf_counter)
    _place: dict[str, Any] = field(default_factory=dict)
    _buffers: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tensors = trained_state(self.model)
        self._before = 0.0
        self._saved = -1

    def mark(self) -> None:
        """Remember where the last complete step ended: what comes after it may be cut short."""
        if self.checkpoint is not None:
            self._place = {"position": self.source.position(), "random": random_state()}
        self._buffers = {n: t.clone() for n, t in self.tensors.items() if not t.requires_grad}

    def back(self) -> None:
        """Buffers (running means) as they were at the mark; what trains changes in whole steps only."""
        for name, value in self._buffers.items():
            self.tensors[name].copy_(value)

    def clock(self) -> None:
        """Bring the seconds up to date."""
        self.history.seconds = self._before + time.perf_counter() - self.began

    # -- files ------------------------------------------------------------------------------

    def save(self) -> str:
        """Write the checkpoint, if it does not hold the last step yet; returns why that failed, or nothing."""
        made = len(self.history.losses)
        if self.checkpoint is None or not self._place or made == self._saved:
            return ""
        self.clock()
        state = {
            "tensors": {**gathered(self.tensors), **gathered(self._buffers)},
            "optimiser": optimiser_state(self.optimiser),
            "scaler": self.scaler.state_dict(),
            "history": self.history.to_dict(),
            **self._place,
        }
        if self.watch is not None:
            state["watch"] = {
                "since": self.watch.since,
                "value": self.watch.value,
                "best": gathered(self.watch.best),
            }
        self._saved = made  # in every process alike: gathering needs them all
        if not self.processes.main:
            return ""
        try:
            write(self.checkpoint.file, state)
        except OSError as error:
            return f"{self.checkpoint.file} could not be written: {error}; training continues"
        return ""

    def resume(self) -> str:
        """Take up what the checkpoint holds, if it is there; returns what to tell people."""
        if self.checkpoint is None or not self.checkpoint.resume:
            return ""
        path = self.checkpoint.file
        there = self.processes.main and path.is_file()
        state = self.processes.broadcast(read(path) if there else None)
        if state is None:
            return ""
        restore(path, self.tensors, state["tensors"])
        set_optimiser_state(self.optimiser, state["optimiser"])
        self.scaler.load_state_dict(state["scaler"])
        past = History(**state["history"])
        past.evaluations = [(step, dict(values)) for step, values in past.evaluations]
        past.steps, past.parameters = self.history.steps, self.history.parameters
        past.interrupted = False
        self._before = past.seconds
        vars(self.history).update(vars(past))
        self._take_up_watch(state.get("watch"))
        self._saved = made = len(past.losses)
        if made >= past.steps or past.stopped:
            return f"the run in {path} is complete; resume=False starts anew"
        passed = self.source.seek(state["position"])
        set_random_state(state["random"])
        self.processes.own_chance(made)
        return f"resumed {path} at step {made}" + (f", {passed}" if passed else "")

    def _take_up_watch(self, state: dict[str, Any] | None) -> None:
        from mmadapt.train.processes import like

        if self.watch is None or state is None:
            return
        self.watch.since, self.watch.value = state["since"], state["value"]
        self.watch.best = {
            name: like(value, self.watch.trained[name]).to(self.watch.trained[name].device)
            for name, value in state["best"].items()
        }
