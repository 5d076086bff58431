"""Scales and shifts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from mmadapt.adapter.base import Adapter
from mmadapt.adapter.registry import register_adapter
from mmadapt.adapter.validation import flag, one_of
from mmadapt.errors import AdapterError

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

        clip = mm.load("tiny/clip")
        mm.attach(clip, mm.ScaleShift())
        features = clip.model.encode_image(torch.randn(2, 3, 32, 32))
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

        clip = mm.load("tiny/clip")
        mm.attach(clip, mm.AdapterBias(), at="text.layers[*].mlp.down")
        features = clip.model.encode_text(clip.tokenize(["a red circle"]))
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


_LINEARS = tuple(
    f"text.layers[*].{linear}"
    for linear in ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down")
)


@register_adapter
@dataclass(frozen=True)
class BiasScale(Adapter):
    """A trained bias b and scale s at every linear of a decoder (LLaMA-Adapter V2, Gao et al. 2023).

    `scale="output"` is the paper's s·(W·x + b); "input" is W·(s·x) + b as the authors released it,
    "none" trains the bias alone. They start at b = 0 and s = 1. The scale on the input stands at a
    linear's `in` port and its bias at the `out` port, so sites of one's own name both.

    A scale replaces what its site gives, so two of them stack and do not sum. Merges exactly into a
    linear that has a bias; without one its scales alone would.

    Parameters per linear: outputs, and as many more ("output"), or inputs more ("input").

        llama = mm.load("tiny/llama")
        mm.attach(llama, mm.BiasScale())
        tokens = llama.tokenize(["spell ab backwards = "], return_tensors="pt")
        logits = llama(**tokens).logits
    """

    method: ClassVar[str] = "bias_scale"
    layer: ClassVar[str] = "mmadapt.methods.affine:BiasScaleLayer"
    ports: ClassVar[tuple[str, ...]] = ("out", "in")
    source: ClassVar[str] = "Gao et al. 2023 (LLaMA-Adapter V2), arXiv:2304.15010"

    scale: Literal["output", "input", "none"] = "output"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, "scale", ("output", "input", "none"))

    @property
    def patterns(self) -> tuple[str, ...]:
        if self.at is not None:
            return self.at
        ports = (":in", ":out") if self.scale == "input" else (":out",)
        return tuple(linear + port for linear in _LINEARS for port in ports)

    def build_shared(self, sites: Sequence[SiteView], generator: torch.Generator) -> Layer | None:
        met = {site.name for site in sites}
        for site in sites:
            other = f"{site.role}:{'in' if site.port == 'out' else 'out'}"
            if (other in met) != (self.scale == "input"):
                raise AdapterError(
                    f'BiasScale with scale="{self.scale}" at {site.name} '
                    + (
                        f"needs {other} too" if self.scale == "input" else f"has no use for {other}"
                    ),
                    'with scale="input" name every linear twice, ":in" and ":out"; else ":out" alone',
                )
            if self.scale != "input" and site.port == "in":
                raise AdapterError(
                    f'BiasScale with scale="{self.scale}" cannot stand at {site.name}',
                    "use the `out` port",
                )
        return None
