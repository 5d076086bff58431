"""Adapters for SAM's image encoder, image by image."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

from mmadapt.adapter.base import Adapter
from mmadapt.adapter.registry import register_adapter
from mmadapt.adapter.validation import flag, number, one_of, positive
from mmadapt.adapter.volume import DECODER

#: every trained tensor of SAM's prompt encoder
PROMPTS: tuple[str, ...] = (
    "prompt.points[*]:weight",
    "prompt.no_point:weight",
    "prompt.no_mask:weight",
    "prompt.masks.*:weight",
    "prompt.masks.*.bias:weight",
)


@register_adapter
@dataclass(frozen=True)
class SAMMed2D(Adapter):
    """A channel gate and a pair of strided convolutions beside each MLP (SAM-Med2D, Cheng et al. 2023).

    With n what the MLP reads, on its grid: gated = n·σ(relu(mean(n)·Sᵀ)·Eᵀ), the mean over the grid
    and S `ratio` of the channels wide; then relu(widen(relu(narrow(gated)))), a 3 × 3 convolution that
    halves the grid and a transposed 4 × 4 one that doubles it again; y + norm(n + that).

    Known are the kernels, the squeeze, the ReLUs and the size, which leaves no room for biases but
    the norm's. Ours are: the residual begins before the gate, the convolutions are padded by 1, on a
    grid of odd sides what sticks out is cut off, the norm's small number is 1e-5. Ours is the start,
    too: the norm's weight and bias are zero, which makes it the identity without further tensors;
    `start="published"` begins with an ordinary norm. Projections and kernels are drawn as torch draws
    its own.

    `decoder="trained"` trains prompt encoder and mask decoder in full, which released files hold.

    Parameters per site: 2·C·width + 25·C² + 2·C, width = ⌊ratio·C⌋.

        sam = mm.load("tiny/sam")
        mm.attach(sam, mm.SAMMed2D())
        images, clicks = torch.rand(2, 3, 64, 64), torch.full((2, 1, 1, 2), 32.0)
        masks = sam(pixel_values=images, input_points=clicks).pred_masks
    """

    method: ClassVar[str] = "sam_med2d"
    layer: ClassVar[str] = "mmadapt.methods.sam_med2d:layer_at"
    ports: ClassVar[tuple[str, ...]] = ("out", "weight")
    elsewhere: ClassVar[str] = "attach it to a SAM: transformers' SamModel, for example"
    not_identity: ClassVar[str] = 'start="published" adds a normed vector of its own'
    source: ClassVar[str] = "Cheng et al. 2023, arXiv:2308.16184"

    ratio: float = 0.25
    decoder: Literal["frozen", "trained"] = "frozen"
    start: Literal["zero", "published"] = "zero"

    def __post_init__(self) -> None:
        super().__post_init__()
        number(self, "ratio", low=1e-6, high=16.0)
        one_of(self, "decoder", ("frozen", "trained"))
        one_of(self, "start", ("zero", "published"))

    @property
    def patterns(self) -> tuple[str, ...]:
        if self.at is not None:
            return self.at
        encoder = ("vision.layers[*].mlp:out",)
        return encoder if self.decoder == "frozen" else (*encoder, *PROMPTS, *DECODER)

    def starts_as_identity(self) -> bool:
        return self.start == "zero"

    def width_of(self, channels: int) -> int:
        """The width of the squeeze at a site of so many channels."""
        return max(1, int(self.ratio * channels))


@register_adapter
@dataclass(frozen=True)
class AdapterShadow(Adapter):
    """Bottlenecks behind attention and beside the MLP of SAM, for shadows (AdapterShadow, Jie and Zhang 2023).

    The change is up(gelu(down(z))) behind each attention, `scale` times it beside each MLP, `ratio` of
    the channels wide; `fraction` leaves out all but the last share of the blocks, rounded up. With
    `skip` a third goes from each block's input to its output. `branches` splits the channels into so
    many groups, each with a bottleneck of its own, which divides the matrices' size by as much. `rank`
    makes every projection the product of two matrices of that rank; how the authors factorise is not
    known here.

    Parameters per bottleneck: 2·C·width / branches + width + C with width = ⌊ratio·C / branches⌋ ·
    branches; with a rank 2·rank·(C + width) + width + C.

        sam = mm.load("tiny/sam")
        mm.attach(sam, mm.AdapterShadow(branches=4))
        embedded = sam.model.vision_encoder(torch.rand(1, 3, 64, 64)).last_hidden_state
    """

    method: ClassVar[str] = "adapter_shadow"
    layer: ClassVar[str] = "mmadapt.methods.adapter_shadow:layer_at"
    elsewhere: ClassVar[str] = "attach it to a SAM: transformers' SamModel, for example"
    source: ClassVar[str] = "Jie and Zhang 2023, arXiv:2311.08891"

    ratio: float = 0.25
    scale: float = 0.5
    fraction: float = 1.0
    skip: bool = False
    branches: int = 1
    rank: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        number(self, "ratio", low=1e-6, high=16.0)
        number(self, "scale", low=-1e6, high=1e6)
        number(self, "fraction", low=1e-6, high=1.0)
        flag(self, "skip")
        positive(self, "branches")
        if self.rank is not None:
            positive(self, "rank")

    @property
    def patterns(self) -> tuple[str, ...]:
        return self.at or self._patterns("*")

    def patterns_among(self, roles: Iterable[str]) -> tuple[str, ...]:
        if self.at is not None or self.fraction == 1.0:
            return self.patterns
        blocks = sum(bool(re.fullmatch(r"vision\.layers\[\d+\]", role)) for role in roles)
        return self._patterns(f"-{max(1, math.ceil(self.fraction * blocks - 1e-9))}:")

    def _patterns(self, which: str) -> tuple[str, ...]:
        words = (".attn", ".mlp", "") if self.skip else (".attn", ".mlp")
        return tuple(f"vision.layers[{which}]{word}:out" for word in words)

    def width_of(self, channels: int) -> int:
        """The width of all branches of a bottleneck together, at a site of so many channels."""
        return self.branches * max(1, int(self.ratio * channels / self.branches))
