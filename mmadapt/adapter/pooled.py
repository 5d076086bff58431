"""Methods on pooled features and logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from mmadapt.adapter.base import Adapter
from mmadapt.adapter.registry import register_adapter
from mmadapt.adapter.validation import flag, number, one_of, positive


@register_adapter
@dataclass(frozen=True)
class ClipAdapter(Adapter):
    """Two-layer bottleneck on pooled features, mixed with the originals (Gao et al. 2021).

    A(f) = relu(relu(f·W1)·W2) without biases; the site returns ratio·A(f) + (1 − ratio)·f.
    `start="published"` draws both matrices at random, as the paper does; `start="identity"` makes
    the ratio a trained number that begins at 0 (both matrices still random, so that the ratio has a
    gradient at once and the matrices after the first step).

    Parameters: 2·D²/reduction, one more with `start="identity"`.

        clip = mm.load("tiny/clip")
        mm.attach(clip, mm.ClipAdapter(reduction=4, start="identity"))
        features = clip.model.encode_image(torch.randn(2, 3, 32, 32))
    """

    method: ClassVar[str] = "clip_adapter"
    layer: ClassVar[str] = "mmadapt.methods.pooled:ClipAdapterLayer"
    ports: ClassVar[tuple[str, ...]] = ("out",)
    default_sites: ClassVar[tuple[str, ...]] = ("vision.pooled",)
    not_identity: ClassVar[str] = "the published start mixes in a random bottleneck at once"
    source: ClassVar[str] = "Gao et al. 2021, arXiv:2110.04544"

    reduction: int = 4
    ratio: float = 0.2
    start: Literal["published", "identity"] = "published"

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "reduction")
        number(self, "ratio", low=0.0, high=1.0)
        one_of(self, "start", ("published", "identity"))

    def starts_as_identity(self) -> bool:
        return self.start == "identity"


@register_adapter
@dataclass(frozen=True)
class TipAdapter(Adapter):
    """Key-value cache of few-shot features that votes on the logits (Zhang et al. 2022).

    For a unit feature f, keys K (entries, D) and their labels: logits + residual·Σ_i
    exp(−sharpness·(1 − f·K_i))·onehot(label_i). `residual` is the paper's α and `sharpness` its β.
    `train_keys` gives Tip-Adapter-F. Until `mmadapt.tasks.few_shot.remember` fills it every slot is
    empty and casts no vote, so the layer starts as the identity.

    Trained parameters: entries·D with `train_keys`, else none.

        from mmadapt.tasks import few_shot

        clip = mm.load("tiny/clip")
        classifier = few_shot.zero_shot(clip, ("circle", "arrow"), ("a photo of a {}",))
        att = mm.attach(classifier, mm.TipAdapter(entries=4))
        shots = clip.model.encode_image(torch.randn(4, 3, 32, 32)).detach()
        few_shot.remember(att, shots, torch.tensor([0, 0, 1, 1]))
    """

    method: ClassVar[str] = "tip_adapter"
    layer: ClassVar[str] = "mmadapt.methods.pooled:TipAdapterLayer"
    ports: ClassVar[tuple[str, ...]] = ("out",)
    default_sites: ClassVar[tuple[str, ...]] = ("logits",)
    source: ClassVar[str] = "Zhang et al. 2022, arXiv:2207.09519"

    entries: int = 16
    residual: float = 1.0
    sharpness: float = 5.5
    train_keys: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "entries")
        number(self, "residual", low=0.0, high=1e6)
        number(self, "sharpness", low=0.0, high=1e6)
        flag(self, "train_keys")
