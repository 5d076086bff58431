"""SAM for whole volumes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from mmadapt.adapter.base import Adapter
from mmadapt.adapter.registry import register_adapter
from mmadapt.adapter.validation import flag, number, one_of, positive
from mmadapt.errors import AdapterError


@register_adapter
@dataclass(frozen=True)
class ThreeDSAM(Adapter):
    """A SAM that takes volumes and gives masks of volumes (3DSAM-adapter, Gong et al. 2023).

    While it acts the model's call takes a volume, clicks in it and their labels, with the names
    transformers gives them for images, also in segment_anything:

        logits = model(pixel_values=volume, input_points=clicks, input_labels=labels)

    Volumes (B, 1 or 3, D, H, W) are resampled by `zoom` along all axes, and every `patch` slices,
    rows and columns of that make one token, so that each axis has to be a multiple of patch / zoom
    voxels. Clicks (B, N, 3) are (z, y, x) in voxels, labels (B, N) 1 on the object, 0 beside it and −1
    for none. The logits are (B, classes, D, H, W). `prompts=False` builds no prompt encoder: then the
    volume alone is taken.

    The patch embedding goes on through the slices, the frozen positions are joined by trained ones
    along the depth (`planes` rows, interpolated elsewhere); attention is within cubes of `window`
    tokens a side, those of every second block shifted by half, with relative positions along the
    depth (trained) beside those along rows and columns (frozen). Before every block stands a
    bottleneck of `ratio`·C channels with a depth-wise 3 × 3 × 3 convolution inside. Norms are
    trained. A prompt encoder of `queries` tokens and a mask decoder that sees the encoder at four
    depths are new; both are the published ones.

    `variant="general"` fits every width, depth and volume; a click's place and label count, one at the
    border samples what is there, and the bottlenecks start at zero. `variant="released"` computes as
    the authors' code does, for their weights: a ReLU behind each bottleneck, zeros beyond the border,
    clicks without places and labels, and cubes of `planes` tokens a side alone.

    `recompute` keeps only the inputs of blocks for backward, for volumes that do not fit otherwise.

    Parameters per bottleneck: 2·C·width + 29·width + C, width = ⌊ratio·C⌋.

        sam = mm.load("tiny/sam")
        mm.attach(sam, mm.ThreeDSAM(zoom=2, window=2, planes=4, heads=2))
        volume, click = torch.rand(1, 1, 16, 16, 16), torch.full((1, 1, 3), 8.0)
        logits = sam(pixel_values=volume, input_points=click, input_labels=torch.tensor([[1]]))
    """

    method: ClassVar[str] = "three_d_sam"
    layer: ClassVar[str] = "mmadapt.methods.three_d_sam:layer_at"
    ports: ClassVar[tuple[str, ...]] = ("around", "in", "weight")
    elsewhere: ClassVar[str] = "attach it to a SAM: transformers' SamModel, for example"
    not_identity: ClassVar[str] = (
        "it takes volumes in the place of images, and its mask decoder is a new one"
    )
    source: ClassVar[str] = "Gong et al. 2023, arXiv:2306.13465"

    variant: Literal["general", "released"] = "general"
    ratio: float = 0.5
    zoom: int = 4
    window: int = 8
    planes: int = 32
    classes: int = 2
    prompts: bool = True
    queries: int = 10
    heads: int = 8
    recompute: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, "variant", ("general", "released"))
        number(self, "ratio", low=1e-6, high=16.0)
        positive(self, "zoom", "window", "planes", "classes", "queries", "heads")
        flag(self, "prompts", "recompute")
        if self.at is not None:
            raise AdapterError(
                "ThreeDSAM: at is given, and its parts compute only together", "leave it out"
            )

    @property
    def patterns(self) -> tuple[str, ...]:
        block = "vision.layers[*]"
        return (
            "model:around",
            "vision:around",
            f"{block}:in",
            f"{block}.attn:around",
            *(f"{block}.norm{n}{bias}:weight" for n in (1, 2) for bias in ("", ".bias")),
            *(("prompt:around",) if self.prompts else ()),
            "decoder:around",
        )

    @property
    def every_pattern(self) -> bool:
        return True

    def width_of(self, channels: int) -> int:
        """The width of a bottleneck in an encoder of so many channels."""
        return max(1, int(self.ratio * channels))
