"""Hooks that follow a forward pass through the backbone without changing it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmadapt.errors import CheckError

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from mmadapt.core.context import Context, Forwards
    from mmadapt.core.dispatch import SiteHook


class TapHook:
    """Leaves a module's output in the context while an active layer reads it; changes nothing."""

    def __init__(self, name: str, forwards: Forwards) -> None:
        self.name = name
        self.forwards = forwards
        self.readers = 0

    def register(self, module: nn.Module) -> RemovableHandle:
        """Put it behind whatever already changes the module's output."""
        return module.register_forward_hook(self)

    def __call__(self, module: nn.Module, *call: Any) -> None:
        readers, context = self.readers, self.forwards.context
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            recomputed = self.forwards.recomputed()
            if recomputed is not None:
                readers, context = recomputed[0].readers.get(self, 0), recomputed[1]
        if readers:
            context.leave(self.name, self.value(*call), readers)

    def value(self, args: tuple, output: Any) -> Any:
        """What is left, of a call's arguments and output."""
        return output if isinstance(output, Tensor) else output[0]


class InputTapHook(TapHook):
    """Leaves the first argument of a module's call, as it is after every adapter before it."""

    def register(self, module: nn.Module) -> RemovableHandle:
        return module.register_forward_pre_hook(self, with_kwargs=True)

    def value(self, args: tuple, kwargs: Any) -> Tensor:
        return args[0] if args else next(iter(kwargs.values()))


class KeywordTapHook(InputTapHook):
    """Leaves one keyword argument of a module's call, whatever it is."""

    def __init__(self, name: str, forwards: Forwards, keyword: str) -> None:
        super().__init__(name, forwards)
        self.keyword = keyword

    def value(self, args: tuple, kwargs: Any) -> Any:
        if kwargs.get(self.keyword) is None:
            raise CheckError(
                f"the tap {self.name!r} reads the keyword {self.keyword!r}, and the call has "
                f"{', '.join(kwargs) or 'none'}",
                f"call the module with {self.keyword}=",
            )
        return kwargs[self.keyword]


def tap_hook(name: str, end: str, forwards: Forwards) -> TapHook:
    """The hook of a raw tap: `end` is "out", "in" or "kw:keyword"."""
    if end.startswith("kw:"):
        return KeywordTapHook(name, forwards, end[3:])
    return (InputTapHook if end == "in" else TapHook)(name, forwards)


class Begin:
    """Starts a forward pass at the root or a tower, with what its inputs say that layers want."""

    def __init__(
        self,
        forwards: Forwards,
        fill: Callable[..., dict[str, Any]] | None,
        statistics: Mapping[str, nn.Module],
    ) -> None:
        self.forwards = forwards
        self.fill = fill
        #: batch norms below, whose running statistics belong to the frozen backbone
        self.statistics = statistics
        #: facts that active layers ask for; without any a tower tells none
        self.wanted: frozenset[str] = frozenset()
        self.before: list[Context] = []

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        compiling = torch.compiler.is_compiling()
        if self.statistics and not compiling:
            self._check_statistics()
        facts = self.fill(module, args, kwargs) if self.wanted and self.fill else None
        if facts is not None or not compiling:
            self.before.append(self.forwards.begin(facts or {}))

    def _check_statistics(self) -> None:
        moving = [path for path, norm in self.statistics.items() if norm.training]
        if moving:
            raise CheckError(
                f"{moving[0]!r} and {len(moving) - 1} more batch norms of the frozen backbone are in "
                "train mode, so this pass would change their running statistics",
                "model.eval(), or mmadapt.train_mode(model), which leaves only adapters in train mode",
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "before": []}


class End:
    """The second half of `Begin`; registered with `always_call=True`."""

    def __init__(self, begin: Begin) -> None:
        self.begin = begin

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        if self.begin.before and self.begin.forwards.mine():
            self.begin.forwards.end(self.begin.before.pop())


class FirstForward:
    """Runs after a tower's first call: every active site below it must have fired, then it leaves.

    A module that is never called (its weight is read by its parent) would otherwise train nothing,
    silently.
    """

    def __init__(self, tower: str, hooks: list[SiteHook]) -> None:
        self.tower = tower
        self.hooks = hooks
        self.handle: RemovableHandle | None = None

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        silent = [hook.site.name for hook in self.hooks if hook.plan and not hook.fired]
        if silent:
            raise CheckError(
                f"{len(silent)} of {len(self.hooks)} sites below {self.tower!r} never fired in its "
                f"first forward pass: {', '.join(silent[:4])}{' …' if len(silent) > 4 else ''}; "
                "their modules are not called, so nothing would be trained there",
                "detach, and choose other sites (a `weight` port meets weights their parent reads)",
            )
        if self.handle is not None and all(hook.fired for hook in self.hooks):
            self.handle.remove()
