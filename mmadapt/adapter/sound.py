"""Adapters for tokens that stand along time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from mmadapt.adapter.base import Adapter
from mmadapt.adapter.registry import register_adapter
from mmadapt.adapter.validation import ACTIVATIONS, Activation, flag, number, one_of, positive
from mmadapt.errors import AdapterError

_ELSEWHERE = (
    "attach it to an audio encoder: AST, wav2vec 2.0, HuBERT, WavLM …, or name sites by at="
)


@register_adapter
@dataclass(frozen=True)
class ConvAdapter(Adapter):
    """A bottleneck with a depth-wise convolution along time, beside the MLP (Cappellazzo et al. 2023).

    y + scale·up(silu(norm(conv(glu(down(norm(x))))))): conv sees `kernel` frames, those before and
    behind alike, or with `causal` the frame itself and those before it. Padding counts as zero, as
    the mask of the forward pass says. A spectrogram's patches are convolved along time within their
    band of frequency, and other tokens by themselves. `placement="sequential"` reads y.

    The authors use 31 frames, and a batch norm where ours is over channels, so that no clip sees
    another; sizes are equal.

    Parameters per site: 2·C + (2·C·width + 2·width) + (width·kernel + width) + 2·width + (width·C + C).

        ast = mm.load("tiny/ast")
        mm.attach(ast, mm.ConvAdapter(16, kernel=5))
        logits = ast(torch.randn(2, 98, 64)).logits                   # 98 frames of 64 mel bins
    """

    method: ClassVar[str] = "conv_adapter"
    layer: ClassVar[str] = "mmadapt.methods.conv_time:ConvAdapterLayer"
    ports: ClassVar[tuple[str, ...]] = ("out",)
    default_sites: ClassVar[tuple[str, ...]] = ("audio.layers[*].mlp",)
    elsewhere: ClassVar[str] = _ELSEWHERE
    source: ClassVar[str] = "Cappellazzo et al. 2023, arXiv:2312.03694"

    width: int = 32
    kernel: int = 15
    causal: bool = False
    placement: Literal["parallel", "sequential"] = "parallel"
    scale: float = 1.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, "placement", ("parallel", "sequential"))
        _check_convolution(self)


@register_adapter
@dataclass(frozen=True)
class ConvPass1d(Adapter):
    """A bottleneck with a full convolution along time, beside attention and MLP (Guo et al. 2023).

    y + scale·up(g(conv(g(down(x))))), g the quick GELU; conv mixes all channels over `kernel` frames.
    Padding, bands of frequency and other tokens are met as by `ConvAdapter`. The authors norm the sum
    with the input inside, which is no identity at the start and left out here.

    Parameters per site: 2·C·width + width + C + width²·kernel + width.

        ctc = mm.load("tiny/ctc")
        mm.attach(ctc, mm.ConvPass1d(8))
        logits = ctc(torch.randn(2, 8000)).logits
    """

    method: ClassVar[str] = "conv_pass_1d"
    layer: ClassVar[str] = "mmadapt.methods.conv_time:ConvPass1dLayer"
    ports: ClassVar[tuple[str, ...]] = ("out",)
    default_sites: ClassVar[tuple[str, ...]] = ("audio.layers[*].attn", "audio.layers[*].mlp")
    elsewhere: ClassVar[str] = _ELSEWHERE
    source: ClassVar[str] = "Guo et al. 2023 (DOLOS), arXiv:2303.12745"

    width: int = 32
    kernel: int = 3
    causal: bool = False
    scale: float = 1.0
    dropout: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_convolution(self)


def _check_convolution(adapter: ConvAdapter | ConvPass1d) -> None:
    positive(adapter, "width", "kernel")
    flag(adapter, "causal")
    number(adapter, "scale", low=-1e6, high=1e6)
    number(adapter, "dropout", low=0.0, high=0.999)
    if adapter.kernel % 2 == 0 and not adapter.causal:
        raise AdapterError(
            f"{type(adapter).__name__}: kernel is {adapter.kernel}, expected an odd number of frames",
            "as many stand before a frame as behind it; causal=True takes any number",
        )


@register_adapter
@dataclass(frozen=True)
class DenseMoA(Adapter):
    """Several bottlenecks beside the MLP, weighted for every token by a router (Cappellazzo et al. 2024).

    y + Σ softmax(router(x))_n · up_n(act(down_n(x))).

    Parameters per site: experts·(2·C·width + width + C) + experts·(C + 1).

        ast = mm.load("tiny/ast")
        mm.attach(ast, mm.DenseMoA(experts=3))
        logits = ast(torch.randn(2, 98, 64)).logits
    """

    method: ClassVar[str] = "dense_moa"
    layer: ClassVar[str] = "mmadapt.methods.mixture:DenseMoALayer"
    ports: ClassVar[tuple[str, ...]] = ("out",)
    default_sites: ClassVar[tuple[str, ...]] = ("audio.layers[*].mlp",)
    elsewhere: ClassVar[str] = _ELSEWHERE
    source: ClassVar[str] = "Cappellazzo et al. 2024, arXiv:2402.00828"

    experts: int = 7
    width: int = 6
    activation: Activation = "gelu"

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "experts", "width")
        one_of(self, "activation", ACTIVATIONS)


@register_adapter
@dataclass(frozen=True)
class SoftMoA(Adapter):
    """Bottlenecks that see mixtures of a clip's tokens, beside the MLP (Cappellazzo et al. 2024).

    Every expert sees `slots` weighted means of the tokens, and every token gets a weighted mean of
    what the slots became; padding, as the mask of the forward pass says, is part of no mean. So every
    token sees the whole clip, the future too: not for streaming.

    Parameters per site: experts·(2·C·width + width + C) + C·experts·slots.

        ast = mm.load("tiny/ast")
        mm.attach(ast, mm.SoftMoA(experts=3))
        logits = ast(torch.randn(2, 98, 64)).logits
    """

    method: ClassVar[str] = "soft_moa"
    layer: ClassVar[str] = "mmadapt.methods.mixture:SoftMoALayer"
    ports: ClassVar[tuple[str, ...]] = ("out",)
    default_sites: ClassVar[tuple[str, ...]] = ("audio.layers[*].mlp",)
    elsewhere: ClassVar[str] = _ELSEWHERE
    source: ClassVar[str] = "Cappellazzo et al. 2024 (Soft-MoA), arXiv:2402.00828"

    experts: int = 7
    slots: int = 1
    width: int = 6
    activation: Activation = "gelu"

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "experts", "slots", "width")
        one_of(self, "activation", ACTIVATIONS)


@register_adapter
@dataclass(frozen=True)
class DeepPrompts(Adapter):
    """Trained tokens beside the backbone's own, new ones in every block (Jia et al. 2022).

    Positions stay those of the backbone's tokens. A block that norms or convolves with positions of
    its own, as WavLM's, cannot be given more tokens and is refused.

    Parameters per block: length·C.

        ast = mm.load("tiny/ast")
        mm.attach(ast, mm.DeepPrompts(4))
        logits = ast(torch.randn(2, 98, 64)).logits
    """

    method: ClassVar[str] = "deep_prompts"
    layer: ClassVar[str] = "mmadapt.methods.prompts:DeepPromptsLayer"
    ports: ClassVar[tuple[str, ...]] = ("around",)
    default_sites: ClassVar[tuple[str, ...]] = ("audio.layers[*]",)
    elsewhere: ClassVar[str] = _ELSEWHERE
    not_identity: ClassVar[str] = "the tokens take their share of every attention from the start"
    source: ClassVar[str] = "Jia et al. 2022 (VPT), arXiv:2203.12119"

    length: int = 25

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "length")
