"""Which rows and which adapter each program of a mixed batch has, found without asking the device.

Rows are put in the order of their adapters, those without one last. As how many tiles there are is
known on the device alone, the table has room for the most there can be; what is left is marked −2.
"""

from __future__ import annotations

import torch
from torch import Tensor


class RowOrder:
    """Rows of a batch by adapter. ids (B,) whole numbers, each row being `length` tokens in a row.

    `order` (B · length,) holds the tokens, `first` (N + 2,) where each adapter's begin among them,
    then where those without one begin, then how many there are.
    """

    def __init__(self, ids: Tensor, length: int, adapters: int) -> None:
        none = (ids < 0) | (ids >= adapters)
        slots = torch.where(none, adapters, ids)
        rows = torch.argsort(slots, stable=True)
        token = torch.arange(length, device=ids.device)
        self.order = (rows[:, None] * length + token).flatten().to(torch.int32)
        groups = torch.arange(adapters + 1, device=ids.device)
        self.counts = (slots[:, None] == groups).sum(0) * length
        ends = self.counts.cumsum(0)
        self.first = torch.cat([ends.new_zeros(1), ends]).to(torch.int32)
        self.tokens, self.adapters = len(ids) * length, adapters

    def tiles(self, block: int) -> Tensor:
        """(tiles, 3) int32: first place in `order`, the last + 1, and the adapter; −1 is none."""
        needed = (self.counts + block - 1) // block
        ends = needed.cumsum(0)
        tile = torch.arange(-(-self.tokens // block) + self.adapters, device=ends.device)
        group = torch.searchsorted(ends, tile, right=True)
        known = group.clamp(max=self.adapters)
        start = self.first[known] + (tile - (ends - needed)[known]) * block
        stop = torch.minimum(start + block, self.first[known + 1])
        adapter = torch.where(group == self.adapters, -1, group)
        adapter = torch.where(group > self.adapters, -2, adapter)
        return torch.stack([start, stop, adapter], 1).to(torch.int32)
