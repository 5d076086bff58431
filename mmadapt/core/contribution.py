"""How much each site changes what flows through it, position by position, in one forward pass."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mmadapt.core.attached import require_bank
from mmadapt.core.table import Table
from mmadapt.errors import CheckError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mmadapt.core.bank import Bank
    from mmadapt.core.context import Context
    from mmadapt.core.dispatch import Plan, SiteHook
    from mmadapt.core.site import SiteView, Span


@dataclass(frozen=True, eq=False)
class Contribution:
    """By site ‖change‖₂ / ‖what was there‖₂ over channels, float32 (B, …positions), NaN in padding."""

    shares: dict[str, Tensor]
    spans: dict[str, Span]
    #: sites by the name they are measured under: those of weights that one module reads are together
    sites: dict[str, tuple[str, ...]]
    notes: list[str] = field(default_factory=list)

    def mean(self, site: str) -> float:
        """The mean share of a site over rows and positions that are no padding."""
        return float(self.shares[site].nanmean())

    def grid(self, site: str) -> Tensor | None:
        """The shares as pictures (B, rows, columns) where positions are patches of one, else None.

        Class tokens and registers before the patches are left out.
        """
        share, span = self.shares[site], self.spans[site]
        if share.ndim == 3:
            return share
        if share.ndim != 2 or span.prefix is None or span.prefix < 0:
            return None
        patches = share[:, span.prefix :]
        rows = span.grid_rows or math.isqrt(patches.shape[1])
        if (
            rows < 2
            or patches.shape[1] % rows
            or (not span.grid_rows and rows**2 != patches.shape[1])
        ):
            return None
        return patches.unflatten(1, (rows, -1))

    def table(self) -> Table:
        """A row a site: its mean share, its largest, and how many positions there were."""
        table = Table(("site", "mean share", "largest", "positions"), notes=list(self.notes))
        for site, share in self.shares.items():
            there = share[~share.isnan()]
            largest = float(there.max()) if len(there) else math.nan
            table.rows.append((site, self.mean(site), largest, share[0].numel()))
        table.title = "‖change‖ / ‖what was there‖, of every site that acts"
        return table

    def __repr__(self) -> str:
        return str(self.table())

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


def contribution(m: Any, batch: Any) -> Contribution:
    """Run one forward pass and measure what every acting site changes in it.

    `batch` is what the model takes, as for `mmadapt.check`, or a function without arguments that runs
    it; calls of a site that follow each other, as in generation, are put behind each other. Where
    several attachments act at a site their common change is measured. Of weights that a module reads
    itself, the change of the module's output is. The pass is in eval mode and without gradients; flags
    and the random state are left as they were. Raises `CheckError` where nothing acts.
    """
    import torch

    from mmadapt.core.check import call

    model, bank = require_bank(m)
    if not bank.acting:
        raise CheckError(
            "no attachment is acting", f"set_active(model, {next(iter(bank.records))!r})"
        )
    seen: dict[str, list[Tensor]] = {}
    training = [module for module in model.modules() if module.training]
    run = batch if callable(batch) and not hasattr(batch, "keys") else lambda: call(m, batch)
    try:
        model.eval()
        with torch.no_grad(), torch.random.fork_rng(devices=[]), _measured(bank, seen) as places:
            run()
    finally:
        for module in training:
            module.training = True
    shares = {name: _joined(seen[name]) for name in places if name in seen}
    quiet = [site.name for name in places if name not in seen for site in places[name]]
    notes = [f"not reached, or of changed shape: {', '.join(quiet[:6])}"] if quiet else []
    spans = {name: places[name][0].span for name in shares}
    sites = {name: tuple(site.name for site in places[name]) for name in shares}
    return Contribution(shares, spans, sites, notes)


# -- measuring --------------------------------------------------------------------------------------


class Measured:
    """Stands in a hook's plan for all of it, and notes what it changes."""

    def __init__(self, hook: SiteHook, plan: Plan, seen: dict[str, list[Tensor]]) -> None:
        layers = [layer for group in plan for layer in group]
        self.hook, self.plan, self.seen = hook, plan, seen
        self.taps = tuple(word for layer in layers for word in layer.taps)
        self.facts = ("mask", *(fact for layer in layers for fact in layer.facts))
        self.training = False
        self.layers = layers

    def read_parameters(self) -> Iterator[nn.Parameter]:
        """Those of all layers."""
        return (parameter for layer in self.layers for parameter in layer.read_parameters())

    def before(self, x: Tensor, context: Context, site: SiteView) -> Tensor:
        """Port `in`."""
        new = x
        for layer in self.layers:
            new = layer.before(new, context, site)
        return self._noted(new, x, context)

    def after(self, acc: Tensor, y: Tensor, x: Tensor, context: Context, site: SiteView) -> Tensor:
        """Port `out`."""
        return self._noted(self.hook.through(self.plan, context, y, x), y, context)  # type: ignore[attr-defined]

    def weight(self, weight: Tensor, context: Context, site: SiteView) -> Tensor:
        """Port `weight`: measured where its module returns."""
        for layer in self.layers:
            weight = layer.weight(weight, context, site)
        return weight

    def around(
        self,
        call: Callable[..., Any],
        args: tuple,
        kwargs: dict[str, Any],
        context: Context,
        _: Any,
    ) -> Any:
        """Port `around`."""
        from mmadapt.core.dispatch import element

        bare = call(*args, **kwargs)
        new = self.hook.meet(self.plan, context, call, args, kwargs)[0]
        self._noted(element(new, self.hook.site), element(bare, self.hook.site), context)
        return new

    def _noted(self, new: Tensor, old: Tensor, context: Context) -> Tensor:
        note(self.seen, self.hook.site.name, self.hook.site, new, old, context)
        return new


