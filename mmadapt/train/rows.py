"""Rows of activations kept by fingerprint, in memory or in a memory-mapped file."""

from __future__ import annotations

import functools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
import torch.utils._pytree
from torch import Tensor

from mmadapt.errors import DataError

_PRIME = 1099511628211
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def parse_bytes(size: int | str) -> int:
    """A number of bytes from "500 MB", "4 GB", or a whole number."""
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?B)?\s*", str(size).upper())
    if match is None or isinstance(size, bool) or float(match[1]) <= 0:
        raise DataError(f"{size!r} is no size in bytes", 'for example budget="4 GB"')
    return int(float(match[1]) * _UNITS[match[2] or ""])


@functools.lru_cache(maxsize=8)
def _factors(count: int, device: torch.device) -> Tensor:
    """Two rows of odd 64-bit numbers."""
    draw = torch.Generator().manual_seed(20201021)
    factors = torch.randint(-(2**62), 2**62, (2, count), generator=draw, dtype=torch.int64)
    return (2 * factors + 1).to(device)


def fingerprints(args: tuple, kwargs: dict[str, Any]) -> tuple[list[bytes], str] | None:
    """16 bytes for every row of a call, and what is common to all rows; None where it has no rows.

    Every tensor's bits count: those with a first axis as long as the first tensor's by row, others as
    a whole. The sums run where the tensors are, so that a GPU sends back 16 bytes a row. None, too,
    for an input that requires a gradient.
    """
    leaves, structure = torch.utils._pytree.tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if not tensors or not tensors[0].ndim or any(t.requires_grad for t in tensors):
        return None
    count = tensors[0].shape[0]
    common = [repr(structure), *(repr(leaf) for leaf in leaves if not isinstance(leaf, Tensor))]
    sums = torch.zeros(count, 2, dtype=torch.int64, device=tensors[0].device)
    for tensor in tensors:
        common.append(f"{tuple(tensor.shape[1:])} {tensor.dtype}")
        by_row = tensor.ndim > 0 and tensor.shape[0] == count
        bits = _bits(tensor.reshape(count if by_row else 1, -1)).to(sums.device)
        own = torch.stack(
            [(bits * each).sum(1) for each in _factors(bits.shape[1], bits.device)], 1
        )
        sums = sums * _PRIME + own  # the prime keeps one tensor's share apart from the next one's
    return [row.tobytes() for row in sums.cpu().numpy()], "; ".join(common)


def _bits(rows: Tensor) -> Tensor:
    """(R, N) as whole numbers that differ wherever the values do."""
    rows = rows.detach().contiguous()
    if rows.is_floating_point() or rows.is_complex():
        size = {1: torch.uint8, 2: torch.int16, 4: torch.int32}.get(
            rows.element_size(), torch.int64
        )
        rows = rows.view(size)
    return rows.to(torch.int64)


@dataclass(frozen=True)
class Form:
    """How an output of several tensors with rows of one kind is made of a single tensor (B, N)."""

    structure: Any
    shapes: tuple[torch.Size, ...]

    @classmethod
    def of(cls, output: Any, count: int) -> Form | None:
        """The form of an output for `count` rows; None where a part of it is not kept by rows."""
        leaves, structure = torch.utils._pytree.tree_flatten(output)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        by_row = all(t.ndim > 1 and len(t) == count and not t.requires_grad for t in tensors)
        if not tensors or len(tensors) < len(leaves) or not by_row:
            return None
        if len({tensor.dtype for tensor in tensors}) > 1:
            return None
        return cls(structure, tuple(tensor.shape[1:] for tensor in tensors))

    def rows(self, output: Any) -> Tensor:
        """The output as one tensor (B, N)."""
        leaves, _ = torch.utils._pytree.tree_flatten(output)
        return torch.cat([leaf.flatten(1) for leaf in leaves], 1)

    def output(self, rows: Tensor) -> Any:
        """The output that these rows (B, N) were."""
        parts = rows.split([shape.numel() for shape in self.shapes], 1)
        leaves = [part.unflatten(1, shape) for part, shape in zip(parts, self.shapes, strict=True)]
        return torch.utils._pytree.tree_unflatten(leaves, self.structure)


class RowStore:
    """Rows of one shape and dtype, found again by their keys; never more bytes than its limit.

    On disk there are `rows` (memory-mapped), `keys` (16 bytes a row, written after the row) and
    `form.json`; rows of another form are begun anew. A folder that another process writes to is left
    to it, and rows are kept in memory.
    """

    def __init__(self, example: Tensor, limit: int, folder: Path | None = None) -> None:
        self.shape = tuple(example.shape[1:])
        self.dtype = example.dtype
        self.row_bytes = max(1, example[0].numel() * example.element_size())
        self._places: dict[bytes, int] = {}
        self._parts: list[Tensor] = []
        self._mapped: Tensor | None = None
        self._keys: IO[bytes] | None = None
        capacity = limit // self.row_bytes
        if folder is not None and capacity:
            self._open(folder, capacity)

    @property
    def bytes(self) -> int:
        """Bytes kept."""
        return len(self._places) * self.row_bytes

    def __len__(self) -> int:
        return len(self._places)

    def rows(self, keys: list[bytes]) -> Tensor | None:
        """The rows under these keys (B, …) in order, or None if one is missing."""
        places = [self._places.get(key, -1) for key in keys]
        if -1 in places:
            return None
        if self._mapped is not None:
            return self._mapped[places]
        return torch.stack([self._parts[place] for place in places])

    def add(self, keys: list[bytes], rows: Tensor, limit: int) -> bool:
        """Keep what is new of these rows, within `limit` bytes; False if some did not fit."""
        for key, row in zip(keys, rows, strict=True):
            if key in self._places:
                continue
            place = len(self._places)
            full = self._mapped is not None and place == len(self._mapped)
            if full or self.bytes + self.row_bytes > limit:
                return False
            self._write(place, row.detach(), key)
            self._places[key] = place
        return True

    def _write(self, place: int, row: Tensor, key: bytes) -> None:
        if self._mapped is None or self._keys is None:
            self._parts.append(row.clone())
            return
        self._mapped[place].copy_(row)
        self._keys.write(key)
        self._keys.flush()

    def _open(self, folder: Path, capacity: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / "keys", "ab+")  # noqa: SIM115 - closed by `close`
        if not _lock(file):
            file.close()
            return
        self._keys = file
        form = json.dumps({"shape": self.shape, "dtype": str(self.dtype)})
        known = folder / "form.json"
        if not known.is_file() or known.read_text() != form:
            file.truncate(0)
            known.write_text(form)
        file.seek(0)
        written = file.read()
        found = [written[i : i + 16] for i in range(0, len(written) - 15, 16)][:capacity]
        file.truncate(16 * len(found))
        self._places = {key: place for place, key in enumerate(found)}
        numbers = self.row_bytes // torch.empty(0, dtype=self.dtype).element_size()
        mapped = torch.from_file(
            str(folder / "rows"), shared=True, size=capacity * numbers, dtype=self.dtype
        )
        self._mapped = mapped.view(capacity, *self.shape)

    def close(self) -> None:
        """Let go of the files."""
        if self._keys is not None:
            self._keys.close()
        self._keys = self._mapped = None
        self._places, self._parts = {}, []


def _lock(file: IO[bytes]) -> bool:
    """Take the file for this process, for as long as it is open; False if another one has it."""
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        except OSError:
            return False
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
