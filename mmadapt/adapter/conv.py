"""Convolutional bypasses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from mmadapt.adapter.base import Adapter
from mmadapt.adapter.registry import register_adapter
from mmadapt.adapter.validation import number, one_of, positive
from mmadapt.errors import AdapterError


@register_adapter
@dataclass(frozen=True)
class Convpass(Adapter):
    """A bottleneck with a 3 × 3 convolution over the image's patches (Jie and Deng 2022).

    Two per block, beside attention and MLP: y + scale·up(dropout(g(conv(g(down(x)))))), g the quick
    GELU. Tokens are a square grid of patches in reading order; those before it (class token,
    registers), as many as the anatomy says, are convolved as images of one pixel.
    `grid=(rows, columns)` is needed for images that are not square. `kernel="identity"` starts
    the convolution as one that does nothing.

    Parameters per site: 2·C·width + C + width + 9·width² + width.

        clip = mm.load("tiny/clip")
        mm.attach(clip, mm.Convpass(8))
        features = clip.model.encode_image(torch.randn(2, 3, 32, 32))
    """

    method: ClassVar[str] = "convpass"
    layer: ClassVar[str] = "mmadapt.methods.conv:ConvpassLayer"
    ports: ClassVar[tuple[str, ...]] = ("out",)
    default_sites: ClassVar[tuple[str, ...]] = ("vision.layers[*].attn", "vision.layers[*].mlp")
    source: ClassVar[str] = "Jie and Deng 2022, arXiv:2207.07039"

    width: int = 8
    scale: float = 1.0
    dropout: float = 0.1
    kernel: Literal["identity", "xavier"] = "identity"
    grid: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "width")
        number(self, "scale", low=-1e6, high=1e6)
        number(self, "dropout", low=0.0, high=0.999)
        one_of(self, "kernel", ("identity", "xavier"))
        if self.grid is None:
            return
        sides: Any = self.grid
        whole = isinstance(sides, (list, tuple)) and all(type(n) is int and n > 0 for n in sides)
        if not whole or len(sides) != 2:
            raise AdapterError(f"Convpass: grid is {sides!r}, expected (rows, columns) or None")
        object.__setattr__(self, "grid", tuple(sides))
