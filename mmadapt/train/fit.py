"""A small training loop for what requires a gradient."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmadapt.core.backbone import unwrap_model
from mmadapt.errors import AttachError, DataError
from mmadapt.train.checkpoint import Checkpoint
from mmadapt.train.evaluation import Evaluation, Watch
from mmadapt.train.flags import train_mode
from mmadapt.train.history import History
from mmadapt.train.interrupt import Interruption
from mmadapt.train.log import Log, logger
from mmadapt.train.losses import model_loss
from mmadapt.train.optimiser import Optimiser
from mmadapt.train.progress import Progress, in_notebook

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from mmadapt.train.run import Run
    from mmadapt.train.step import Learner


def fit(
    m: Any,
    data: Any,
    *,
    loss: Callable[[Any, Any], Tensor] = model_loss,
    steps: int = 300,
    batch_size: int = 32,
    lr: float | None = None,
    optimiser: Optimiser | torch.optim.Optimizer | None = None,
    accumulate: int = 1,
    autocast: torch.dtype | None = None,
    evaluation: Evaluation | Callable[[Any], Any] | None = None,
    checkpoint: Checkpoint | str | Path | None = None,
    log: Any = None,
    seed: int = 0,
    progress: bool | Progress = True,
    label: str = "fit",
) -> History:
    """Train whatever of `m` requires a gradient: the active adapters, or a whole model.

    `data` is a tensor, a tuple or a dictionary of tensors with one first dimension, from which
    batches of `batch_size` rows are drawn epoch by epoch (shuffled by a private generator of
    `seed`); or an iterable of batches such as a DataLoader, run through again and again; or a
    function without arguments that returns such an iterable. `loss(model, batch)` returns a scalar;
    `batch` is what the data yields (a tuple for a tuple of tensors), on the model's device. Without
    `loss` it is `model(**batch).loss`.

    A step averages the gradients of `accumulate` batches. AdamW with the peak rate `lr` (1e-3), a
    warm-up and a cosine, gradients clipped to norm 1, unless an `Optimiser` says otherwise.
    `autocast` is the precision of the forward pass, such as `torch.bfloat16`. `evaluation` looks at
    the model now and then, and can stop early. `checkpoint` is a file the run can be resumed from.
    `log` is a CSV file's path, a TensorBoard writer, or a function of (step, numbers by name).

    The backbone is in eval mode and the active adapters in train mode meanwhile; all flags are as
    before afterwards. The first Ctrl-C ends the run after the present batch, keeps what was learned
    and returns the history so far; the second raises. `progress` shows a bar or not, or is a `Progress`
    that shows something else and can ask for an end as well. Raises `CheckError` at a loss, gradient or
    update that is not finite, with the last good values in place.

    Under `accelerate launch` or torchrun all processes train together: rows of tensors are shared
    out, batches of an iterable are taken in turns. See docs/clusters.md.
    """
    import torch

    from mmadapt.train.batches import batches
    from mmadapt.train.processes import Processes, reshard
    from mmadapt.train.run import Run
    from mmadapt.train.step import Learner

    for name, value in (("steps", steps), ("batch_size", batch_size), ("accumulate", accumulate)):
        if not isinstance(value, int) or value < 1:
            raise DataError(f"{name} is {value!r}, expected a whole number of at least 1")
    if autocast not in (None, torch.bfloat16, torch.float16):
        raise DataError(f"autocast is {autocast!r}, expected torch.bfloat16, torch.float16 or None")
    model = unwrap_model(m)
    reshard(model)
    _trained(model)
    recipe = optimiser if isinstance(optimiser, Optimiser) else Optimiser(build=optimiser)
    processes = Processes()
    source = batches(data, batch_size, seed, processes)
    made = processes.place(model, lambda: recipe.make(_trained(model), lr))
    trained = _trained(model)
    learner = Learner(
        model,
        processes.together(model, loss),
        trained,
        made,
        processes,
        autocast or processes.autocast(model),
        recipe.clip,
        accumulate,
    )
    history = History(steps=steps, parameters=sum(t.numel() for t in trained.values()))
    with (
        train_mode(m),
        _shown(progress, label, steps, processes.main) as shown,
        Interruption(shown.show and not in_notebook()) as interruption,
        torch.enable_grad(),
    ):
        run = Run(
            model,
            made,
            learner.scaler,
            source,
            _watch(evaluation, trained, processes),
            processes,
            _checkpoint(checkpoint),
            history,
        )
        loop = _Loop(run, learner, recipe, interruption, shown)
        try:
            loop.go(log)
        except KeyboardInterrupt:
            if interruption.asked:  # the second one
                raise
            history.interrupted = True
        finally:
            learner.forget()
            run.back()
        reshard(model)
        run.clock()
        loop.save()
        if run.watch is not None:
            run.watch.bring_back()
    return history


class _Loop:
    """The loop itself, and what it says on the way."""

    def __init__(
        self,
        run: Run,
        learner: Learner,
        recipe: Optimiser,
        interruption: Interruption,
        shown: Progress,
    ) -> None:
        self.run = run
        self.learner = learner
        self.recipe = recipe
        self.interruption = interruption
        self.shown = shown
        self.history = run.history
        self.said: set[str] = set()

    def go(self, log: Any) -> None:
        """Make steps until all are made, patience ends or an interruption is asked for."""
        run, history = self.run, self.history
        note = run.resume()
        if note:
            history.notes.append(note)
            self.shown.note(note)
        write = logger(log if run.processes.main else None, len(history.losses))
        run.mark()
        while len(history.losses) < history.steps and not history.stopped:
            step = len(history.losses)
            rate = self.recipe.set_rates(self.learner.optimiser, step, history.steps)
            if not self.step(step, rate):
                history.interrupted = True
                return
            numbers = {"loss": history.losses[-1], "rate": rate, "norm": history.norms[-1]}
            run.mark()
            numbers.update(self.look())
            self.log(write, numbers)
            if run.checkpoint is not None and (step + 1) % run.checkpoint.every == 0:
                self.save()
            if self.asked() and not history.stopped and step + 1 < history.steps:
                history.interrupted = True
                return

    def step(self, step: int, rate: float) -> bool:
        """Make one step; False where an interruption cut it short and nothing was changed."""
        run, learner, losses = self.run, self.learner, []
        for part in range(learner.accumulate):
            try:
                batch = run.source.next()
            except RuntimeError:
                if self.interruption.asked:  # Ctrl-C ended the workers of a DataLoader too
                    return False
                raise
            try:
                losses.append(learner.learn(batch, step))
                norm = learner.update(step) if part + 1 == learner.accumulate else 0.0
            except (RuntimeError, MemoryError) as error:
                self.explain(error, batch.value, step)
                raise
            if part + 1 < learner.accumulate and self.asked():
                return False
        history = self.history
        history.losses.append(sum(losses) / len(losses))
        history.rates.append(rate)
        history.norms.append(norm)
        self.shown.update(step + 1, self.text(), history.losses)
        return True

    def asked(self) -> bool:
        return self.run.processes.any(self.interruption.asked or self.shown.stopping)

    def text(self) -> str:
        """The live line: the loss, and what was evaluated last."""
        parts = [f"loss {self.history.losses[-1]:.4g}"]
        if self.history.evaluations:
            parts += [f"{name} {v:.4g}" for name, v in self.history.evaluations[-1][1].items()]
        return ", ".join(parts)

    def explain(self, error: BaseException, batch: Any, step: int) -> None:
        """Say what to do where memory ran out."""
        from mmadapt.train.memory import out_of_memory, ran_out

        if ran_out(error):
            learner = self.learner
            raise out_of_memory(
                error, learner.model, batch, step, learner.accumulate, learner.autocast
            ) from error

    def look(self) -> dict[str, float]:
        """Evaluate where it is time to; says when patience ends."""
        watch, history = self.run.watch, self.history
        made = len(history.losses)
        if watch is None or (made % watch.evaluation.every and made < history.steps):
            return {}
        values = watch.look(self.run.model, history)
        history.stopped = watch.done and made < history.steps
        self.shown.update(made, self.text(), history.losses)
        return values

    def log(self, write: Log, numbers: dict[str, float]) -> None:
        try:
            write(len(self.history.losses), numbers)
        except OSError as error:
            self.once("log", f"the log could not be written: {error}; training continues")

    def save(self) -> None:
        """Write the checkpoint; a full disk is said once and ends nothing."""
        why = self.run.save()
        if why:
            self.once("checkpoint", why)

    def once(self, subject: str, text: str) -> None:
        if subject not in self.said:
            self.said.add(subject)
            self.history.notes.append(text)
            warnings.warn(text, stacklevel=5)


def _shown(progress: bool | Progress, label: str, steps: int, main: bool) -> Progress:
    if isinstance(progress, Progress):
        progress.total, progress.show = steps, progress.show and main
        return progress
    return Progress(label, steps, progress and main)


def _trained(model: nn.Module) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if not found:
        raise AttachError(
            "nothing to train: no parameter requires a gradient",
            "attach an adapter with trained tensors, or make one active with set_active",
        )
    return found


def _watch(evaluation: Any, trained: dict[str, Tensor], processes: Any) -> Watch | None:
    if evaluation is None:
        return None
    if not isinstance(evaluation, Evaluation):
        evaluation = Evaluation(evaluation)
    return Watch(evaluation, trained, processes)


def _checkpoint(checkpoint: Any) -> Checkpoint | None:
    if checkpoint is None or isinstance(checkpoint, Checkpoint):
        return checkpoint
    return Checkpoint(checkpoint)
