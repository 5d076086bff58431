"""Bottlenecks of few bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mmadapt.adapter.base import Adapter
from mmadapt.adapter.registry import register_adapter
from mmadapt.adapter.validation import ACTIVATIONS, Activation, number, one_of, positive
from mmadapt.errors import AdapterError


@register_adapter
@dataclass(frozen=True)
class BiAdaptFormer(Adapter):
    """A bottleneck beside the MLP whose weights have 2^bits values (Jie et al. 2023).

    Trains real weights that are quantised in every forward pass: standardised per matrix, moved to
    the nearest code, scaled back; the gradient passes the quantiser as if it were not there.
    No biases. Files hold the codes, packed, and mean and deviation of every matrix: bits·n/8 bytes
    and two numbers instead of n numbers; `inspect` shows them. What is loaded computes the saved
    model's outputs bit by bit. It is sealed: mean and deviation stay those of the file, also when
    it is trained further, and only the codes move. Placement, activation and scale are the defaults
    of this library; they were not checked against the paper's code.

    Parameters per site: 2·C·width.

        clip = mm.load("tiny/clip")
        mm.attach(clip, mm.BiAdaptFormer(8, bits=1), name="small")
        mm.save(clip, "./small")                                      # a bit a weight
    """

    method: ClassVar[str] = "bi_adaptformer"
    layer: ClassVar[str] = "mmadapt.methods.lowbit:BiAdaptFormerLayer"
    ports: ClassVar[tuple[str, ...]] = ("out",)
    default_sites: ClassVar[tuple[str, ...]] = ("*.layers[*].mlp",)
    not_identity: ClassVar[str] = "a matrix of zeros has no deviation to be quantised by"
    source: ClassVar[str] = "Jie et al. 2023, arXiv:2307.16867"

    width: int = 32
    bits: int = 1
    activation: Activation = "relu"
    scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "width")
        one_of(self, "activation", ACTIVATIONS)
        number(self, "scale", low=-1e6, high=1e6)
        if self.bits not in (1, 2, 3, 4) or isinstance(self.bits, bool):
            raise AdapterError(f"BiAdaptFormer: bits is {self.bits!r}, expected 1, 2, 3 or 4")
