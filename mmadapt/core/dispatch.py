"""Hooks that carry plans: the only thing mmadapt ever adds to a backbone's modules.

One hook object stands at each site; it holds a `plan`, the ready tuple of active layers. Hooks stay
from attach to detach, and switching replaces plans, so that compiled code sees every switch.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmadapt.core.context import Choice, Context, Forwards
from mmadapt.core.stand_in import StandIn
from mmadapt.errors import CheckError

if TYPE_CHECKING:
    from mmadapt.core.layer import Layer
    from mmadapt.core.site import SiteView


#: layers in groups, one behind the other; those of one group see the same y and their changes add up
Plan = tuple[tuple["Layer", ...], ...]


class SiteHook:
    """What the hooks of all ports share."""

    def __init__(self, site: SiteView, forwards: Forwards) -> None:
        self.site = site
        self.forwards = forwards
        self.plan: Plan = ()
        self.fired = False
        tap = site.span.x.removeprefix("tap:")
        self.x_tap = tap if tap != site.span.x else ""
        position, _, self.keyword = ("", "", "") if self.x_tap else site.span.x.partition("|")
        self.position = int(position) if position else -1
        # accelerate moves a call's inputs inside of it, where no hook of ours sees them
        self.moves = hasattr(site.module, "_hf_hook")

    def __call__(self, module: nn.Module, *call: Any) -> Any:
        plan = self.plan
        if not torch.compiler.is_compiling():
            if torch.is_grad_enabled():
                recomputed = self.forwards.recomputed()
                if recomputed is not None:
                    return self._repeat(*recomputed, call)
            elif plan and self.forwards.learning:
                self.forwards.refuse_reentrant()
            if plan and not self.fired:  # compiled code must not write Python state
                self.fired = True
        return self.meet(plan, self.forwards.context, *call) if plan else None

    def _repeat(self, choice: Choice, context: Context, call: tuple) -> Any:
        """The call as its forward pass had it, with layers awake that have been switched off since."""
        plan = (choice.plans or {}).get(self, ())
        with awake(plan):
            return self.meet(plan, context, *call) if plan else None

    def meet(self, plan: Plan, context: Context, *call: Any) -> Any:
        """What a port does with the call."""
        raise NotImplementedError

    def find_x(self, context: Context, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """The role's input: a tap's tensor, or an argument by position or keyword."""
        if self.x_tap:
            x = context.read(self.site.taps[self.x_tap])
        elif len(args) > self.position:
            x = args[self.position]
        elif self.keyword in kwargs:
            x = kwargs[self.keyword]
        else:
            raise self._no_x(args, kwargs)
        return x.to(self.site.device) if self.moves else x

    def _no_x(self, args: tuple, kwargs: dict[str, Any]) -> CheckError:
        return CheckError(
            f"{self.site.name} was called with {len(args)} positional arguments and the keywords "
            f"{', '.join(kwargs) or 'none'}; its input is argument {self.position} or the keyword "
            f"{self.keyword!r}",
            "name the input of this module in the anatomy's Span, as in x='0|hidden_states'",
        )


@contextlib.contextmanager
def awake(plan: Plan) -> Iterator[None]:
    """Layers of `plan` require gradients inside, as they did when their forward pass ran."""
    asleep = [p for group in plan for layer in group for p in layer.read_parameters()]
    asleep = [parameter for parameter in asleep if not parameter.requires_grad]
    for parameter in asleep:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in asleep:
            parameter.requires_grad_(False)


class InHook(SiteHook):
    """Port `in`: replaces the input of a module's call."""

    def meet(
        self, plan: Plan, context: Context, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        x = self.find_x(context, args, kwargs)
        for group in plan:
            for layer in group:
                x = layer.before(x, context, self.site)
        if len(args) > self.position:
            return (*args[: self.position], x, *args[self.position + 1 :]), kwargs
        return args, {**kwargs, self.keyword: x}


class OutHook(SiteHook):
    """Port `out`: replaces one element of a module's output, knowing its input."""

    def meet(
        self, plan: Plan, context: Context, args: tuple, kwargs: dict[str, Any], output: Any
    ) -> Any:
        x = self.find_x(context, args, kwargs)
        if isinstance(output, Tensor):
            return self.through(plan, context, output, x)
        y = element(output, self.site)
        return _put(output, self.site.span.y, self.through(plan, context, y, x))

    def replay(self, y: Tensor, x: Tensor) -> Tensor:
        """What the site makes of a cached output y and input x, without the backbone."""
        return self.through(self.plan, Context(), y, x)

    def through(self, plan: Plan, context: Context, y: Tensor, x: Tensor) -> Tensor:
        """Send y through the plan."""
        acc = y
        for group in plan:
            y = acc
            for layer in group:
                acc = layer.after(acc, y, x, context, self.site)
        return acc


def acting(
    forwards: Forwards, sites: Sequence[SiteHook]
) -> tuple[list[tuple[SiteHook, Plan]], Context, Plan]:
    """For roles that share a hook: those with a plan in this call, its context, and layers to wake."""
    if not torch.compiler.is_compiling():
        recomputed = forwards.recomputed() if torch.is_grad_enabled() else None
        if forwards.learning and not torch.is_grad_enabled() and any(s.plan for s in sites):
            forwards.refuse_reentrant()
        if recomputed is not None:
            kept = recomputed[0].plans or {}
            plans = [(site, kept[site]) for site in sites if kept.get(site)]
            return plans, recomputed[1], tuple(group for _, plan in plans for group in plan)
        for site in sites:
            site.fired = site.fired or bool(site.plan)
    return [(site, site.plan) for site in sites if site.plan], forwards.context, ()


class ShareHook:
    """Port `out` of a fused projection: every role sees and changes its own columns of the output.

    One split and one concatenation serve all of them.
    """

    def __init__(self, forwards: Forwards) -> None:
        self.forwards = forwards
        self.sites: list[OutHook] = []

    def __call__(
        self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor
    ) -> Tensor | None:
        plans, context, asleep = acting(self.forwards, self.sites)
        if not plans:
            return None
        with awake(asleep) if asleep else contextlib.nullcontext():
            x = plans[0][0].find_x(context, args, kwargs)
            shares = list(output.chunk(plans[0][0].site.span.block[1], dim=-1))
            for hook, plan in plans:
                own = hook.site.span.block[0]
                shares[own] = hook.through(plan, context, shares[own], x)  # type: ignore[attr-defined]
            return torch.cat(shares, dim=-1)


class AroundHook(SiteHook):
    """Port `around`: stands in for a module's forward, which no hook of torch can."""

    def install(self) -> StandIn:
        """Take the place of the forward; what is returned has a `remove`, as hooks' handles do."""
        return StandIn(self.site.module, self._stand_in)

    def _stand_in(self, own: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        done = self(self.site.module, own, args, kwargs)
        return own(*args, **kwargs) if done is None else done[0]

    def meet(
        self, plan: Plan, context: Context, own: Any, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[Any]:
        call = own
        for group in plan:
            for layer in group:
                call = functools.partial(_around, layer, call, context, self.site)
        return (call(*args, **kwargs),)


def _around(layer: Layer, call: Any, context: Context, site: SiteView, *args: Any, **kwargs: Any):
    return layer.around(call, args, kwargs, context, site)


def element(output: Any, site: SiteView) -> Tensor:
    """The element or field of a module's output that the role means."""
    try:
        return output[site.span.y]
    except (KeyError, IndexError, TypeError):
        raise CheckError(
            f"{site.name} has no {site.span.y!r} in its output, a {type(output).__name__}"
            + (f" of {', '.join(map(str, output))}" if isinstance(output, dict) else ""),
            "name the element or field that the role means in the anatomy's Span, y=…",
        ) from None


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
