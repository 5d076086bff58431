"""Low-rank changes of a packed projection: one for all its rows, or one for each of its parts.

A change B·A of the rows (q, k, v) of one weight is a change of each part by its rows of B. The other
way round the changes of several parts are one of the sum of their ranks: their A one below the other,
their B in blocks. What such a block leaves zero is taken out on the way back.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def unpack(a: Tensor, b: Tensor, parts: int) -> list[tuple[Tensor, Tensor] | None]:
    """(A, B) of each part of a change A (R, …), B (parts·C, R); None for a part that is not changed.

    Columns of B that are zero for a part, and the rows of A they read, are left out. A change that has
    not been trained, all zero, is kept whole.
    """
    fresh = not bool(b.any())
    found: list[tuple[Tensor, Tensor] | None] = []
    for rows in b.chunk(parts):
        used = rows.ne(0).any(0) if not fresh else torch.ones(len(a), dtype=torch.bool)
        found.append((a[used], rows[:, used]) if bool(used.any()) else None)
    return found


def pack(changes: Mapping[int, tuple[Tensor, Tensor]], parts: int) -> tuple[Tensor, Tensor]:
    """One change (A, B) of a weight with so many parts from those of some of them, by their place.

    Parts that read the same A share it.
    """
    shared: list[Tensor] = []
    blocks: list[tuple[int, int, Tensor]] = []  # (part, first row in A, B)
    for place, (a, b) in sorted(changes.items()):
        known = next((i for i, other in enumerate(shared) if torch.equal(a, other)), len(shared))
        if known == len(shared):
            shared.append(a)
        blocks.append((place, sum(len(other) for other in shared[:known]), b))
    width = len(blocks[0][2])
    whole = torch.zeros(parts * width, sum(map(len, shared)), dtype=blocks[0][2].dtype)
    for place, first, b in blocks:
        whole[place * width : (place + 1) * width, first : first + b.shape[1]] = b
    return torch.cat(shared), whole


def widen(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The same change with zeros up to this rank."""
    more = rank - len(a)
    return (
        torch.cat([a, a.new_zeros(more, *a.shape[1:])]),
        torch.cat([b, b.new_zeros(len(b), more)], dim=1),
    )
