"""What is attached, as a tree with switches: attachments, groups of alike sites, sites."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mmadapt.core.attach import active, set_active, sites_at
from mmadapt.core.attached import require_bank
from mmadapt.core.compose import Sum
from mmadapt.core.figure import AMOUNT, cells, drawn, new_figure
from mmadapt.core.report import LayerReport, layers, mean_shares, updates
from mmadapt.core.site import stem
from mmadapt.core.svg import bars_svg
from mmadapt.core.table import Table, count
from mmadapt.errors import AttachError, did_you_mean
from mmadapt.ui.base import View, ipywidgets

#: numbers of all weights up to which their changes are computed without being asked
_SOON = 50_000_000
#: sites of a group that are listed when it is opened
_LISTED = 100


def inspect(m: Any, batch: Any = None) -> TreeView:
    """See what is attached, site by site, and switch attachments and sites on and off.

    A row a group of alike sites: parameters, the norm of each layer, gates, ‖ΔW‖ / ‖W‖ where it is a
    change of a weight, and with a `batch` (what the model takes, as for `mm.check`) the share by which
    each site changes what flows through it. Switches act on the model, and state is plain data:

        w = mm.ui.inspect(clip)
        w.active = ["sketch"]                                 # as mm.set_active
        w.resting = ["vision.layers[0:2].mlp"]                # nothing acts there
        w.table()                                             # as mm.inspect

    What is chosen elsewhere shows after `refresh()`. Choosing other attachments wakes all sites.
    """
    return TreeView(m, batch)


@dataclass
class Group:
    """Alike sites of one attachment."""

    attachment: str
    pattern: str
    adapter: str
    layers: list[LayerReport] = field(default_factory=list)

    @property
    def places(self) -> set[str]:
        """Its sites; none for what sites share, which has no place of its own."""
        return {one.site for one in self.layers if ":" in one.site}


class TreeView(View):
    """What `mm.ui.inspect` gives."""

    def __init__(self, m: Any, batch: Any = None) -> None:
        super().__init__()
        self.model, self.batch = m, batch
        self._rows: dict[str, Any] = {}
        self._checks: dict[str, Any] = {}
        self._following = False
        #: ‖ΔW‖ / ‖W‖ by (attachment, site), None where it was not computed yet
        self.updates: dict[tuple[str, str], float] | None = None
        self.refresh()

    def refresh(self) -> None:
        """Look at the model again."""
        _, bank = require_bank(self.model)
        groups: dict[tuple[str, str, str], Group] = {}
        for one in layers(self.model):
            key = (one.attachment, stem(one.site), one.adapter)
            groups.setdefault(key, Group(*key)).layers.append(one)
        self.groups = list(groups.values())
        weights = {id(h.site.reference): h.site.reference for h in bank.hooks.values()}
        if sum(w.numel() for w in weights.values() if w is not None) <= _SOON:
            self.updates = updates(self.model)
        self.shares = {}
        if self.batch is not None and bank.acting:
            self.shares = mean_shares(self.model, self.batch)
        if self._widget is not None:
            self._widget.children = (self._build(), *self._widget.children[1:])

    # -- state --------------------------------------------------------------------------------------

    @property
    def active(self) -> list[str]:
        """Names of the attachments that act; may be assigned."""
        now = active(self.model)
        return [name for name, weight in zip(now.names, now.weights, strict=True) if weight]

    @active.setter
    def active(self, names: Sequence[str]) -> None:
        _, bank = require_bank(self.model)
        now = active(self.model)
        weights = dict(zip(now.names, now.weights, strict=True))
        chosen = [names] if isinstance(names, str) else list(names)
        for name in chosen:
            if name not in bank.records:
                raise AttachError(
                    f"no attachment is named {name!r}", did_you_mean(str(name), bank.records)
                )
        kept = [weights.get(name) or 1.0 for name in chosen]
        set_active(self.model, type(now)(*chosen, weights=kept) if chosen else Sum())
        self._follow()
        self.changed()

    @property
    def resting(self) -> list[str]:
        """Names of the sites where nothing acts; patterns may be assigned."""
        return sorted(require_bank(self.model)[1].resting)

    @resting.setter
    def resting(self, patterns: str | Sequence[str]) -> None:
        _, bank = require_bank(self.model)
        bank.rest(sites_at(bank, patterns) if patterns else frozenset())
        self._follow()
        self.changed()

    def table(self) -> Table:
        """A row a layer, as `mm.inspect` has it."""
        from mmadapt.core.report import inspect

        return inspect(self.model, self.batch)

    def summary(self) -> Table:
        """A row a group of alike sites."""
        table = Table(("attachment", "sites", "adapter", "layers", "parameters", "norm", "ΔW / W", "share", "gates"))  # fmt: skip
        for group in self.groups:
            table.rows.append(
                (
                    group.attachment,
                    group.pattern,
                    group.adapter,
                    len(group.layers),
                    count(sum(one.parameters for one in group.layers)),
                    _mean([one.norm for one in group.layers]),
                    _mean(self._updates(group)),
                    _mean(self._shares(group)),
                    _values(group),
                )
            )
        wholly_empty = [c for c in (8, 7, 6) if all(row[c] in (None, "") for row in table.rows)]
        for place in wholly_empty:
            table.columns = table.columns[:place] + table.columns[place + 1 :]
            table.rows = [row[:place] + row[place + 1 :] for row in table.rows]
        table.title = f"active: {active(self.model)!r}"
        resting = self.resting
        if resting:
            table.notes.append(f"nothing acts at {len(resting)} sites, first {resting[0]}")
        return table

    def _updates(self, group: Group) -> list[float]:
        keys = [(one.attachment, one.site) for one in group.layers]
        return [self.updates[key] for key in keys if key in self.updates] if self.updates else []

    def _shares(self, group: Group) -> list[float]:
        return [self.shares[one.site] for one in group.layers if one.site in self.shares]

    # -- the widget -----------------------------------------------------------------------------------

    def _build(self) -> Any:
        widgets = ipywidgets()
        self._checks, self._rows = {}, {}
        boxes = []
        for name in dict.fromkeys(group.attachment for group in self.groups):
            check = widgets.Checkbox(description=name, indent=False, layout={"width": "auto"})
            check.observe(self.handler(self._switched), "value")
            self._checks[name] = check
            boxes.append(check)
            boxes += [self._row(g) for g in self.groups if g.attachment == name]
        if self.updates is None:
            button = widgets.Button(description="compute ‖ΔW‖ / ‖W‖")
            button.on_click(self.handler(self._compute))
            boxes.append(button)
        self._follow()
        return widgets.VBox(boxes)

    def _row(self, group: Group) -> Any:
        """A switch, a button that lists the sites, and the numbers of a group."""
        widgets = ipywidgets()
        where = f"{group.attachment} {group.pattern} {group.adapter}"
        switch = widgets.Checkbox(indent=False, layout={"width": "2em"})
        opened = widgets.ToggleButton(description="▸", layout={"width": "2.4em"})
        below = widgets.HTML()
        switch.observe(self.handler(self._rested), "value")
        opened.observe(self.handler(self._opened), "value")
        self._rows[where] = (group, switch, opened, below)
        line = widgets.HBox([opened, switch, widgets.HTML(self._group_html(group))])
        line.layout.align_items = "center"
        return widgets.VBox([line, below], layout={"margin": "0 0 0 1.5em"})

    def _switched(self, change: Any) -> None:
        if not self._following:
            try:
                self.active = [name for name, check in self._checks.items() if check.value]
            finally:
                self._follow()

    def _rested(self, change: Any) -> None:
        if not self._following:
            _, bank = require_bank(self.model)
            (own,) = (
                group.places
                for group, switch, _, _ in self._rows.values()
                if switch is change["owner"]
            )
            try:
                bank.rest(bank.resting - own if change["new"] else bank.resting | own)
            finally:
                self._follow()

    def _opened(self, change: Any) -> None:
        for group, _, opened, below in self._rows.values():
            opened.description = "▾" if opened.value else "▸"
            if opened.value and not below.value:
                below.value = f'<div style="line-height:1.35">{self._sites_html(group)}</div>'
            elif not opened.value:
                below.value = ""

    def _compute(self, _: Any) -> None:
        self.updates = updates(self.model)
        self.refresh()

    def _follow(self) -> None:
        """Switches stand where the model is."""
        self._following = True
        try:
            now, resting = self.active, set(self.resting)
            for name, check in self._checks.items():
                check.value = name in now
            for group, switch, _, _ in self._rows.values():
                switch.value = not group.places or not group.places <= resting
                switch.disabled = not group.places
        finally:
            self._following = False

    def _group_html(self, group: Group) -> str:
        number = len(group.layers)
        parts = [
            f"<code>{html.escape(group.pattern)}</code> <b>{group.adapter}</b>",
            f"{number} layer{'s' * (number != 1)}, {count(sum(o.parameters for o in group.layers))}",
        ]
        for label, values in (
            ("norm", [one.norm for one in group.layers]),
            ("ΔW / W", self._updates(group)),
            ("share", self._shares(group)),
        ):
            if values:
                parts.append(f"{label} {_mean(values):.3g} {bars_svg(values)}")
        said = _values(group)
        return " &nbsp; ".join([*parts, *([html.escape(said)] if said else [])])

    def _sites_html(self, group: Group) -> str:
        table = Table(("site", "parameters", "norm", "ΔW / W", "share", "values"))
        resting = set(self.resting)
        for one in group.layers[:_LISTED]:
            values = "  ".join(f"{k} {v:.4g}" for k, v in one.values.items())
            update = (self.updates or {}).get((one.attachment, one.site))
            site = f"{one.site} (resting)" if one.site in resting else one.site
            table.rows.append((site, one.parameters, one.norm, update, self.shares.get(one.site), values))  # fmt: skip
        if len(group.layers) > _LISTED:
            table.notes.append(f"{len(group.layers) - _LISTED:,} more: w.table() has all")
        return table._repr_html_()

    # -- pictures -------------------------------------------------------------------------------------

    def _text(self) -> str:
        return str(self.summary())

    @drawn
    def figure(self) -> Any:
        """The norm of every layer, a row a group and a column a layer."""
        import numpy

        shown = self.groups[:40]
        width = max(len(group.layers) for group in shown)
        values = numpy.full((len(shown), width), numpy.nan)
        for place, group in enumerate(shown):
            values[place, : len(group.layers)] = [one.norm for one in group.layers]
        figure = new_figure(min(4.5 + 0.35 * width, 12), 1.1 + 0.3 * len(shown))
        axes = figure.add_subplot()
        now = self.active
        names = [
            f"{g.attachment}{'' if g.attachment in now else ' (off)'}  {g.pattern}" for g in shown
        ]
        numbers = [str(place) for place in range(width)] if width <= 32 else []
        cells(axes, values, names, numbers, "norm", (0, None), AMOUNT, ".2g" if width <= 16 else "")
        axes.set_xlabel("layer")
        return figure


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _values(group: Group) -> str:
    """What the layers say of themselves, the mean over them."""
    names = dict.fromkeys(name for one in group.layers for name in one.values)
    means = {
        name: _mean([one.values[name] for one in group.layers if name in one.values])
        for name in names
    }
    return "  ".join(f"{name} {value:.3g}" for name, value in means.items())
