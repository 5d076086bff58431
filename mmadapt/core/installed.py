"""What stands on a backbone's modules while something is attached: hooks, and how to take them off."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.nn.modules.batchnorm import _BatchNorm

from mmadapt.core.compiled import first_after, first_before
from mmadapt.core.dispatch import AroundHook, InHook, OutHook, ShareHook, SiteHook
from mmadapt.core.effective import WeightHook, WeightRestore, WeightSite
from mmadapt.core.passes import Begin, End, FirstForward, TapHook, tap_hook

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import nn

    from mmadapt.core.anatomy import Anatomy
    from mmadapt.core.context import Forwards
    from mmadapt.core.site import SiteView


class Installed:
    """The hooks on one backbone; they stay from attach to detach, whatever is switched."""

    def __init__(self, root: nn.Module, anatomy: Anatomy, forwards: Forwards) -> None:
        self.root = root
        self.anatomy = anatomy
        self.forwards = forwards
        self.sites: dict[str, SiteHook] = forwards.sites
        self.taps: dict[str, TapHook] = forwards.taps
        #: hooks that several roles share, by the name their handles have
        self.groups: dict[str, ShareHook | WeightHook] = {}
        self.begins: list[Begin] = []
        self.handles: dict[str, list[Any]] = {}
        #: attributes of the backbone's modules as they were, by path
        self.former: dict[str, Any] = {}

    def put(self, site: SiteView, taps: dict[str, str]) -> None:
        """Put one dispatcher at `site`, if none stands there, and the taps its layers read."""
        for tap, path in taps.items():
            if tap not in self.taps:
                where, _, end = path.partition(":")
                module = self.root.get_submodule(where)
                self.taps[tap] = tap_hook(tap, end, self.forwards)
                self.handles[f"tap {tap}"] = [self.taps[tap].register(module)]
        if site.name in self.sites:
            self.sites[site.name].site.taps.update(site.taps)
            return
        self.sites[site.name] = self._dispatcher(site)

    def _dispatcher(self, site: SiteView) -> SiteHook:
        if site.port == "weight":
            hook = WeightSite(site, self.forwards)
            self._weight_hook(site).sites.append(hook)
            return hook
        if site.port == "around":
            hook = AroundHook(site, self.forwards)
            self.handles[site.name] = [hook.install()]
            return hook
        module = site.module
        if site.port == "in":
            hook = InHook(site, self.forwards)
            self.handles[site.name] = [first_before(module, hook)]
            return hook
        hook = OutHook(site, self.forwards)
        if site.span.block[1] > 1:
            self._share_hook(site).sites.append(hook)
            return hook
        self.handles[site.name] = [first_after(module, hook)]
        return hook

    def _share_hook(self, site: SiteView) -> ShareHook:
        key = f"share {site.span.module}"
        if key not in self.groups:
            hook = self.groups[key] = ShareHook(self.forwards)
            self.handles[key] = [first_after(site.module, hook)]
        return self.groups[key]  # type: ignore[return-value]

    def _weight_hook(self, site: SiteView) -> WeightHook:
        key = f"weight {site.span.module} {site.span.weight}"
        if key not in self.groups:
            assert site.holder is not None
            hook = self.groups[key] = WeightHook(site.holder, site.parameter, self.forwards)
            self.handles[key] = [
                first_before(site.module, hook),
                site.module.register_forward_hook(WeightRestore(hook), always_call=True),
            ]
        return self.groups[key]  # type: ignore[return-value]

    def follow_passes(self) -> None:
        """Have the root and the towers announce their forward passes."""
        statistics = {
            path: module
            for path, module in self.root.named_modules()
            if isinstance(module, _BatchNorm) and module.track_running_stats
        }
        for path in dict.fromkeys(("", *self.anatomy.towers.values(), *self.anatomy.fills)):
            below = {name: norm for name, norm in statistics.items() if _below(name, path)}
            begin = Begin(self.forwards, self.anatomy.fills.get(path), below)
            module = self.root.get_submodule(path)
            self.begins.append(begin)
            self.handles[f"begin {path}"] = [
                first_before(module, begin),
                module.register_forward_hook(End(begin), always_call=True),
            ]

    def settle(self) -> None:
        """Give the backbone's modules the attributes that the anatomy says, until `remove_all`."""
        self.former = _exchanged(self.root, self.anatomy.settings)

    def watch_first_forward(self) -> None:
        """Have each tower's next call verify that its sites fire."""
        for tower, path in (self.anatomy.towers or {"model": ""}).items():
            below = [h for h in self.sites.values() if _below(h.site.span.module, path)]
            fresh = [hook for hook in below if not hook.fired]
            if not fresh:
                continue
            check = FirstForward(tower, below)
            key = f"first {tower}"
            for handle in self.handles.pop(key, []):
                handle.remove()
            module = self.root.get_submodule(path)
            check.handle = module.register_forward_hook(check)
            self.handles[key] = [check.handle]

    def keep(self, needed: Iterable[str]) -> None:
        """Remove the dispatchers and taps that none of the sites `needed` has a use for."""
        needed = set(needed)
        for name in [name for name in self.sites if name not in needed]:
            hook = self.sites.pop(name)
            hook.plan = ()  # a first-forward check may still hold it
            for handle in self.handles.pop(name, []):
                handle.remove()
            self._leave_group(hook)
        sites = [hook.site for hook in self.sites.values()]
        read = {tap for site in sites for word in site.taps for tap in site.read_taps(word)}
        for tap in [tap for tap in self.taps if tap not in read]:
            del self.taps[tap]
            for handle in self.handles.pop(f"tap {tap}"):
                handle.remove()

    def _leave_group(self, hook: SiteHook) -> None:
        """Take a role out of the hook it shares with others, and that one off if it was the last."""
        for key, group in list(self.groups.items()):
            if hook in group.sites:
                group.sites.remove(hook)  # type: ignore[arg-type]
            if not group.sites:
                del self.groups[key]
                for handle in self.handles.pop(key):
                    handle.remove()

    def remove_all(self) -> None:
        """Take every hook off the backbone."""
        for handles in self.handles.values():
            for handle in handles:
                handle.remove()
        self.handles.clear()
        _exchanged(self.root, self.former)


def _exchanged(root: nn.Module, values: Mapping[str, Any]) -> dict[str, Any]:
    """Set attributes by path; returns what they were."""
    former = {}
    for path, value in values.items():
        where, _, name = path.rpartition(".")
        module = root.get_submodule(where)
        former[path] = getattr(module, name)
        setattr(module, name, value)
    return former


def _below(module: str, tower: str) -> bool:
    return module == tower or not tower or module.startswith(f"{tower}.")
