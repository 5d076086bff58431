"""Invertible adapters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mmadapt.adapter.base import Adapter
from mmadapt.adapter.registry import register_adapter
from mmadapt.adapter.validation import ACTIVATIONS, Activation, one_of, positive


@register_adapter
@dataclass(frozen=True)
class Invertible(Adapter):
    """A change of the embeddings that is undone behind the last block (MAD-X, Pfeiffer et al. 2020).

    Stands at two sites: at the first, in the backbone's order, the states pass an invertible map, at
    the second its inverse, with the same tensors. The map is a coupling of two halves of the
    channels (NICE): y1 = x1 + F(x2), y2 = x2 + G(y1), F and G bottlenecks with their inputs' channels
    divided by `reduction`. It starts as the identity.

    By default it enters before the first block and leaves behind the last, of text towers and of
    backbones without a known family; in post-norm backbones (BERT) these are the embeddings and what
    a language-model head reads, as published. Elsewhere name two sites, for example
    at=("vision.layers[0]:in", "vision.layers[-1]:out").

    Parameters, once for both sites: with C = c1 + c2 channels, c1 = ⌊C/2⌋, and widths
    f = ⌊c2/reduction⌋, g = ⌊c1/reduction⌋: (c1 + c2)·(f + g) + f + g + c1 + c2.

        llama = mm.load("tiny/llama")
        mm.attach(llama, mm.Invertible(reduction=4), name="language")
        tokens = llama.tokenize(["spell ab backwards = "], return_tensors="pt")
        logits = llama(**tokens).logits
    """

    method: ClassVar[str] = "invertible"
    layer: ClassVar[str] = "mmadapt.methods.invertible:InvertibleLayer"
    shared: ClassVar[str] = "mmadapt.methods.invertible:Coupling"
    ports: ClassVar[tuple[str, ...]] = ("in", "out")
    default_sites: ClassVar[tuple[str, ...]] = (
        "text.layers[0]:in",
        "text.layers[-1]:out",
        "blocks[0]:in",
        "blocks[-1]:out",
    )
    elsewhere: ClassVar[str] = (
        'name two sites, for example at=("vision.layers[0]:in", "vision.layers[-1]:out")'
    )
    source: ClassVar[str] = "Pfeiffer et al. 2020, arXiv:2005.00052"

    reduction: int = 2
    activation: Activation = "relu"

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "reduction")
        one_of(self, "activation", ACTIVATIONS)
