"""What modules are made of, for methods that compute with the parts anew.

An anatomy's span may name a function of its module that returns one of these. They are made at
every call and never kept, so that weights which ports or the user replaced are the ones seen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(eq=False)
class GridEncoder:
    """An encoder that keeps its tokens as a grid (B, H, W, C)."""

    #: the convolution that makes a token of each patch, kernel and stride alike
    patch: nn.Module
    #: (1, H, W, C), added to the tokens
    positions: Tensor | None
    blocks: Sequence[nn.Module]


@dataclass(eq=False)
class GridAttention:
    """Attention over a grid with relative positions, one table an axis.

    A table has 2·n − 1 rows for distances from 1 − n to n − 1, of one head's channels.
    """

    #: tokens (…, C) -> queries, keys and values (…, 3·C)
    qkv: nn.Module
    proj: nn.Module
    heads: int
    rows: Tensor | None
    columns: Tensor | None
    #: whether the module gives its weights too, as the second of a pair
    pair: bool


@dataclass(eq=False)
class Prompted:
    """A model of three parts: images in, prompts beside them, masks out."""

    encoder: nn.Module
    prompts: nn.Module
    decoder: nn.Module


@dataclass(eq=False)
class PatchPositions:
    """The positions of the patches of an image or a spectrogram, without those of other tokens."""

    #: (rows, columns, C)
    grid: Tensor
    #: height and width of the image in pixels
    size: tuple[float, float]


@dataclass(eq=False)
class WordPositions:
    """The positions of words in a text."""

    #: (L, C)
    table: Tensor
    #: whether a token sees only those before it
    causal: bool
    #: what sums of words and positions go through before the first block
    norm: nn.Module | None = None


@dataclass(eq=False)
class Words:
    """How a model over token ids is called where something else makes its embeddings."""

    #: the keyword of the ids
    keyword: str
    #: function (B, T) -> ids (B, T) that its own forward pass accepts, marking the last token
    ids: Callable[[int, int], Tensor]
