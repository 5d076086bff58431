"""LLaMA-Adapter in the files of LitGPT: tokens and gates of every layer from the first adapted one.

One gate a head, without a tanh, of shape (1, 1, H, 1); older files have (1, H, 1, 1), the first ones
one for all heads.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmadapt.errors import AdapterFileError
from mmadapt.interop.foreign import ForeignFile, attention_of, depth_of, refuse_keys
from mmadapt.interop.tokens import attach_tokens, check_depth

if TYPE_CHECKING:
    from torch import Tensor

_KEY = re.compile(r"transformer\.h\.(\d+)\.attn\.(adapter_wte\.weight|gating_factor)\Z")
_PARTS = ("adapter_wte.weight", "gating_factor")
_SLICED = (
    "versions of LitGPT since 26 December 2024 take the tokens' keys and values from other rows of "
    "their fused projection than the backbone does; what was trained so computes something else here"
)


def is_litgpt(stored: dict[str, Tensor]) -> bool:
    """Whether a file is LitGPT's, of either version of its adapters."""
    return any(key.startswith("transformer.h.") for key in stored)


def read_litgpt(
    m: Any, stored: dict[str, Tensor], name: str, activation: str | None, replace: bool
) -> ForeignFile:
    """Attach the tensors of a file that has been read."""
    if activation not in (None, "identity"):
        raise AdapterFileError(
            f"activation is {activation!r}, and LitGPT's gates have none", "leave it out"
        )
    if any(key.endswith((".adapter_bias", ".adapter_scale")) for key in stored):
        raise AdapterFileError(
            "the file holds LitGPT's adapter V2, with biases and scales of its fused projections",
            "only its first version, adapter_wte and gating_factor, can be read",
        )
    matches = {key: _KEY.fullmatch(key) for key in stored}
    found = {(int(k[1]), k[2]): stored[key] for key, k in matches.items() if k is not None}
    depth, heads = depth_of(m), attention_of(m).heads
    first = min((i for i, _ in found), default=depth)
    check_depth(depth - first, depth)
    wanted = {(i, part) for i in range(first, depth) for part in _PARTS}
    refuse_keys(
        [_key(*one) for one in sorted(wanted - found.keys())],
        [key for key, match in matches.items() if match is None]
        + [_key(*one) for one in sorted(found.keys() - wanted)],
    )
    tensors = {
        i: (found[i, "adapter_wte.weight"], found[i, "gating_factor"].flatten())
        for i in range(first, depth)
    }
    wrong = [i for i, (_, gate) in tensors.items() if len(gate) not in (1, heads)]
    if wrong:
        raise AdapterFileError(
            f"{_key(wrong[0], 'gating_factor')} has {len(tensors[wrong[0]][1])} gates, and a layer "
            f"of this backbone {heads} heads"
        )
    gate = "layer" if all(len(g) == 1 for _, g in tensors.values()) else "head"
    length = len(tensors[first][0])
    return attach_tokens(
        m, name, length, tensors, gate, "identity", "litgpt", (), (_SLICED,), replace
    )


def write_litgpt(path: Path, prompts: list[Tensor], gates: list[Tensor], depth: int) -> ForeignFile:
    """Write tokens and gates (H,) of the top layers."""
    import torch

    stored: dict[str, Tensor] = {}
    for place, (prompt, gate) in enumerate(zip(prompts, gates, strict=True)):
        i = depth - len(prompts) + place
        stored[_key(i, "adapter_wte.weight")] = prompt.clone()
        stored[_key(i, "gating_factor")] = gate.reshape(1, 1, -1, 1).clone()
    torch.save({"model": stored}, path)
    return ForeignFile("litgpt", len(stored), notes=(_SLICED,))


def _key(layer: int, part: str) -> str:
    return f"transformer.h.{layer}.attn.{part}"