def note(
    seen: dict[str, list[Tensor]],
    name: str,
    site: SiteView,
    new: Tensor,
    old: Tensor,
    context: Context,
) -> None:
    """Keep the share of every position; a change that moves positions has none."""
    if new.shape != old.shape:
        return
    layout = site.span.layout
    axis = next((place for place, letter in enumerate(layout) if letter in "CDK"), -1)
    axis = axis if len(layout) == new.ndim else -1
    change = (new.float() - old.float()).norm(dim=axis)
    share = change / old.float().norm(dim=axis).clamp_min(1e-12)
    mask = context.get("mask")
    if mask is not None and mask.shape == share.shape:
        share = share.masked_fill(~mask.bool(), math.nan)
    seen.setdefault(name, []).append(share.cpu())


@contextlib.contextmanager
def _measured(bank: Bank, seen: dict[str, list[Tensor]]) -> Iterator[dict[str, list[SiteView]]]:
    """Note inside the block what every plan changes; gives the sites by the name they are noted under."""
    before, places, handles = bank.planned, dict[str, Any](), []
    acting = [name for name, plan in before.items() if plan and name not in bank.resting]
    readers = _readers(bank, acting)
    for name in acting:
        module = bank.hooks[name].site.module
        together = readers.get(module, ([], []))[1]
        several = together if bank.hooks[name].site in together else [bank.hooks[name].site]
        places.setdefault(_name(several), several)
    plans: dict[str, Any] = {
        name: ((Measured(bank.hooks[name], plan, seen),),) if plan else ()
        for name, plan in before.items()
    }
    try:
        for module, (groups, sites) in readers.items():
            reader = _Reader(groups, sites, seen, bank)
            handles.append(module.register_forward_hook(reader, prepend=True, with_kwargs=True))
        bank.replace(plans)
        yield places
    finally:
        bank.replace(before)
        for handle in handles:
            handle.remove()


def _readers(bank: Bank, acting: list[str]) -> dict[nn.Module, tuple[list, list[SiteView]]]:
    """The modules that read a changed weight themselves: its hooks, and the sites that act there."""
    from mmadapt.core.effective import WeightHook

    found: dict[nn.Module, tuple[list, list[SiteView]]] = {}
    for group in bank.installed.groups.values():
        sites = [hook.site for hook in group.sites if hook.site.name in acting]
        if isinstance(group, WeightHook) and sites:
            groups, together = found.setdefault(sites[0].module, ([], []))
            groups.append(group)
            together += sites
    return found


def _name(sites: list[SiteView]) -> str:
    """One site's name, or of several of one module "vision.layers[0].attn.{q,v}:weight"."""
    if len(sites) == 1:
        return sites[0].name
    ahead = min((site.role.rpartition(".")[0] for site in sites), key=len)
    ends = ",".join(site.role.removeprefix(f"{ahead}.") for site in sites)
    return f"{ahead}.{{{ends}}}:weight"


class _Reader:
    """Compares what a module returned with what it returns with its own weights."""

    def __init__(self, groups: list, sites: list[SiteView], seen: dict, bank: Bank) -> None:
        self.groups, self.sites, self.seen, self.forwards = groups, sites, seen, bank.forwards

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        from torch import Tensor

        for group in self.groups:
            group.restore()
        bare = module.forward(*args, **kwargs)
        new, old = [one if isinstance(one, Tensor) else one[0] for one in (output, bare)]
        note(self.seen, _name(self.sites), self.sites[0], new, old, self.forwards.context)


def _joined(parts: list[Tensor]) -> Tensor:
    """What several calls of one site left: along positions, else along rows, else the last."""
    import torch

    first = parts[0]
    if len(parts) == 1:
        return first
    if all(p.ndim > 1 and p.shape[0] == first.shape[0] and p.shape[2:] == first.shape[2:] for p in parts):  # fmt: skip
        return torch.cat(parts, dim=1)
    if all(p.shape[1:] == first.shape[1:] for p in parts):
        return torch.cat(parts)
    return parts[-1]
