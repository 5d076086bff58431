"""Adapters for stacks of slices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from mmadapt.adapter.base import Adapter
from mmadapt.adapter.registry import register_adapter
from mmadapt.adapter.validation import flag, number, one_of, positive
from mmadapt.errors import AdapterError

#: every tensor of SAM's mask decoder
DECODER: tuple[str, ...] = tuple(
    f"{role}{bias}:weight"
    for role in (
        "decoder.layers[*].*.*",
        *(f"decoder.layers[*].norm{place}" for place in range(1, 5)),
        "decoder.token_to_image.*",
        "decoder.norm",
        "decoder.tokens.*",
        "decoder.upscale.*",
        "decoder.masks[*].*",
        "decoder.iou.*",
        "decoder.object.*",
        "decoder.fine[*]",
    )
    for bias in ("", ".bias")
)


@register_adapter
@dataclass(frozen=True)
class MedSA(Adapter):
    """SAM for medical images: adapters in encoder and mask decoder (Med-SA, Wu et al. 2023).

    In every block of the encoder a bottleneck behind the attention and one beside the MLP, times
    `scale`; their width is `ratio` of the channels. With `depth`, images are slices of volumes, told
    by `mm.context(model, depth=slices)`, each volume's slices in a row: the block's own attention
    then runs a second time along the depth, and what it gives is added through a bottleneck of its
    own. `depth_layout` says what its relative positions are then: "line", one slice behind the other,
    or "grid", the most nearly square rows × columns, as in the authors' code. Where a stage of SAM 2
    begins, attention pools, and its block does without the depth branch.

    `variant="paper"`: ReLU, and adapters in the mask decoder: behind its attention to the image a
    bottleneck whose inner weights are made from the prompt, beside its MLP, and behind the image's
    attention to the tokens. `variant="released"`, what the authors' code does: GELU, and the mask
    decoder trained in full. `decoder` chooses "adapters", "trained" or "frozen" on its own.

    The paper leaves the sizes of the first one open; ours are `hyper_width` channels inside,
    `hyper_layers` generated matrices, and the mean of the embedded prompts reduced to
    `prompt_width` numbers. `start="published"` draws all projections as torch draws linear layers,
    which is no identity. Nor is `relative_positions="zero"`: the attention of the encoder without
    its tables of relative positions, the condition under which many released checkpoints were trained.

    Parameters per bottleneck: 2·C·width + width + C, width = ⌊ratio·C⌋.

        sam = mm.load("tiny/sam")
        mm.attach(sam, mm.MedSA(depth=True))
        slices, clicks = torch.rand(4, 3, 64, 64), torch.full((4, 1, 1, 2), 32.0)
        with mm.context(sam, depth=4):                                # four slices of one volume
            masks = sam(pixel_values=slices, input_points=clicks).pred_masks
    """

    method: ClassVar[str] = "med_sa"
    layer: ClassVar[str] = "mmadapt.methods.med_sa:layer_at"
    ports: ClassVar[tuple[str, ...]] = ("out", "weight")
    elsewhere: ClassVar[str] = "attach it to a SAM: transformers' SamModel, for example"
    not_identity: ClassVar[str] = (
        'start="published" draws the up-projections too, and relative_positions="zero" takes '
        "tensors of the backbone away"
    )
    source: ClassVar[str] = "Wu et al. 2023, arXiv:2304.12620"

    variant: Literal["paper", "released"] = "paper"
    depth: bool = False
    ratio: float = 0.25
    scale: float = 0.5
    activation: Literal["relu", "gelu"] | None = None
    decoder: Literal["adapters", "trained", "frozen"] | None = None
    depth_layout: Literal["line", "grid"] = "line"
    hyper_width: int = 32
    hyper_layers: int = 2
    prompt_width: int = 16
    start: Literal["zero", "published"] = "zero"
    relative_positions: Literal["kept", "zero"] = "kept"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, "variant", ("paper", "released"))
        one_of(self, "relative_positions", ("kept", "zero"))
        paper = self.variant == "paper"
        if self.activation is None:
            object.__setattr__(self, "activation", "relu" if paper else "gelu")
        if self.decoder is None:
            object.__setattr__(self, "decoder", "adapters" if paper else "trained")
        one_of(self, "activation", ("relu", "gelu"))
        one_of(self, "decoder", ("adapters", "trained", "frozen"))
        one_of(self, "depth_layout", ("line", "grid"))
        one_of(self, "start", ("zero", "published"))
        flag(self, "depth")
        number(self, "ratio", low=1e-6, high=16.0)
        number(self, "scale", low=-1e6, high=1e6)
        positive(self, "hyper_width", "hyper_layers", "prompt_width")

    @property
    def patterns(self) -> tuple[str, ...]:
        if self.at is not None:
            return self.at
        encoder = ("vision.layers[*].attn:out", "vision.layers[*].mlp:out")
        if self.relative_positions == "zero":
            encoder += tuple(f"vision.layers[*].attn.rel_{axis}:weight" for axis in "hw")
        if self.decoder == "frozen":
            return encoder
        if self.decoder == "trained":
            return encoder + DECODER
        words = ("token_to_image", "mlp", "image_to_token")
        return (*encoder, *(f"decoder.layers[*].{word}:out" for word in words))

    def starts_as_identity(self) -> bool:
        return self.start == "zero" and self.relative_positions == "kept"

    def width_of(self, channels: int) -> int:
        """The width of a bottleneck at a site of so many channels."""
        return max(1, int(self.ratio * channels))


@register_adapter
@dataclass(frozen=True)
class ConvDepth(Adapter):
    """A bottleneck with a convolution along the depth of a stack of slices (MA-SAM, Chen et al. 2023).

    x + up(gelu(conv(down(norm(x))))): images are slices of volumes, told by
    `mm.context(model, depth=slices)`, each volume's slices in a row; conv sees `kernel` adjacent slices
    at one position, zeros beyond the first and the last. Any backbone for images can be given slices.
    By default it stands before every block, the first of the authors' two places. With `second`
    another stands between the attention and the MLP, on the residual stream, in the blocks of a SAM:
    the authors' second place, met at the attention.

    Parameters per site: 2·C·width + kernel·width² + width, with the norm 2·C more.

        sam = mm.load("tiny/sam")
        mm.attach(sam, mm.ConvDepth(16))
        with mm.context(sam, depth=4):                                # four slices of one volume
            embedded = sam.model.vision_encoder(torch.rand(4, 3, 64, 64)).last_hidden_state
    """

    method: ClassVar[str] = "conv_depth"
    layer: ClassVar[str] = "mmadapt.methods.conv_depth:layer_at"
    ports: ClassVar[tuple[str, ...]] = ("in", "out")
    default_sites: ClassVar[tuple[str, ...]] = ("vision.layers[*]",)
    source: ClassVar[str] = "Chen et al. 2023 (MA-SAM), arXiv:2309.08842"

    width: int = 32
    kernel: int = 3
    norm: bool = True
    second: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "width", "kernel")
        flag(self, "norm", "second")
        if self.kernel % 2 == 0:
            raise AdapterError(
                f"ConvDepth: kernel is {self.kernel}, expected an odd number of slices",
                "3 sees the slice before, the slice itself and the one behind it",
            )

    @property
    def patterns(self) -> tuple[str, ...]:
        if self.at is not None or not self.second:
            return super().patterns
        return ("vision.layers[*]:in", "vision.layers[*].attn:out")
