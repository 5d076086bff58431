"""Tables of what can be adapted, what would be, and what is."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmadapt.core.attach import as_adapters, resolve
from mmadapt.core.attached import require_bank, require_name
from mmadapt.core.backbone import unwrap
from mmadapt.core.site import stem
from mmadapt.core.table import Table, count, shape_of

if TYPE_CHECKING:
    from torch import nn

    from mmadapt.adapter import Adapter
    from mmadapt.core.attachment import Attachment


def sites(m: Any, pattern: str | None = None) -> Table:
    """Where one can attach: every role with its ports and widths, alike layers in one row.

    With a `pattern`, one row for each role it selects. Biases have rows only there; else a note says
    how many there are.
    """
    from mmadapt.core.site import BIAS, match_roles, nothing_matched

    model, anatomy, _ = unwrap(m)
    spans = anatomy.roles(model)
    former = anatomy.former(spans)
    chosen = match_roles(pattern, spans)[0] if pattern else list(spans)
    if pattern and not chosen:
        chosen = [former[old] for old in match_roles(pattern, former)[0]]
    if pattern and not chosen:
        raise nothing_matched(pattern, spans)
    rows: dict[tuple, list[str]] = {}
    biases = [] if pattern else [role for role in chosen if role.endswith(f".{BIAS}")]
    chosen = [role for role in chosen if role not in biases]
    for role in chosen:
        span = spans[role]
        view = anatomy.view(model, role, span.ports[0], span)
        path = span.module or "(root)"
        key = (
            role if pattern else stem(role),
            " ".join(span.ports),
            str(view.width) if view.width == view.width_in else f"{view.width_in} → {view.width}",
            path if pattern else re.sub(r"\.\d+(?=\.|$)", ".*", path),
        )
        rows.setdefault(key, []).append(role)
    table = Table(("site", "ports", "width", "sites", "module"))
    table.rows = [(*key[:3], len(roles), key[3]) for key, roles in rows.items()]
    table.title = f"{type(model).__name__}: {len(chosen)} roles of family {anatomy.family!r}"
    if biases:
        table.notes.append(
            f"{len(biases)} biases beside them have a weight port, such as {stem(biases[0])!r}"
        )
    return table


def plan(
    m: Any, adapter: Adapter | Sequence[Adapter], at: str | Sequence[str] | None = None
) -> Table:
    """What `attach` would build: for each pattern the sites, shapes and parameters; changes nothing.

    What an adapter's sites share is a row of its own, "shared".
    """
    import torch

    from mmadapt.core.install import build

    model, anatomy, _ = unwrap(m)
    several = as_adapters(adapter)
    roles = anatomy.roles(model)
    default = [pattern for one in several for pattern in one.patterns_among(roles)]
    patterns = default if at is None else ((at,) if isinstance(at, str) else tuple(at))
    table = Table(("site", "width", "tensors", "parameters"))
    generator = torch.Generator().manual_seed(0)
    total = 0
    met = 0
    for each in several:
        chosen = resolve(model, anatomy, each, at)
        widths = {site.name: site.width for site in chosen}
        met += len(chosen)
        for place, layer in build(each, chosen, generator).items():
            size = sum(parameter.numel() for parameter in layer.parameters())
            shapes = " ".join(f"{name} {shape_of(p)}" for name, p in layer.named_parameters())
            table.rows.append((place, widths.get(place, ""), shapes, size))
            total += size
    table.title = f"{adapter} at {', '.join(patterns)}: {met} sites, {_share(total, model)}"
    return table


def summary(attachment: Attachment) -> Table:
    """One row per group of alike sites of one attachment."""
    model, bank = require_bank(attachment.model)
    record = bank.records[require_name(bank, attachment.name, "summary")]
    groups: dict[tuple, list[int]] = {}
    for key, layer in bank.tensors_of(attachment.name):
        index, _, site = key.partition("/")
        shapes = " ".join(f"{name} {shape_of(p)}" for name, p in layer.named_parameters())
        shapes = shapes or " ".join(f"{name} {shape_of(b)}" for name, b in layer.named_buffers())
        group = (stem(site), type(record.adapters[int(index)]).__name__, shapes)
        groups.setdefault(group, []).append(sum(p.numel() for p in layer.parameters()))
    table = Table(("site", "adapter", "tensors", "sites", "parameters"))
    table.rows = [(*group, len(sizes), sum(sizes)) for group, sizes in groups.items()]
    state = "active" if attachment.name in bank.active.names else "not active"
    total = attachment.num_parameters
    table.title = f"{attachment.name} ({state}): {len(attachment.sites)} sites, {_share(total, model)} trainable"
    return table


def inspect(m: Any, batch: Any = None) -> Table:
    """What is attached: every layer with its parameters, norm and gates.

    With a `batch`, what the model takes as for `check`, there is also the share by which what acts at
    each site changes what flows through it, ‖change‖ / ‖what was there‖ on average.
    """
    model, bank = require_bank(m)
    shares = None if batch is None else mean_shares(m, batch)
    columns = ("attachment", "site", "adapter", "parameters", "norm", "values")
    table = Table(columns if shares is None else (*columns, "share"))
    for one in layers(m):
        values = "  ".join(f"{k} {v:.4g}" for k, v in one.values.items())
        row = (one.attachment, one.site, one.adapter, one.parameters, one.norm, values)
        table.rows.append(row if shares is None else (*row, shares.get(one.site)))
    table.title = (
        f"{type(model).__name__}: {len(bank.records)} attached "
        f"({', '.join(bank.records)}), active: {bank.active!r}"
    )
    return table


@dataclass(frozen=True)
class LayerReport:
    """One layer of an attachment; its site is "shared" for what the sites of an adapter share."""

    attachment: str
    site: str
    adapter: str
    parameters: int
    #: of all its parameters together
    norm: float
    #: what the layer says of itself, such as gates
    values: dict[str, float]


def layers(m: Any) -> list[LayerReport]:
    """Every layer of every attachment, in the order they were built."""
    _, bank = require_bank(m)
    found = []
    for name, record in bank.records.items():
        for key, layer in bank.tensors_of(name):
            index, _, site = key.partition("/")
            tensors = list(layer.parameters())
            norm = sum(float(t.detach().float().square().sum()) for t in tensors) ** 0.5
            method = type(record.adapters[int(index)]).__name__
            size = sum(t.numel() for t in tensors)
            found.append(LayerReport(name, site, method, size, norm, layer.describe()))
    return found


def mean_shares(m: Any, batch: Any) -> dict[str, float]:
    """The mean contribution of every site that acts, by the site's own name."""
    from mmadapt.core.contribution import contribution

    found = contribution(m, batch)
    return {site: found.mean(name) for name, sites in found.sites.items() for site in sites}


