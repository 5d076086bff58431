"""Layers that a foreign file asks for: collected role by role, checked, then attached all at once."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mmadapt.core.site import stem
from mmadapt.core.table import shape_of
from mmadapt.interop.foreign import refuse_keys

if TYPE_CHECKING:
    from torch import Tensor

    from mmadapt.adapter import Adapter
    from mmadapt.core.attachment import Attachment
    from mmadapt.core.site import SiteView
    from mmadapt.interop.module_paths import Places


@dataclass(eq=False)
class Placing:
    """An attachment in the making. Roles with equal hyper-parameters share an adapter."""

    places: Places
    adapters: dict[Adapter, dict[str, dict[str, Tensor]]] = field(default_factory=dict)
    #: what does not fit, in the file's own keys
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    shapes: list[str] = field(default_factory=list)

    def put(self, adapter: Adapter, role: str, **tensors: Tensor) -> None:
        """A layer at `role` with these tensors."""
        self.adapters.setdefault(adapter, {})[role] = tensors

    def fits(self, key: str, tensor: Tensor, *shape: int) -> bool:
        """Whether a tensor of the file has the shape it needs; noted where it has not."""
        if tuple(tensor.shape) == shape:
            return True
        wanted = ",".join(map(str, shape))
        self.shapes.append(f"{key} is {shape_of(tensor)}, expected [{wanted}]")
        return False

    def require_everywhere(self, roles: Collection[str]) -> None:
        """Note as missing the roles that are like these in other layers, and not among them."""
        stems = {stem(role) for role in roles}
        self.missing += [
            f"a change of {role}"
            for role in self.places.spans
            if stem(role) in stems and role not in roles
        ]

    def attach(self, name: str, replace: bool = False) -> Attachment:
        """Attach everything; `AdapterFileError` names what was missing, left over or mis-shaped."""
        from mmadapt.core.install import install

        refuse_keys(self.missing, self.unexpected, self.shapes)
        values: dict[str, Tensor] = {}
        sites: list[list[SiteView]] = []
        order = {role: place for place, role in enumerate(self.places.spans)}
        for index, (adapter, by_role) in enumerate(self.adapters.items()):
            views = [
                self.places.view(role, adapter.ports)
                for role in sorted(by_role, key=order.get)  # type: ignore[arg-type]
            ]
            sites.append(views)
            for view in views:
                for word, tensor in by_role[view.role].items():
                    values[f"{index}/{view.name}/{word}"] = tensor
        return install(
            self.places.model,
            self.places.anatomy,
            self.places.entry,
            tuple(self.adapters),
            sites,
            name,
            replace=replace,
            tensors=values,
        )
