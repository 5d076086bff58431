"""What the recipes share: a run that can be stopped and resumed, and whose weights are averaged."""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

AVERAGING = 0.998  # of the weights that are shipped
CHECKPOINT_EVERY = 500


class Run:
    """A model, what trains beside it, and everything that a run needs to go on.

    `modules` are named and checkpointed; the one called "model" is what is shipped. A subclass gives
    `losses`, which draws from `self.generator` and returns named losses of one step; `total` of them
    is what is minimised. The rate follows a cosine down to nothing at `horizon`, the last step
    unless another is given, and is led to nothing over the last `cool_down` steps besides.
    """

    def __init__(
        self,
        modules: dict[str, nn.Module],
        steps: int,
        rate: float,
        seed: int,
        horizon: int | None = None,
        cool_down: int = 0,
    ) -> None:
        self.modules, self.model = modules, modules["model"]
        self.horizon, self.cool_down = horizon or steps, cool_down
        self.steps, self.rate, self.step, self.cpu_seconds = steps, rate, 0, 0.0
        self.average = {name: value.clone() for name, value in self.model.state_dict().items()}
        trained = [p for module in modules.values() for p in module.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim >= 2], "weight_decay": 0.05},
            {"params": [p for p in trained if p.ndim < 2]},
        ]
        self.optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)
        self.generator = torch.Generator().manual_seed(seed)

    def losses(self) -> dict[str, torch.Tensor]:
        """The losses of one step, by name; "total" is minimised."""
        raise NotImplementedError

    def settle(self) -> None:
        """What follows every update, such as a bound on a parameter."""

    def advance(self) -> dict[str, float]:
        """Do one step; returns its losses."""
        rate = self.rate * min(1.0, (self.step + 1) / 200)
        rate *= 0.5 * (1 + math.cos(math.pi * self.step / self.horizon)) + 0.003
        if self.cool_down:
            rate *= min(1.0, (self.steps - self.step) / self.cool_down)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        losses = self.losses()
        self.optimiser.zero_grad()
        losses["total"].backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        self.settle()
        self.step += 1
        keep = min(AVERAGING, self.step / (self.step + 10))
        with torch.no_grad():
            for name, value in self.model.state_dict().items():
                self.average[name].lerp_(value, 1 - keep)
        return {name: float(value.detach()) for name, value in losses.items()}

    def averaged(self) -> dict[str, torch.Tensor]:
        """The averaged weights, rounded to the fp16 that is written."""
        return {name: value.half().float() for name, value in self.average.items()}

    def save(self, path: Path) -> None:
        """Write a checkpoint under another name first, so that a stop leaves the last one whole."""
        state = {name: module.state_dict() for name, module in self.modules.items()}
        state |= {"optimiser": self.optimiser.state_dict(), "average": self.average}
        state |= {"step": self.step, "steps": self.steps, "cpu_seconds": self.cpu_seconds}
        state |= {"generator": self.generator.get_state(), "torch_rng": torch.get_rng_state()}
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, path)

    def resume(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        if state["steps"] != self.steps:
            raise ValueError(
                f"{path} belongs to a run of {state['steps']} steps, this one has {self.steps}; "
                f"give --steps {state['steps']} or another --work directory"
            )
        for name, module in self.modules.items():
            module.load_state_dict(state[name])
        self.optimiser.load_state_dict(state["optimiser"])
        self.average, self.step = state["average"], state["step"]
        self.cpu_seconds = state["cpu_seconds"]
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["torch_rng"])


def train(run: Run, checkpoint: Path, look: Callable[[Run], str]) -> None:
    """Go on to the last step, with a checkpoint and a line of progress now and then.

    `look` measures the averaged weights, in a few words.
    """
    if checkpoint.exists():
        run.resume(checkpoint)
        print(f"resumed at step {run.step} of {run.steps}")
    began, earlier, seen = time.process_time(), run.cpu_seconds, []
    while run.step < run.steps:
        seen.append(run.advance())
        run.cpu_seconds = earlier + time.process_time() - began
        if run.step % CHECKPOINT_EVERY == 0 or run.step == run.steps:
            run.save(checkpoint)
            means = {name: sum(losses[name] for losses in seen) / len(seen) for name in seen[0]}
            seen = []
            shown = "  ".join(f"{name} {value:.3f}" for name, value in means.items())
            print(
                f"{run.step}/{run.steps}  {shown}  {look(run)}  {run.cpu_seconds:.0f} CPU s",
                flush=True,
            )


def options_of(name: str, steps: int) -> argparse.Namespace:
    """What a recipe is told, `out`, `work` and `steps`, with both folders made; on one thread."""
    parser = argparse.ArgumentParser(description=f"Train tiny/{name} on one CPU thread.")
    parser.add_argument("--out", type=Path, default=Path(f"zoo/tiny/{name}"))
    work = Path(f"build/tiny_{name}")
    parser.add_argument("--work", type=Path, default=work, metavar="DIR")
    parser.add_argument("--steps", type=int, default=steps)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    options.work.mkdir(parents=True, exist_ok=True)
    return options


def save_halves(model: Any, out: Path) -> None:
    """Write a model of transformers in fp16, half as large, that says float32: what it computes in."""
    model.half().save_pretrained(out)
    config = json.loads((out / "config.json").read_text())
    config["dtype"] = "float32"
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
