"""Bottleneck adapters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from mmadapt.adapter.base import Adapter
from mmadapt.adapter.registry import register_adapter
from mmadapt.adapter.validation import ACTIVATIONS, Activation, number, one_of, positive
from mmadapt.errors import AdapterError


@register_adapter
@dataclass(frozen=True)
class Bottleneck(Adapter):
    """Down-projection, activation, up-projection and a residual connection (Houlsby et al. 2019).

    `sequential` reads the site's output y, `parallel` its input x (He et al. 2022):
    y + norm_after(s·up(dropout(act(down(norm_before(z)))))) with z = y or x. `residual` reads the
    residual stream at the branch, r in r + branch(norm(r)): x before the backbone's norm; `joined` reads
    it as the branch leaves it, r + y. At the `in` port, `at="audio.layers[*].mlp:in"`, it stands before
    the branch: x + s·up(…(x)).

    `norm` adds a LayerNorm of the adapter's own before the down-projection, after the scaling or both.
    `scale` is the number s; with `scale_kind` "learned" or "channel" it is where one trained number,
    or one a channel, begins. `start="houlsby"` draws both projections from N(0, 0.01²) within two
    deviations, which is no identity. `drop_path` is the probability that a row of the batch does
    without the change while training; the others' changes are divided by 1 − drop_path. The class
    methods give published configurations with their sites.

    Give `width`, the channels between the projections, or `reduction`: each site's own channels are
    then divided by it and rounded down, to 1 at least. Without either the width is 32.

    Parameters per site: 2·C·width + width + C for C channels; with a norm 2·C more, with both 4·C, with a trained
    scale 1 or C more.

        clip = mm.load("tiny/clip")
        mm.attach(clip, mm.Bottleneck(16), name="sketch", at="vision.layers[-2:].mlp")
        features = clip.model.encode_image(torch.randn(2, 3, 32, 32))
    """

    method: ClassVar[str] = "bottleneck"
    layer: ClassVar[str] = "mmadapt.methods.bottleneck:BottleneckLayer"
    ports: ClassVar[tuple[str, ...]] = ("out", "in")
    default_sites: ClassVar[tuple[str, ...]] = ("*.layers[*].mlp", "blocks[*].mlp")
    not_identity: ClassVar[str] = 'start="houlsby" draws the up-projection too, as published'
    source: ClassVar[str] = (
        "Houlsby et al. 2019, arXiv:1902.00751; He et al. 2022, arXiv:2110.04366"
    )

    width: int | None = None
    placement: Literal["sequential", "parallel", "residual", "joined"] = "sequential"
    activation: Activation = "gelu"
    scale: float = 1.0
    scale_kind: Literal["fixed", "learned", "channel"] = "fixed"
    norm: Literal["none", "before", "after", "both"] = "none"
    dropout: float = 0.0
    start: Literal["zero", "houlsby"] = "zero"
    reduction: int | None = None
    drop_path: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reduction is not None:
            positive(self, "reduction")
            if self.width is not None:
                raise AdapterError(
                    f"Bottleneck: width is {self.width!r} and reduction is {self.reduction!r}, and "
                    "either decides the width",
                    "give one of them",
                )
        elif self.width is None:
            object.__setattr__(self, "width", 32)
        else:
            positive(self, "width")
        number(self, "drop_path", low=0.0, high=0.999)
        one_of(self, "placement", ("sequential", "parallel", "residual", "joined"))
        one_of(self, "activation", ACTIVATIONS)
        number(self, "scale", low=-1e6, high=1e6)
        one_of(self, "scale_kind", ("fixed", "learned", "channel"))
        one_of(self, "norm", ("none", "before", "after", "both"))
        number(self, "dropout", low=0.0, high=0.999)
        one_of(self, "start", ("zero", "houlsby"))

    def starts_as_identity(self) -> bool:
        return self.start == "zero"

    def width_of(self, channels: int) -> int:
        """The width at a site that reads so many channels."""
        if self.reduction is None:
            assert self.width is not None  # given, or 32
            return self.width
        return max(1, channels // self.reduction)

    @classmethod
    def _published(cls, width: int | None, usual: int, **options: Any) -> Bottleneck:
        if width is None and options.get("reduction") is None:
            width = usual
        return cls(width, **options)

    @classmethod
    def houlsby(cls, width: int | None = None, **changes: Any) -> Bottleneck:
        """Two per block, behind the attention and the MLP branch, 64 wide (arXiv:1902.00751)."""
        options: dict[str, Any] = {
            "activation": "silu",
            "at": ("*.layers[*].attn", "*.layers[*].mlp"),
        }
        return cls._published(width, 64, **{**options, **changes})

    @classmethod
    def pfeiffer(cls, width: int | None = None, **changes: Any) -> Bottleneck:
        """One per block, behind the MLP and its residual connection, 48 wide (arXiv:2005.00247)."""
        options: dict[str, Any] = {"activation": "relu", "at": ("*.layers[*]",)}
        return cls._published(width, 48, **{**options, **changes})

    @classmethod
    def parallel(cls, width: int | None = None, **changes: Any) -> Bottleneck:
        """One beside each MLP, reading the residual stream, 512 wide, scale 4 (arXiv:2110.04366)."""
        options: dict[str, Any] = {
            "placement": "residual",
            "activation": "relu",
            "scale": 4.0,
            "at": ("*.layers[*].mlp",),
        }
        return cls._published(width, 512, **{**options, **changes})

    @classmethod
    def adaptformer(cls, width: int | None = None, **changes: Any) -> Bottleneck:
        """One beside each MLP, 64 wide, scale 0.1, reading the residual stream through a LayerNorm of
        its own (arXiv:2205.13535).
        """
        options: dict[str, Any] = {
            "placement": "residual",
            "activation": "relu",
            "scale": 0.1,
            "norm": "before",
            "dropout": 0.1,
            "at": ("*.layers[*].mlp",),
        }
        return cls._published(width, 64, **{**options, **changes})

    @classmethod
    def adapterplus(cls, width: int | None = None, **changes: Any) -> Bottleneck:
        """One behind each block, 8 wide, with a trained scale per channel (Adapter+, arXiv:2406.06820).

        Starts as published, with Houlsby's draw; `start="zero"` makes it an identity. The change of
        one row in ten is dropped while training, as the authors' configurations do.
        """
        options: dict[str, Any] = {
            "activation": "gelu",
            "scale_kind": "channel",
            "start": "houlsby",
            "drop_path": 0.1,
            "at": ("*.layers[*]",),
        }
        return cls._published(width, 8, **{**options, **changes})

    @classmethod
    def audio(cls, width: int | None = None, **changes: Any) -> Bottleneck:
        """One beside the MLP of each block of an audio encoder, reading what the MLP reads, a 64th of
        the channels wide, as recommended for spectrogram transformers (arXiv:2312.03694).
        """
        options: dict[str, Any] = {"placement": "parallel", "at": ("audio.layers[*].mlp",)}
        if width is None:
            options["reduction"] = 64
        return cls(width, **{**options, **changes})

    @classmethod
    def speech(cls, width: int | None = None, top: int | None = None, **changes: Any) -> Bottleneck:
        """Two per block of a self-supervised speech encoder, behind the attention and the MLP branch,
        with a LayerNorm of their own, 256 wide; `top=6` in the upper six blocks (arXiv:2202.03218).
        """
        options: dict[str, Any] = {"norm": "before"}
        if top is not None:
            if isinstance(top, bool) or not isinstance(top, int) or top < 1:
                raise AdapterError(
                    f"Bottleneck.speech: top is {top!r}, expected a whole number of at least 1",
                    "top=6 takes the upper six blocks; leave it out for all",
                )
            if "at" in changes:
                raise AdapterError(
                    f"Bottleneck.speech: top is {top!r} and at is {changes['at']!r}, and either says "
                    "where",
                    "give top or at=",
                )
        blocks = "audio.layers[*]" if top is None else f"audio.layers[-{top}:]"
        options["at"] = (f"{blocks}.attn", f"{blocks}.mlp")
        return cls._published(width, 256, **{**options, **changes})

    @classmethod
    def language(cls, width: int | None = None, **changes: Any) -> Bottleneck:
        """One per language behind each block of an encoder of many languages, 32 wide, with a LayerNorm
        of its own (arXiv:2401.08992). Rows of one batch may have different ones.
        """
        options: dict[str, Any] = {
            "activation": "silu",
            "norm": "before",
            "at": ("audio.layers[*]",),
        }
        return cls._published(width, 32, **{**options, **changes})

    @classmethod
    def mms(cls, width: int | None = None, **changes: Any) -> Bottleneck:
        """One per language behind each block, as the MMS models have them: 16 wide, ReLU, a LayerNorm of
        its own. `mmadapt.interop.write_mms` writes it as transformers reads it.
        """
        options: dict[str, Any] = {
            "activation": "relu",
            "norm": "before",
            "at": ("audio.layers[*]",),
        }
        return cls._published(width, 16, **{**options, **changes})
