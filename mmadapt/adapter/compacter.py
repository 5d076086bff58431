"""Compacter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from mmadapt.adapter.base import Adapter
from mmadapt.adapter.registry import register_adapter
from mmadapt.adapter.validation import ACTIVATIONS, Activation, one_of, positive
from mmadapt.errors import AdapterError


@register_adapter
@dataclass(frozen=True)
class Compacter(Adapter):
    """A bottleneck whose projections are sums of Kronecker products (Karimi Mahabadi et al. 2021).

    Each projection is Σ_i A_i ⊗ (s_i·t_iᵀ) with `division` terms, both with biases; down and up of a
    site share the A_i. The paper shares them across layers too, and trains the backbone's norms
    beside them; here every site has its own A_i, division³ numbers, and norms are `Unlock`'s.
    `start="zero"` sets the up-projection's t_i to zero; "published" draws them.

    Parameters per site: 2·(C + width) + C + width + division³.
    """

    method: ClassVar[str] = "compacter"
    layer: ClassVar[str] = "mmadapt.methods.compacter:CompacterLayer"
    ports: ClassVar[tuple[str, ...]] = ("out",)
    default_sites: ClassVar[tuple[str, ...]] = ("*.layers[*].attn", "*.layers[*].mlp")
    not_identity: ClassVar[str] = 'start="published" draws every factor'
    source: ClassVar[str] = "Karimi Mahabadi et al. 2021, arXiv:2106.04647"

    width: int = 24
    division: int = 4
    activation: Activation = "gelu_new"
    start: Literal["zero", "published"] = "zero"

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "width", "division")
        one_of(self, "activation", ACTIVATIONS)
        one_of(self, "start", ("zero", "published"))
        if self.width % self.division:
            raise AdapterError(
                f"Compacter: division {self.division} does not divide the width {self.width}"
            )

    def starts_as_identity(self) -> bool:
        return self.start == "zero"

    @classmethod
    def plus_plus(cls, width: int = 24, **changes: Any) -> Compacter:
        """Compacter++: behind the MLP only."""
        options: dict[str, Any] = {"at": ("*.layers[*].mlp",)}
        return cls(width, **{**options, **changes})
