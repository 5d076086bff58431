"""Compacter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from mmadapt.adapter.base import Adapter
from mmadapt.adapter.registry import register_adapter
from mmadapt.adapter.validation import ACTIVATIONS, Activation, flag, one_of, positive
from mmadapt.errors import AdapterError

if TYPE_CHECKING:
    import torch

    from mmadapt.core.layer import Layer
    from mmadapt.core.site import SiteView


@register_adapter
@dataclass(frozen=True)
class Compacter(Adapter):
    """A bottleneck whose projections are sums of Kronecker products (Karimi Mahabadi et al. 2021).

    Each projection is Σ_i A_i ⊗ (s_i·t_iᵀ) with `division` terms, both with biases. The A_i, the
    rule of division³ numbers, are shared by both projections of all sites, as the paper does;
    `shared_rule=False` gives every site its own. The paper trains the backbone's norms beside them;
    here norms are `Unlock`'s. `start="zero"` sets the up-projection's t_i to zero; "published" draws
    them.

    Parameters per site: 2·(C + width) + C + width; the rule once, or once a site.

        clip = mm.load("tiny/clip")
        mm.attach(clip, mm.Compacter.plus_plus(width=8, division=4), at="vision.layers[*].mlp")
        features = clip.model.encode_image(torch.randn(2, 3, 32, 32))
    """

    method: ClassVar[str] = "compacter"
    layer: ClassVar[str] = "mmadapt.methods.compacter:CompacterLayer"
    ports: ClassVar[tuple[str, ...]] = ("out",)
    default_sites: ClassVar[tuple[str, ...]] = ("*.layers[*].attn", "*.layers[*].mlp")
    shared: ClassVar[str] = "mmadapt.methods.compacter:CompacterRule"
    not_identity: ClassVar[str] = 'start="published" draws every factor'
    source: ClassVar[str] = "Karimi Mahabadi et al. 2021, arXiv:2106.04647"

    width: int = 24
    division: int = 4
    activation: Activation = "gelu_new"
    start: Literal["zero", "published"] = "zero"
    shared_rule: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "width", "division")
        one_of(self, "activation", ACTIVATIONS)
        one_of(self, "start", ("zero", "published"))
        flag(self, "shared_rule")
        if self.width % self.division:
            raise AdapterError(
                f"Compacter: division {self.division} does not divide the width {self.width}"
            )

    def build_shared(self, sites: Sequence[SiteView], generator: torch.Generator) -> Layer | None:
        return super().build_shared(sites, generator) if self.shared_rule else None

    def starts_as_identity(self) -> bool:
        return self.start == "zero"

    @classmethod
    def plus_plus(cls, width: int = 24, **changes: Any) -> Compacter:
        """Compacter++: behind the MLP only."""
        options: dict[str, Any] = {"at": ("*.layers[*].mlp",)}
        return cls(width, **{**options, **changes})
