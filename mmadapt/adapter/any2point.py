"""Clouds of points for backbones that were trained on something else."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from mmadapt.adapter.base import Adapter
from mmadapt.adapter.registry import register_adapter
from mmadapt.adapter.validation import flag, number, one_of, positive
from mmadapt.errors import AdapterError

#: what the authors set for each kind of backbone (ScanObjectNN)
PUBLISHED: dict[str, dict[str, Any]] = {
    "vision": {"neighbours": 64, "width": 8, "voxel": 0.16, "cell": 26 / 14, "share": 0.7, "distance": 1.8},
    "audio": {"neighbours": 64, "width": 12, "voxel": 0.16, "cell": 1.6, "share": 0.5, "distance": 1.4},
    "text": {"neighbours": 81, "width": 16, "voxel": 0.08, "cell": 2.0, "share": 0.3, "direction": (-1.0, 0.0, 1.0)},
}  # fmt: skip


@register_adapter
@dataclass(frozen=True)
class Any2Point(Adapter):
    """Point clouds into a frozen vision, audio or text transformer (Any2Point, Tang et al. 2024).

    While it acts, a model takes clouds (B, N, 3), each centred and within the unit ball, where it
    takes images, spectrograms or token ids: `model(pixel_values=cloud)`, `model(input_values=cloud)`,
    `model(input_ids=cloud)`. With `classes` it gives their logits (B, classes); without, its own
    output over a class token and the `tokens`. `tower` says what the backbone was trained on; what is
    None is then as published for it.

    Three rounds of farthest-point sampling, each halving the centres and gathering their `neighbours`
    nearest points, make the tokens; sampling begins with a cloud's first point and draws nothing. The
    backbone's own positions are read where a token falls, averaged over six views and added before
    every block. Of images and spectrograms a view is a virtual image, whose pinhole stands `distance`
    away; of text it is a line along `direction`, from the table's first row to its last. In every
    block a bottleneck of `width` channels, times `scale`, follows the MLP; then tokens of one `cell`
    of a view (in patches, or rows of the table) attend to each other (`view_width` channels, one
    attention a view for all blocks), the cells' means are weighed by their likeness to the features
    of the tokens' surroundings (cubes of side `voxel`), and `share` of that is added.

    Where a token sees only those before it (CLIP's text), the class token stands last, else first.
    A line's ends are the table's ends for every cloud by itself; the authors scale to the rows'
    number, wrap, and take the range of a batch. They train layer scales beside text, which are not
    here.

    Statistics of batch norms are trained like the authors', over the clouds of a batch in train mode.

    Parameters: the tokenizer's, 2·C for the class token, per view 4·(C·view_width) + 3·view_width + 3·C,
    per block 2·C·width + width + C and 14·C, the final norm's 2·C; with `classes` a perceptron of two
    layers of `head_width`.

        from mmadapt.tasks import points

        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
        vit = transformers.ViTModel(transformers.ViTConfig(**sizes, num_attention_heads=4))
        mm.attach(vit, mm.Any2Point(classes=10, tokens=32, neighbours=16))
        clouds = points.solids(1, "test", seed=0).clouds
        logits = vit(pixel_values=clouds)
    """

    method: ClassVar[str] = "any2point"
    layer: ClassVar[str] = "mmadapt.methods.any2point:layer_at"
    shared: ClassVar[str] = "mmadapt.methods.any2point:ViewAttention"
    ports: ClassVar[tuple[str, ...]] = ("around", "in", "out", "weight")
    elsewhere: ClassVar[str] = (
        'attach it to a bare ViTModel or Dinov2Model, with tower="audio" to an ASTModel, with '
        'tower="text" to a CLIPTextModel or BertModel, all of transformers'
    )
    not_identity: ClassVar[str] = "it takes points in the place of images, spectrograms or words"
    source: ClassVar[str] = "Tang et al. 2024, arXiv:2404.07989"

    classes: int | None = None
    tower: str = "vision"
    tokens: int = 128
    neighbours: int | None = None
    neck: int = 32
    distance: float | None = None
    direction: tuple[float, float, float] | None = None
    width: int | None = None
    scale: float = 0.3
    dropout: float = 0.1
    voxel: float | None = None
    cell: float | None = None
    view_width: int = 12
    view_heads: int = 6
    share: float | None = None
    head_width: int = 256
    train_norm: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, "tower", tuple(PUBLISHED))
        for name, value in PUBLISHED[self.tower].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        positive(self, "tokens", "neighbours", "neck", "width", "view_width", "view_heads")
        positive(self, "head_width", *(() if self.classes is None else ("classes",)))
        number(self, "scale", "share", low=-1e6, high=1e6)
        number(self, "dropout", low=0.0, high=0.999)
        number(self, "voxel", "cell", low=1e-6, high=1e6)
        flag(self, "train_norm")
        self._check_views()
        if self.view_width % self.view_heads:
            raise AdapterError(
                f"Any2Point: view_heads is {self.view_heads}, expected a divisor of view_width, "
                f"{self.view_width}"
            )
        if self.at is not None:
            raise AdapterError(
                "Any2Point: at is given, and its parts compute only together", "leave it out"
            )

    def _check_views(self) -> None:
        """Refuse what a view of this tower does not have, and views from within the cloud or nowhere."""
        other = "distance" if self.tower == "text" else "direction"
        if getattr(self, other) is not None:
            kind = "lines" if self.tower == "text" else "images"
            raise AdapterError(
                f"Any2Point: {other} is given, and views of tower={self.tower!r} are {kind}",
                "leave it out",
            )
        if self.tower != "text":
            number(self, "distance", low=1.0 + 1e-6, high=1e6)
            return
        given: Any = self.direction
        numbers = isinstance(given, (list, tuple)) and all(
            isinstance(one, (int, float)) and math.isfinite(one) for one in given
        )
        if not numbers or len(given) != 3 or not any(given):
            raise AdapterError(
                f"Any2Point: direction is {given!r}, expected three numbers, not all zero"
            )
        object.__setattr__(self, "direction", tuple(float(one) for one in given))

    @property
    def patterns(self) -> tuple[str, ...]:
        return self.patterns_among(())

    def patterns_among(self, roles: Iterable[str]) -> tuple[str, ...]:
        block, norm = f"{self.tower}.layers[*]", f"{self.tower}.norm"
        roles = list(roles)
        last = f"{self.tower}.layers[-1].norm2"  # where blocks norm behind their branches
        norm = last if f"{self.tower}.embeddings.norm" in roles and norm not in roles else norm
        return (
            *(() if self.classes is None and self.tower != "text" else ("model:around",)),
            f"{self.tower}.embeddings:around",
            f"{block}:in",
            f"{block}.mlp:out",
            f"{block}:out",
            *((f"{norm}:weight", f"{norm}.bias:weight") if self.train_norm else ()),
        )

    @property
    def every_pattern(self) -> bool:
        return True
