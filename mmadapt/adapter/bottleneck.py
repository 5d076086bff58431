"""Bottleneck adapters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from mmadapt.adapter.base import Adapter
from mmadapt.adapter.registry import register_adapter
from mmadapt.adapter.validation import ACTIVATIONS, Activation, number, one_of, positive


@register_adapter
@dataclass(frozen=True)
class Bottleneck(Adapter):
    """Down-projection, activation, up-projection and a residual connection (Houlsby et al. 2019).

    `sequential` reads the site's output y, `parallel` its input x (He et al. 2022):
    y + norm_after(s·up(dropout(act(down(norm_before(z)))))) with z = y or x.

    `norm` adds a LayerNorm of the adapter's own before the down-projection or after the scaling.
    `scale` is the number s; with `scale_kind` "learned" or "channel" it is where one trained number,
    or one a channel, begins. `start="houlsby"` draws both projections from N(0, 0.01²) within two
    deviations, which is no identity. The class methods give published configurations with their sites.

    Parameters per site: 2·C·width + width + C for C channels; with a norm 2·C more, with a trained
    scale 1 or C more.
    """

    method: ClassVar[str] = "bottleneck"
    layer: ClassVar[str] = "mmadapt.methods.bottleneck:BottleneckLayer"
    ports: ClassVar[tuple[str, ...]] = ("out",)
    default_sites: ClassVar[tuple[str, ...]] = ("*.layers[*].mlp", "blocks[*].mlp")
    not_identity: ClassVar[str] = 'start="houlsby" draws the up-projection too, as published'
    source: ClassVar[str] = (
        "Houlsby et al. 2019, arXiv:1902.00751; He et al. 2022, arXiv:2110.04366"
    )

    width: int = 32
    placement: Literal["sequential", "parallel"] = "sequential"
    activation: Activation = "gelu"
    scale: float = 1.0
    scale_kind: Literal["fixed", "learned", "channel"] = "fixed"
    norm: Literal["none", "before", "after"] = "none"
    dropout: float = 0.0
    start: Literal["zero", "houlsby"] = "zero"

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "width")
        one_of(self, "placement", ("sequential", "parallel"))
        one_of(self, "activation", ACTIVATIONS)
        number(self, "scale", low=-1e6, high=1e6)
        one_of(self, "scale_kind", ("fixed", "learned", "channel"))
        one_of(self, "norm", ("none", "before", "after"))
        number(self, "dropout", low=0.0, high=0.999)
        one_of(self, "start", ("zero", "houlsby"))

    def starts_as_identity(self) -> bool:
        return self.start == "zero"

    @classmethod
    def houlsby(cls, width: int = 64, **changes: Any) -> Bottleneck:
        """Two per block, behind the attention and the MLP branch (arXiv:1902.00751)."""
        options: dict[str, Any] = {
            "activation": "silu",
            "at": ("*.layers[*].attn", "*.layers[*].mlp"),
        }
        return cls(width, **{**options, **changes})

    @classmethod
    def pfeiffer(cls, width: int = 48, **changes: Any) -> Bottleneck:
        """One per block, behind the MLP and its residual connection (arXiv:2005.00247)."""
        options: dict[str, Any] = {"activation": "relu", "at": ("*.layers[*]",)}
        return cls(width, **{**options, **changes})

    @classmethod
    def parallel(cls, width: int = 512, **changes: Any) -> Bottleneck:
        """One beside each MLP, reading the MLP's input, scale 4 (arXiv:2110.04366)."""
        options: dict[str, Any] = {
            "placement": "parallel",
            "activation": "relu",
            "scale": 4.0,
            "at": ("*.layers[*].mlp",),
        }
        return cls(width, **{**options, **changes})

    @classmethod
    def adaptformer(cls, width: int = 64, **changes: Any) -> Bottleneck:
        """One beside each MLP with an input LayerNorm, scale 0.1 (arXiv:2205.13535).

        In pre-norm backbones the MLP's input is normalised already; `norm="none"` then reads the
        paper's equation with the backbone's own norm.
        """
        options: dict[str, Any] = {
            "placement": "parallel",
            "activation": "relu",
            "scale": 0.1,
            "norm": "before",
            "dropout": 0.1,
            "at": ("*.layers[*].mlp",),
        }
        return cls(width, **{**options, **changes})

    @classmethod
    def adapterplus(cls, width: int = 8, **changes: Any) -> Bottleneck:
        """One behind each block with a trained scale per channel (Adapter+, arXiv:2406.06820).

        Starts as published, with Houlsby's draw; `start="zero"` makes it an identity.
        """
        options: dict[str, Any] = {
            "activation": "gelu",
            "scale_kind": "channel",
            "start": "houlsby",
            "at": ("*.layers[*]",),
        }
        return cls(width, **{**options, **changes})
