"""Adapters folded into the weights they stand at, and taken out again bit by bit.

A merged attachment costs nothing at inference and is not active beside its own merge. Originals are
kept on the CPU until `unmerge`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mmadapt.core.anatomy import bias_name
from mmadapt.core.attached import require_bank, require_name
from mmadapt.core.compose import Sum
from mmadapt.errors import MergeError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mmadapt.core.bank import Bank
    from mmadapt.core.site import SiteView


def merge(m: Any, name: str | None = None, permanent: bool = False) -> None:
    """Fold one attachment into the backbone's weights; it stops acting on its own.

    `unmerge` gives the backbone back bit by bit, from originals kept on the CPU. With
    `permanent=True` nothing is kept: the attachment leaves, and without others the model is plain.
    Raises `MergeError` with the reason, before anything is changed, where a method cannot be merged.
    """
    _, bank = require_bank(m)
    name = require_name(bank, name, "merge")
    if name in bank.merged:
        raise MergeError(f"attachment {name!r} is merged already", "unmerge it first")
    changed = _folded(bank, name)
    originals = {}
    for (holder, key), value in changed.items():
        parameter = getattr(holder, key)
        originals[holder, key] = parameter.detach().cpu().clone()
        _write(parameter, value)
    bank.merged[name] = [(holder, key, value) for (holder, key), value in originals.items()]
    _forget_kept_weights(bank)
    if name in bank.active.names:
        bank.activate(bank.active.without(name))
    if permanent:
        from mmadapt.core.attach import detach

        del bank.merged[name]
        detach(m, name)


def unmerge(m: Any, name: str | None = None) -> None:
    """Take a merged attachment out of the weights, bit by bit, and make it the only active one.

    Attachments merged on top of it have to be unmerged before.
    """
    _, bank = require_bank(m)
    if name is None and len(bank.merged) == 1:
        name = next(iter(bank.merged))
    name = require_name(bank, name, "unmerge")
    if name not in bank.merged:
        raise MergeError(
            f"attachment {name!r} is not merged", "mmadapt.merge(model, name) merges it"
        )
    take_out(bank, name)
    bank.activate(Sum(name))


def take_out(bank: Bank, name: str) -> None:
    """Copy the kept originals of a merged attachment back."""
    last = next(reversed(bank.merged))
    if name != last:
        raise MergeError(
            f"{last!r} was merged after {name!r}",
            f"unmerge {last!r} first: originals are kept in order",
        )
    for holder, key, value in bank.merged.pop(name):
        _write(getattr(holder, key), value)
    _forget_kept_weights(bank)


def _write(parameter: Tensor, value: Tensor) -> None:
    """Not through `.data`, whose writes move no version counter: what is kept would not be renewed."""
    import torch

    with torch.no_grad():
        parameter.copy_(value)


def _folded(bank: Bank, name: str) -> dict[tuple[nn.Module, str], Tensor]:
    """New values of every parameter the attachment changes; nothing is written yet."""
    import torch

    from mmadapt.core.host import why_not_plain

    values: dict[tuple[nn.Module, str], Tensor] = {}
    with torch.no_grad():
        for key, layer in bank.layers_of(name):
            site = bank.hooks[key.partition("/")[2]].site
            if site.holder is None:
                raise MergeError(
                    f"{type(layer).__name__} at {site.name} cannot be merged: the site stands for no "
                    "weight",
                    "methods on linear layers merge, such as LoRA",
                )
            reason = why_not_plain(getattr(site.holder, site.parameter))
            if reason:
                raise MergeError(
                    f"{type(layer).__name__} at {site.name} cannot be merged into its weight: {reason}",
                    "keep it attached",
                )
            start, stop = site.rows
            bias_name = _bias_name(site)
            weight = _current(values, site.holder, site.parameter)
            bias = _current(values, site.holder, bias_name) if bias_name else None
            folded = layer.fold(
                weight[start:stop], None if bias is None else bias[start:stop], site
            )
            if folded is None:
                raise MergeError(
                    f"{type(layer).__name__} at {site.name} cannot be merged: {layer.why_not_merge}",
                    "keep it attached",
                )
            _put_rows(values, (site.holder, site.parameter), weight, folded[0], (start, stop))
            if folded[1] is None:
                continue
            if bias is None:
                raise MergeError(
                    f"{type(layer).__name__} at {site.name} cannot be merged: it needs a bias and the "
                    "backbone's layer has none"
                )
            assert bias_name is not None
            _put_rows(values, (site.holder, bias_name), bias, folded[1], (start, stop))
    for (holder, key), value in values.items():
        if not bool(torch.isfinite(value).all()):
            raise MergeError(
                f"merging would write a value that is not finite into {key!r} of {holder}"
            )
    return values


def _current(values: dict[tuple[nn.Module, str], Tensor], holder: nn.Module, name: str) -> Tensor:
    if (holder, name) in values:
        return values[holder, name]
    return getattr(holder, name).detach()


def _put_rows(
    values: dict[tuple[nn.Module, str], Tensor],
    key: tuple[nn.Module, str],
    whole: Tensor,
    rows: Tensor,
    place: tuple[int, int],
) -> None:
    new = whole.clone() if key not in values else values[key]
    new[place[0] : place[1]] = rows.to(new.dtype)
    values[key] = new


def _bias_name(site: SiteView) -> str | None:
    """The bias beside the site's weight, where there is one."""
    name = bias_name(site.parameter)
    return name if name and getattr(site.holder, name, None) is not None else None


def _forget_kept_weights(bank: Bank) -> None:
    """Effective weights that were assembled from the old values must not be used again."""
    from mmadapt.core.effective import WeightHook

    for group in bank.installed.groups.values():
        if isinstance(group, WeightHook):
            group.forget()
