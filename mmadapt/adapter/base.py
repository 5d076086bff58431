"""What an adapter is: a method with its hyper-parameters, as frozen data."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from mmadapt.errors import AdapterError

if TYPE_CHECKING:
    import torch

    from mmadapt.core.layer import Layer
    from mmadapt.core.site import SiteView


@dataclass(frozen=True)
class Adapter:
    """A method with its hyper-parameters: what to build, and at which sites by default.

    Subclasses are frozen dataclasses whose fields are plain JSON values, or tuples of them; one with
    a `__post_init__` of its own calls this one.
    """

    #: name in adapter files; unique among registered adapters
    method: ClassVar[str] = ""
    #: "module:class" of the layer built at each site
    layer: ClassVar[str] = ""
    #: "module:class" of the layer, without a port, that all sites of one attachment share, or ""
    shared: ClassVar[str] = ""
    #: ports the layer can use, preferred first
    ports: ClassVar[tuple[str, ...]] = ("out",)
    #: site patterns used when `attach` is given none
    default_sites: ClassVar[tuple[str, ...]] = ()
    #: the next step where a backbone has none of the default sites; "" names the nearest sites
    elsewhere: ClassVar[str] = ""
    #: "" when the method starts as the identity, else the reason why it does not
    not_identity: ClassVar[str] = ""
    #: the paper
    source: ClassVar[str] = ""

    #: site patterns of this very adapter, as presets set them; None means `default_sites`
    at: tuple[str, ...] | None = dataclasses.field(default=None, kw_only=True, repr=False)

    def __post_init__(self) -> None:
        at: Any = (self.at,) if isinstance(self.at, str) else self.at
        if at is None:
            return
        strings = isinstance(at, (list, tuple)) and all(isinstance(one, str) and one for one in at)
        if not strings or not at:
            raise AdapterError(
                f"{type(self).__name__}: at is {self.at!r}, expected a site pattern or several",
                'for example at="vision.layers[-6:].mlp"',
            )
        object.__setattr__(self, "at", tuple(at))

    @property
    def patterns(self) -> tuple[str, ...]:
        """Site patterns used when `attach` is given none."""
        return self.default_sites if self.at is None else self.at

    def patterns_among(self, roles: Iterable[str]) -> tuple[str, ...]:
        """The same for a backbone with these roles, where they depend on how many it has."""
        return self.patterns

    @property
    def every_pattern(self) -> bool:
        """Whether each of `patterns` has to select a site; defaults name roles of many families."""
        return self.at is not None

    def build(self, site: SiteView, generator: torch.Generator) -> Layer:
        """Make the trainable layer for one site, drawing from `generator` only."""
        return _named(self.layer)(self, site, generator)

    def build_shared(self, sites: Sequence[SiteView], generator: torch.Generator) -> Layer | None:
        """Make what the layers at all `sites` share, before any of them; None: they share nothing."""
        return _named(self.shared)(self, sites, generator) if self.shared else None

    def starts_as_identity(self) -> bool:
        """Whether a freshly attached layer leaves the backbone's outputs as they are."""
        return not self.not_identity

    def to_json(self) -> dict[str, Any]:
        """The adapter as plain JSON, `from_json`'s inverse."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        if self.at is None:
            del fields["at"]
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}
        return {"method": self.method, **plain}


def _named(reference: str) -> Any:
    """The class at "module:class"."""
    import importlib

    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)
