"""Clouds of points for backbones that were trained on something else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mmadapt.adapter.base import Adapter
from mmadapt.adapter.registry import register_adapter
from mmadapt.adapter.validation import flag, number, positive
from mmadapt.errors import AdapterError


@register_adapter
@dataclass(frozen=True)
class Any2Point(Adapter):
    """Point clouds into a frozen vision transformer (Any2Point, Tang et al. 2024).

    While it acts the model takes clouds (B, N, 3), each centred and within the unit ball, where it
    takes images: `model(pixel_values=cloud)`. With `classes` the model gives their logits
    (B, classes); without, its own output over a class token and the `tokens`.

    Three rounds of farthest-point sampling, each halving the centres and gathering their `neighbours`
    nearest points, make the tokens. Each is projected onto six virtual images, and the backbone's own
    positions there, averaged, are added before every block; the pinhole stands `distance` away. In
    every block a bottleneck of `width` channels, times `scale`, follows the MLP; then tokens of one
    `cell` of a virtual image (in patches) attend to each other (`view_width` channels, one attention a
    view for all blocks), the cells' means are weighed by their likeness to the features of the
    tokens' surroundings (cubes of side `voxel`), and `share` of that is added.

    Statistics of batch norms are trained like the authors', over the clouds of a batch in train mode.

    Parameters: the tokenizer's, 2·C for the class token, per view 4·(C·view_width) + 3·view_width + 3·C,
    per block 2·C·width + width + C and 14·C, the final norm's 2·C; with `classes` a perceptron of two
    layers of `head_width`.
    """

    method: ClassVar[str] = "any2point"
    layer: ClassVar[str] = "mmadapt.methods.any2point:layer_at"
    shared: ClassVar[str] = "mmadapt.methods.any2point:ViewAttention"
    ports: ClassVar[tuple[str, ...]] = ("around", "in", "out", "weight")
    elsewhere: ClassVar[str] = "attach it to transformers' ViTModel or Dinov2Model"
    not_identity: ClassVar[str] = "it takes points in the place of images"
    source: ClassVar[str] = "Tang et al. 2024, arXiv:2404.07989"

    classes: int | None = None
    tokens: int = 128
    neighbours: int = 64
    neck: int = 32
    distance: float = 1.8
    width: int = 8
    scale: float = 0.3
    dropout: float = 0.1
    voxel: float = 0.16
    cell: float = 26 / 14
    view_width: int = 12
    view_heads: int = 6
    share: float = 0.7
    head_width: int = 256
    train_norm: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "tokens", "neighbours", "neck", "width", "view_width", "view_heads")
        positive(self, "head_width", *(() if self.classes is None else ("classes",)))
        number(self, "distance", low=1.0 + 1e-6, high=1e6)
        number(self, "scale", "share", low=-1e6, high=1e6)
        number(self, "dropout", low=0.0, high=0.999)
        number(self, "voxel", "cell", low=1e-6, high=1e6)
        flag(self, "train_norm")
        if self.view_width % self.view_heads:
            raise AdapterError(
                f"Any2Point: view_heads is {self.view_heads}, expected a divisor of view_width, "
                f"{self.view_width}"
            )
        if self.at is not None:
            raise AdapterError(
                "Any2Point: at is given, and its parts compute only together", "leave it out"
            )

    @property
    def patterns(self) -> tuple[str, ...]:
        block = "vision.layers[*]"
        return (
            *(() if self.classes is None else ("model:around",)),
            "vision.embeddings:around",
            f"{block}:in",
            f"{block}.mlp:out",
            f"{block}:out",
            *(("vision.norm:weight", "vision.norm.bias:weight") if self.train_norm else ()),
        )

    @property
    def every_pattern(self) -> bool:
        return True
