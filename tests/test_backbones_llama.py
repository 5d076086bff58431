"""Decoders with rotary positions: caches, padding, generation, and what their queries are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def step_by_step(model: Any, batch: dict[str, Tensor], first: int) -> Tensor:
    """Logits (B, T, V) of `first` tokens at once and the others one by one, with a cache."""
    cache, found = None, []
    length = batch["input_ids"].shape[1]
    for start, stop in [(0, first), *((t, t + 1) for t in range(first, length))]:
        output = model(
            input_ids=batch["input_ids"][:, start:stop],
            attention_mask=batch["attention_mask"][:, :stop],
            position_ids=batch["position_ids"][:, start:stop],
            past_key_values=cache,
            use_cache=True,
        )
        cache = output.past_key_values
        found.append(output.logits)
    return torch.cat(found, dim=1)
