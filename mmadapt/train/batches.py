"""Where batches come from, in an order that a resumed run can take up again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmadapt.core.check import tensors_in
from mmadapt.errors import DataError
from mmadapt.train.chance import random_state, set_random_state

if TYPE_CHECKING:
    from torch import Tensor

    from mmadapt.train.processes import Processes


@dataclass(frozen=True)
class Batch:
    """What the loss is given, and where it stood in the data."""

    value: Any
    epoch: int
    index: int
    rows: tuple[int, ...] = ()

    def __str__(self) -> str:
        rows = ", ".join(map(str, self.rows[:8])) + (" …" if len(self.rows) > 8 else "")
        return f"batch {self.index} of epoch {self.epoch}" + (f", rows {rows}" if rows else "")


def batches(data: Any, batch_size: int, seed: int, processes: Processes) -> Source:
    """Tensors (one, a tuple or a dictionary of them), an iterable of batches, or a function that returns one."""
    from torch import Tensor

    parts = list(data.values()) if isinstance(data, Mapping) else data
    if isinstance(parts, Tensor):
        return Rows(data, [parts], batch_size, seed, processes)
    if isinstance(parts, (tuple, list)) and parts and all(isinstance(p, Tensor) for p in parts):
        if isinstance(data, (tuple, Mapping)):
            return Rows(data, list(parts), batch_size, seed, processes)
    if not isinstance(data, Iterable) and not callable(data):
        raise DataError(
            f"data is a {type(data).__name__}, expected tensors or an iterable of batches",
            "a torch Dataset goes into a DataLoader" if hasattr(data, "__getitem__") else "",
        )
    if isinstance(data, Mapping):
        raise DataError(
            f"data is a {type(data).__name__} whose values are not all tensors",
            "pass tensors with one first dimension, or an iterable of batches",
        )
    return Stream(data, processes)


class Source:
    """Gives batches for ever, epoch by epoch, and knows where it stands."""

    epoch = 0
    index = 0

    def next(self) -> Batch:
        """The next batch of this process."""
        raise NotImplementedError

    def position(self) -> dict[str, Any]:
        """What `seek` needs to go on from here."""
        raise NotImplementedError

    def seek(self, position: dict[str, Any]) -> str:
        """Go to a position; returns what it cost, for people, or nothing."""
        raise NotImplementedError


class Rows(Source):
    """Rows of tensors, shuffled anew each epoch by a private generator.

    A batch has `size` rows over all processes, of which each gets its share; what is left of an
    epoch is dropped.
    """

    def __init__(
        self, data: Any, parts: list[Tensor], size: int, seed: int, processes: Processes
    ) -> None:
        import torch

        sizes = {part.shape[0] if part.ndim else 0 for part in parts}
        if len(sizes) != 1 or 0 in sizes:
            raise DataError(f"data tensors have {sorted(sizes)} rows, expected one number above 0")
        self.data = data
        self.rows = sizes.pop()
        self.size = min(size, self.rows)
        share, left = divmod(self.size, processes.size)
        if left:
            raise DataError(
                f"a batch of {self.size} rows cannot be shared equally by {processes.size} processes",
                f"batch_size={max(1, share) * processes.size}",
            )
        self.share = slice(processes.rank * share, (processes.rank + 1) * share)
        self.facts = [self.rows, self.size, seed]
        self.generator = torch.Generator(device="cpu").manual_seed(seed)
        self._shuffle()

    def _shuffle(self) -> None:
        import torch

        self.start = self.generator.get_state()
        self.order = torch.randperm(self.rows, generator=self.generator, device="cpu")

    def next(self) -> Batch:
        if (self.index + 1) * self.size > self.rows:
            self.epoch, self.index = self.epoch + 1, 0
            self._shuffle()
        first = self.index * self.size
        chosen = self.order[first : first + self.size][self.share]
        self.index += 1
        return Batch(self._take(chosen), self.epoch, self.index - 1, tuple(chosen.tolist()))

    def _take(self, chosen: Tensor) -> Any:
        from torch import Tensor

        if isinstance(self.data, Tensor):
            return self.data[chosen.to(self.data.device)]
        if isinstance(self.data, Mapping):
            return {key: part[chosen.to(part.device)] for key, part in self.data.items()}
        return tuple(part[chosen.to(part.device)] for part in self.data)

    def position(self) -> dict[str, Any]:
        place = {"epoch": self.epoch, "index": self.index}
        return {"kind": "rows", "facts": self.facts, **place, "start": self.start}

    def seek(self, position: dict[str, Any]) -> str:
        if position["kind"] != "rows" or position["facts"] != self.facts:
            there = dict(
                zip(("rows", "batch_size", "seed"), position.get("facts", ()), strict=False)
            )
            here = dict(zip(("rows", "batch_size", "seed"), self.facts, strict=True))
            raise DataError(
                f"the run that is resumed had {there or 'an iterable of batches'}, this one has {here}",
                "resume with the same data, batch_size and seed, or start anew with resume=False",
            )
        self.generator.set_state(position["start"])
        self._shuffle()
        self.epoch, self.index = position["epoch"], position["index"]
        return ""


class Stream(Source):
    """Batches as an iterable yields them, run through again and again.

    With several processes each takes its turn, unless the iterable is divided among them already (a
    DataLoader with a DistributedSampler, or one that accelerate prepared).
    """

    def __init__(self, data: Iterable[Any] | Callable[[], Any], processes: Processes) -> None:
        self.data = data
        self.processes = processes
        self.turns = 1 if _divided(data) else processes.size
        self.iterator: Iterator[Any] | None = None
        self.start: dict[str, Any] = {}

    def _begin(self) -> None:
        """Start an epoch; the random state before it is kept, since a DataLoader shuffles by it."""
        self.start = {"random": random_state(), "own": [g.get_state() for g in self._generators()]}
        if self.turns > 1:  # one order for all processes
            self.start = self.processes.broadcast(self.start)
            self._restore()
        self._open()

    def _restore(self) -> None:
        set_random_state(self.start["random"])
        for generator, state in zip(self._generators(), self.start["own"], strict=False):
            generator.set_state(state)

    def _open(self) -> None:
        for part in (self.data, *_samplers(self.data)):
            set_epoch = getattr(part, "set_epoch", None)
            if callable(set_epoch):
                set_epoch(self.epoch)
        iterable = self.data if isinstance(self.data, Iterable) else self.data()
        if not isinstance(iterable, Iterable):
            raise DataError(
                f"data() returned a {type(iterable).__name__}, expected an iterable of batches"
            )
        self.iterator = iter(iterable)

    def _generators(self) -> list[Any]:
        import torch

        found = [getattr(part, "generator", None) for part in (self.data, *_samplers(self.data))]
        return list(dict.fromkeys(g for g in found if isinstance(g, torch.Generator)))

    def next(self) -> Batch:
        if self.iterator is None:
            self._begin()
        value, complete = self._turn()
        if not complete:
            if self.index:
                self.epoch, self.index = self.epoch + 1, 0
                self._begin()
                value, complete = self._turn()
            if not complete:
                raise DataError(
                    "data ran out of batches"
                    + (f" for {self.turns} processes" if self.turns > 1 else ""),
                    "pass a list or a DataLoader, or a generator function, which start over, or fewer "
                    "steps",
                )
        self.index += 1
        return Batch(value, self.epoch, self.index - 1)

    def _turn(self) -> tuple[Any, bool]:
        """This process's batch of a round in which every process takes one."""
        assert self.iterator is not None
        mine = None
        for turn in range(self.turns):
            try:
                value = next(self.iterator)
            except StopIteration:
                return None, False
            if turn == self.processes.rank or self.turns == 1:
                mine = value
        if self.turns > 1 and self.index == 0:
            self.processes.own_chance(
                self.epoch
            )  # the order is drawn; dropout differs from here on
        return mine, True

    def position(self) -> dict[str, Any]:
        seen = self.index * self.turns
        return {"kind": "stream", "epoch": self.epoch, "seen": seen, **self.start}

    def seek(self, position: dict[str, Any]) -> str:
        if position["kind"] != "stream":
            raise DataError(
                "the run that is resumed had tensors as data, this one has an iterable of batches",
                "resume with the same data, or start anew with resume=False",
            )
        self.epoch, seen = position["epoch"], position["seen"]
        if "random" not in position:  # stopped before the first batch
            return ""
        self.start = {"random": position["random"], "own": position["own"]}
        self._restore()
        self._open()
        assert self.iterator is not None
        for skipped in range(seen):
            try:
                next(self.iterator)
            except StopIteration:
                raise DataError(
                    f"the data ended after {skipped} batches; the run that is resumed had seen "
                    f"{seen} of epoch {self.epoch}",
                    "resume with the same data, or start anew with resume=False",
                ) from None
        self.index = seen // self.turns
        return f"passing over {seen} batches of epoch {self.epoch} that it has seen" if seen else ""


def _samplers(data: Any) -> list[Any]:
    sampler, several = getattr(data, "sampler", None), getattr(data, "batch_sampler", None)
    found = [sampler, several, getattr(several, "sampler", None)]
    return [part for part in found if part is not None]


def _divided(data: Any) -> bool:
    """Whether each process is given its own batches by the iterable itself."""
    from torch.utils.data.distributed import DistributedSampler

    return type(data).__module__.startswith("accelerate.") or any(
        isinstance(sampler, DistributedSampler) for sampler in _samplers(data)
    )


def on_device(value: Any, device: Any) -> Any:
    """The batch with its tensors on `device`; itself where they are there already."""
    if all(tensor.device == device for tensor in tensors_in(value)):
        return value
    if hasattr(value, "to"):  # a tensor, or a tokenizer's batch
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: on_device(part, device) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        parts = [on_device(part, device) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value
