"""Hooks that carry plans: the only thing mmadapt ever adds to a backbone's modules.

One hook object stands at each site; it holds a `plan`, the ready tuple of active layers. Hooks stay
from attach to detach, and switching replaces plans, so that compiled code sees every switch.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmadapt.core.context import Context
from mmadapt.errors import CheckError

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from mmadapt.core.layer import Layer
    from mmadapt.core.site import SiteView


class SiteHook:
    """What the hooks of all ports share."""

    def __init__(self, site: SiteView, context: Context) -> None:
        self.site = site
        self.context = context
        self.plan: tuple[Layer, ...] = ()
        self.stack = False
        self.fired = False
        tap = site.span.x.removeprefix("tap:")
        self.x_tap = tap if tap != site.span.x else ""
        position, _, self.keyword = ("", "", "") if self.x_tap else site.span.x.partition("|")
        self.position = int(position) if position else -1

    def note(self) -> None:
        """Remember that the site was reached; compiled code must not write Python state."""
        if not torch.compiler.is_compiling() and not self.fired:
            self.fired = True

    def find_x(self, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """The role's input: a tap's tensor, or an argument by position or keyword."""
        if self.x_tap:
            return self.context.read(self.site.taps[self.x_tap])
        if len(args) > self.position:
            return args[self.position]
        return kwargs[self.keyword]


class InHook(SiteHook):
    """Port `in`: replaces the input of a module's call."""

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]):
        plan = self.plan
        if not plan:
            return None
        self.note()
        x = self.find_x(args, kwargs)
        for layer in plan:
            x = layer.before(x, self.context, self.site)
        if len(args) > self.position:
            return (*args[: self.position], x, *args[self.position + 1 :]), kwargs
        return args, {**kwargs, self.keyword: x}


class OutHook(SiteHook):
    """Port `out`: replaces one element of a module's output, knowing its input."""

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any):
        plan = self.plan
        if not plan:
            return None
        self.note()
        x = self.find_x(args, kwargs)
        if isinstance(output, Tensor):
            return self.run(output, x)
        return _put(output, self.site.span.y, self.run(output[self.site.span.y], x))

    def run(self, y: Tensor, x: Tensor) -> Tensor:
        """Send y through the plan; also the way to replay a site on cached tensors."""
        if self.site.span.block[1] > 1:  # layers see and change only their columns of y
            start, stop = self.site.rows
            left, own, right = y.split((start, stop - start, y.shape[-1] - stop), dim=-1)
            return torch.cat((left, self._through(own, x), right), dim=-1)
        return self._through(y, x)

    def _through(self, y: Tensor, x: Tensor) -> Tensor:
        acc = y
        for layer in self.plan:
            acc = layer.after(acc, acc if self.stack else y, x, self.context, self.site)
        return acc


def _put(output: Any, where: int | str, value: Tensor) -> Any:
    """`output` with one element replaced, of the same type; the original is left alone."""
    if isinstance(output, dict) and isinstance(where, int):
        where = list(output)[where]
    if isinstance(output, dict):  # transformers' ModelOutput is one, rebuilt from its fields
        return type(output)(**{**output, where: value})
    items = list(output)
    items[where] = value  # type: ignore[index]
    if hasattr(output, "_fields"):
        return type(output)(*items)
    return type(output)(items)


class WeightHook:
    """Port `weight`: for the length of a call, one parameter is its effective value.

    A pre-hook puts the value in, a post-hook that is called even after an exception takes it out.
    Several roles (q, k and v of a packed projection) may share the parameter, each with its rows.
    """

    def __init__(self, holder: nn.Module, parameter: str, context: Context) -> None:
        self.holder = holder
        self.parameter = parameter
        self.context = context
        self.sites: list[SiteHook] = []
        self.original: nn.Parameter | None = None
        self._cached: tuple[tuple, Tensor] | None = None
        self.thread = 0

    def __call__(self, module: nn.Module, args: tuple) -> None:
        if not any(site.plan for site in self.sites):
            return
        if not torch.compiler.is_compiling():
            here = threading.get_ident()
            if self.original is not None and self.thread != here:
                raise CheckError(
                    "a second forward pass began in another thread while one is under way; the "
                    "`weight` port serves one at a time",
                    "run them one after another, or give each thread a copy.deepcopy of the model",
                )
            self.thread = here
        if self.original is None:  # else a nested or interrupted call left the value in
            self.original = self.holder._parameters[self.parameter]
        self.holder._parameters[self.parameter] = self.effective(module)  # type: ignore[assignment]

    def effective(self, module: nn.Module) -> Tensor:
        """The whole parameter with every active role's rows replaced; kept between eval calls."""
        assert self.original is not None
        for hook in self.sites:
            if hook.plan:
                hook.note()
        keep = not (torch.is_grad_enabled() or module.training or torch.compiler.is_compiling())
        key = self._key() if keep else ()
        if keep and self._cached is not None and self._cached[0] == key:
            return self._cached[1]
        with torch.autocast(self.original.device.type, enabled=False):  # kept beyond this call
            weight = self._assemble(self.original)
        self._cached = (key, weight) if keep else None
        return weight

    def _assemble(self, whole: Tensor) -> Tensor:
        blocks, reached = [], 0
        for hook in sorted(self.sites, key=lambda site: site.site.rows):
            start, stop = hook.site.rows
            if not hook.plan:
                continue
            if start > reached:
                blocks.append(whole[reached:start])
            rows = whole[start:stop]
            for layer in hook.plan:
                rows = layer.weight(rows, self.context, hook.site)
            blocks.append(rows)
            reached = stop
        if reached < whole.shape[0]:
            blocks.append(whole[reached:])
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks)

    def _key(self) -> tuple:
        """Changes whenever a tensor behind the effective value does, in place or by replacement.

        Writes through `.data` move no version counter and are not seen; use `torch.no_grad()`.
        """
        layers = [layer for hook in self.sites for layer in hook.plan]
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


class WeightRestore:
    """The second half of a `WeightHook`; registered with `always_call=True`."""

    def __init__(self, hook: WeightHook) -> None:
        self.hook = hook

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.hook.restore()


class TapHook:
    """Leaves a module's output in the context while an active layer reads it; changes nothing."""

    def __init__(self, name: str, context: Context) -> None:
        self.name = name
        self.context = context
        self.readers = 0

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        if self.readers:
            value = output if isinstance(output, Tensor) else output[0]
            self.context.leave(self.name, value, self.readers)


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
