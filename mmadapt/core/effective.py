"""The port `weight`: a parameter that its module reads itself, replaced for the length of a call."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmadapt.core.dispatch import SiteHook, acting, awake
from mmadapt.errors import CheckError

if TYPE_CHECKING:
    from mmadapt.core.context import Context, Forwards
    from mmadapt.core.dispatch import Plan


class WeightHook:
    """Port `weight`: for the length of a call, one parameter is its effective value.

    A pre-hook puts the value in, a post-hook that is called even after an exception takes it out.
    Several roles (q, k and v of a packed projection) may share the parameter, each with its rows.
    """

    def __init__(self, holder: nn.Module, parameter: str, forwards: Forwards) -> None:
        self.holder = holder
        self.parameter = parameter
        self.forwards = forwards
        self.sites: list[WeightSite] = []
        self.original: nn.Parameter | None = None
        #: what it was made for, the value, and the plans, whose layers' ids mean them while they live
        self._cached: tuple[tuple, Tensor, Any] | None = None
        self.thread = 0

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        plans, context, asleep = acting(self.forwards, self.sites)
        if not plans:
            return
        compiling = torch.compiler.is_compiling()
        if not compiling:
            self._alone()
        if self.original is None:  # else a nested or interrupted call left the value in
            self.original = self.holder._parameters[self.parameter]
        if torch.is_grad_enabled() or compiling or module.training:
            with awake(asleep) if asleep else contextlib.nullcontext():
                value = self._assemble(plans, context)
        else:
            value = self._kept(plans, context)
        self.holder._parameters[self.parameter] = value  # type: ignore[assignment]

    def _alone(self) -> None:
        here = threading.get_ident()
        if self.original is not None and self.thread != here:
            raise CheckError(
                "a second forward pass began in another thread while one is under way; the "
                "`weight` port serves one at a time",
                "run them one after another, or give each thread a copy.deepcopy of the model",
            )
        self.thread = here

    def _kept(self, plans: list[tuple[SiteHook, Plan]], context: Context) -> Tensor:
        """The effective value, computed anew only when something behind it has changed."""
        key = self._key(plans)
        if self._cached is None or self._cached[0] != key:
            self._cached = (key, self._assemble(plans, context), plans)
        return self._cached[1]

    def _assemble(self, plans: list[tuple[SiteHook, Plan]], context: Context) -> Tensor:
        """The whole parameter with every active role's rows replaced."""
        assert self.original is not None
        whole = self.original
        blocks, reached = [], 0
        with torch.autocast(whole.device.type, enabled=False):  # it may be kept beyond this call
            for site, plan in sorted(plans, key=_rows_of):
                start, stop = site.site.rows
                if start > reached:
                    blocks.append(whole[reached:start])
                rows = whole[start:stop]
                for group in plan:
                    for layer in group:
                        rows = layer.weight(rows, context, site.site)
                blocks.append(rows)
                reached = stop
            if reached < whole.shape[0]:
                blocks.append(whole[reached:])
            return blocks[0] if len(blocks) == 1 else torch.cat(blocks)

    def _key(self, plans: list[tuple[SiteHook, Plan]]) -> tuple:
        """Changes whenever a tensor behind the effective value does, in place or by replacement.

        Writes through `.data` move no version counter and are not seen; use `torch.no_grad()`.
        """
        layers = [layer for _, plan in plans for group in plan for layer in group]
        tensors = [self.original, *(p for layer in layers for p in layer.read_parameters())]
        state = tuple((id(t), t._version, t.data_ptr(), t.dtype) for t in tensors if t is not None)
        return (*(id(layer) for layer in layers), *(layer.training for layer in layers), *state)

    def forget(self) -> None:
        """Drop the effective weight kept between calls."""
        self._cached = None

    def restore(self) -> None:
        """Put the frozen parameter back."""
        if not torch.compiler.is_compiling() and self.thread != threading.get_ident():
            return  # the refused second forward; the first is still under way
        if self.original is not None:
            self.holder._parameters[self.parameter] = self.original
            self.original = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cached": None}


class WeightSite(SiteHook):
    """Port `weight` of one role: its plan, which the `WeightHook` of its parameter carries out."""


def _rows_of(planned: tuple[SiteHook, Plan]) -> tuple[int, int]:
    return planned[0].site.rows


class WeightRestore:
    """The second half of a `WeightHook`; registered with `always_call=True`."""

    def __init__(self, hook: WeightHook) -> None:
        self.hook = hook

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.hook.restore()
