"""What older adapter files mean today: one pure function for each schema that was left behind."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mmadapt.core.table import shape_of

if TYPE_CHECKING:
    from torch import Tensor

Upgrade = Callable[
    [dict[str, Any], "dict[str, Tensor]"], tuple[dict[str, Any], "dict[str, Tensor]"]
]


def _to_2(
    manifest: dict[str, Any], tensors: dict[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Every site of a Compacter had its own rule; BiAdaptFormer's files held its latent weights."""
    adapters = manifest.get("adapters")
    if not isinstance(adapters, list):  # the reader says what is wrong with it
        return {**manifest, "schema": 2}, tensors
    upgraded = []
    tensors = dict(tensors)
    for index, data in enumerate(adapters):
        method = data.get("method") if isinstance(data, dict) else None
        upgraded.append({**data, "shared_rule": False} if method == "compacter" else data)
        if method == "bi_adaptformer" and data.get("bits") in (1, 2, 3, 4):
            latent = [key for key in tensors if re.fullmatch(rf"{index}/.*/(down|up)", key)]
            for key in latent:
                tensors.update(_codes(key, tensors.pop(key), data["bits"]))
    shapes = {key: shape_of(value) for key, value in sorted(tensors.items())}
    return {**manifest, "schema": 2, "adapters": upgraded, "tensors": shapes}, tensors


def _codes(key: str, weight: Tensor, bits: int) -> dict[str, Tensor]:
    from mmadapt.ops.reference import nearest_codes, normal_codes, pack_bits, standardised

    mean, deviation = weight.mean(), weight.std()
    chosen = nearest_codes(standardised(weight, mean, deviation), normal_codes(bits))
    return {
        f"{key}_codes": pack_bits(chosen, bits),
        f"{key}_mean": mean,
        f"{key}_deviation": deviation,
    }


#: schema -> pure function from a manifest of that schema and its tensors to those of the next
UPGRADES: dict[int, Upgrade] = {1: _to_2}