def updates(m: Any) -> dict[tuple[str, str], float]:
    """‖ΔW‖ / ‖W‖ by (attachment, site), of every layer that is a linear change of a plain weight."""
    import torch

    from mmadapt.core.anatomy import bias_name
    from mmadapt.core.host import why_not_plain

    _, bank = require_bank(m)
    found: dict[tuple[str, str], float] = {}
    for name in bank.records:
        for key, layer in bank.layers_of(name):
            site = bank.hooks[key.partition("/")[2]].site
            if name in bank.merged or site.holder is None:
                continue
            whole = getattr(site.holder, site.parameter)
            if why_not_plain(whole):
                continue
            with torch.no_grad():
                rows = whole[slice(*site.rows)]
                bias = getattr(site.holder, bias_name(site.parameter), None)
                bias = None if bias is None else bias[slice(*site.rows)]
                folded = layer.fold(rows, bias, site)
                if folded is not None:
                    change = (folded[0].float() - rows.float()).norm() / rows.float().norm()
                    found[name, site.name] = float(change)
    return found


def _share(added: int, model: nn.Module) -> str:
    from mmadapt.core.bank import backbone_parameters

    own = sum(parameter.numel() for _, parameter in backbone_parameters(model))
    share = 100 * added / own if own else 0.0
    return f"{count(added)} of {count(own)} parameters ({share:.2g} %)"
