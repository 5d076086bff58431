"""Low-rank adaptation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mmadapt.adapter.base import Adapter
from mmadapt.adapter.registry import register_adapter
from mmadapt.adapter.validation import flag, number, positive
from mmadapt.errors import AdapterError


@register_adapter
@dataclass(frozen=True)
class LoRA(Adapter):
    """Low-rank update of a weight: W + (alpha / rank)·B·A (Hu et al. 2021).

    Called linears are met at their `out` port; weights that their module reads itself (packed
    attention projections) at the `weight` port, row by row, so that q and v of a packed projection
    can be adapted without k. Kernels of convolutions in one, two and three dimensions without groups
    change the same way: A is a kernel with `rank` channels, B mixes them.

    `alpha=None` means alpha = rank, a scale of one; `rank_stabilized` divides alpha by √rank
    instead (Kalajdzievski 2023, arXiv:2312.03732).

    Parameters per site: rank·(inputs + outputs); a kernel's inputs count its taps.

        clip = mm.load("tiny/clip")
        mm.attach(clip, mm.LoRA(4, alpha=8.0), at="vision.layers[*].mlp.*")
        features = clip.model.encode_image(torch.randn(2, 3, 32, 32))
        mm.merge(clip)                                                # costs nothing from here on
    """

    method: ClassVar[str] = "lora"
    layer: ClassVar[str] = "mmadapt.methods.lowrank:LoRALayer"
    ports: ClassVar[tuple[str, ...]] = ("out", "weight")
    default_sites: ClassVar[tuple[str, ...]] = ("*.layers[*].attn.q", "*.layers[*].attn.v")
    source: ClassVar[str] = "Hu et al. 2021, arXiv:2106.09685"

    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    rank_stabilized: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "rank")
        if self.alpha is not None:
            number(self, "alpha", low=-1e6, high=1e6)
        number(self, "dropout", low=0.0, high=0.999)
        flag(self, "rank_stabilized")
        if self.rank_stabilized and self.alpha is None:
            raise AdapterError(
                "LoRA: rank_stabilized divides alpha by √rank, and alpha is None",
                "pass alpha, for example alpha=16",
            )

    @property
    def scale(self) -> float:
        """Factor on B·A."""
        if self.alpha is None:
            return 1.0
        return self.alpha / (self.rank**0.5 if self.rank_stabilized else self.rank)
