"""Scales and shifts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from mmadapt.adapter.base import Adapter
from mmadapt.adapter.registry import register_adapter
from mmadapt.adapter.validation import flag, one_of

if TYPE_CHECKING:
    import torch

    from mmadapt.core.layer import Layer
    from mmadapt.core.site import SiteView


@register_adapter
@dataclass(frozen=True)
class ScaleShift(Adapter):
    """A trained scale and shift per channel, y·γ + β, behind every operation (SSF, Lian et al. 2022).

    Starts at γ = 1 and β = 0; `start="published"` draws them from N(1, 0.02²) and N(0, 0.02²). By
    default it stands at the patch embedding, at the norms, and at those projections and linears of a
    block that the backbone calls.
    It replaces its site's output, so two of them stack and do not sum. Merges exactly into the
    linear or norm it stands behind.

    Parameters per site: 2·C.
    """

    method: ClassVar[str] = "scale_shift"
    layer: ClassVar[str] = "mmadapt.methods.affine:ScaleShiftLayer"
    ports: ClassVar[tuple[str, ...]] = ("out",)
    default_sites: ClassVar[tuple[str, ...]] = (
        "*.layers[*].norm1",
        "*.layers[*].attn.q",
        "*.layers[*].attn.k",
        "*.layers[*].attn.v",
        "*.layers[*].attn.o",
        "*.layers[*].norm2",
        "*.layers[*].mlp.up",
        "*.layers[*].mlp.down",
        "*.patches",
        "*.embeddings.norm",
        "*.norm",
    )
    not_identity: ClassVar[str] = 'start="published" draws the scales and shifts'
    source: ClassVar[str] = "Lian et al. 2022, arXiv:2210.08823"

    start: Literal["identity", "published"] = "identity"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, "start", ("identity", "published"))

    def starts_as_identity(self) -> bool:
        return self.start == "identity"


@register_adapter
@dataclass(frozen=True)
class AdapterBias(Adapter):
    """A shift per token along one trained direction, y + (w·z + b)·v (Fu et al. 2022).

    Stands at the MLP's second linear: z is its input, the activations inside the MLP. v starts at
    zero. `shared_gate` is the paper's variant with one (w, b) for all sites, which then need inputs
    of one width.

    Parameters per site: inputs + outputs + 1; with `shared_gate` outputs, and inputs + 1 once.
    """

    method: ClassVar[str] = "adapter_bias"
    layer: ClassVar[str] = "mmadapt.methods.affine:AdapterBiasLayer"
    ports: ClassVar[tuple[str, ...]] = ("out",)
    default_sites: ClassVar[tuple[str, ...]] = ("*.layers[*].mlp.down",)
    shared: ClassVar[str] = "mmadapt.methods.affine:AdapterBiasGate"
    source: ClassVar[str] = "Fu et al. 2022, arXiv:2205.00305"

    shared_gate: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        flag(self, "shared_gate")

    def build_shared(self, sites: Sequence[SiteView], generator: torch.Generator) -> Layer | None:
        return super().build_shared(sites, generator) if self.shared_gate else None
