"""The chat models of LLaMA-Adapter V2 in their authors' files.

Norms, and a bias on the output and a scale on the input of every linear. Their code rotates pairs of
neighbouring channels where transformers rotates halves of a head, so the rows of queries and keys
are in another order, and the biases with them; scales stand at inputs, whose order is the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmadapt.core.backbone import unwrap
from mmadapt.errors import AdapterFileError
from mmadapt.interop.foreign import (
    ForeignFile,
    attention_of,
    depth_of,
    install_tensors,
    parts,
    refuse_keys,
)

if TYPE_CHECKING:
    from torch import Tensor

_LINEARS = {
    "attention.wq": "attn.q", "attention.wk": "attn.k", "attention.wv": "attn.v",
    "attention.wo": "attn.o", "feed_forward.w1": "mlp.gate", "feed_forward.w3": "mlp.up",
    "feed_forward.w2": "mlp.down",
}  # fmt: skip
NORMS = {"attention_norm": "norm1", "ffn_norm": "norm2"}


def read_chat(m: Any, stored: dict[str, Tensor], name: str, replace: bool) -> ForeignFile:
    """Attach the tensors of a file that has been read."""
    from mmadapt.adapter import LlamaAdapter

    places = _chat_places(m)
    refuse_keys(sorted(places.keys() - stored.keys()), sorted(stored.keys() - places.keys()))
    model, anatomy, _ = unwrap(m)
    spans = anatomy.roles(model)
    values = {}
    for key, (place, heads) in places.items():
        value = stored[key].flatten()
        if place.endswith("/change"):  # the file holds the norm itself
            role = place.partition("/")[2].rpartition(":")[0]
            own = model.get_parameter(spans[role].weight).detach()
            if own.shape != value.shape:
                raise AdapterFileError(
                    f"{key} has {len(value)} numbers, and {role} of this backbone {len(own)}"
                )
            value = value.to(own.device, own.dtype) - own
        values[place] = halves(value, heads) if heads else value
    attachment = install_tensors(m, LlamaAdapter.v2_chat("input"), name, values, replace)
    return ForeignFile("official_v2", len(places), attachment=attachment)


def write_chat(m: Any, path: Path, name: str | None) -> ForeignFile:
    """Write an attachment of `LlamaAdapter.v2_chat("input")`."""
    import torch

    from mmadapt.adapter import LlamaAdapter

    record, layers, _ = parts(m, name)
    if record.adapters != LlamaAdapter.v2_chat("input"):
        raise AdapterFileError(
            'layout "official_v2" holds what mmadapt.LlamaAdapter.v2_chat("input") attaches, and '
            f"this attachment has {', '.join(map(str, record.adapters))}"
        )
    model, anatomy, _ = unwrap(m)
    spans = anatomy.roles(model)
    stored = {}
    for key, (place, heads) in _chat_places(m).items():
        site, _, tensor = place.rpartition("/")
        value = getattr(layers[site], tensor).detach().cpu()
        if tensor == "change":
            role = site.partition("/")[2].rpartition(":")[0]
            value = model.get_parameter(spans[role].weight).detach().cpu() + value
        stored[key] = _pairs(value, heads) if heads else value.clone()
    torch.save({"model": stored}, path)
    return ForeignFile("official_v2", len(stored))


def _chat_places(m: Any) -> dict[str, tuple[str, int]]:
    """Key in the file -> (tensor of ours, heads whose rows are in another order or 0)."""
    attention = attention_of(m)
    places = {"norm.weight": ("0/text.norm:weight/change", 0)}
    turned = {"attention.wq": attention.heads, "attention.wk": attention.key_heads}
    for i in range(depth_of(m)):
        for theirs, ours in NORMS.items():
            places[f"layers.{i}.{theirs}.weight"] = (f"0/text.layers[{i}].{ours}:weight/change", 0)
        for theirs, ours in _LINEARS.items():
            site = f"1/text.layers[{i}].{ours}"
            places[f"layers.{i}.{theirs}_bias"] = (f"{site}:out/bias", turned.get(theirs, 0))
            places[f"layers.{i}.{theirs}_scale"] = (f"{site}:in/scale", 0)
    return places


def halves(vector: Tensor, heads: int) -> Tensor:
    """Rows of queries or keys: from rotated pairs side by side, as Meta has them, to halves."""
    return vector.view(heads, -1, 2).transpose(1, 2).reshape(-1).contiguous()


def _pairs(vector: Tensor, heads: int) -> Tensor:
    """The inverse of `halves`."""
    return vector.view(heads, 2, -1).transpose(1, 2).reshape(-1).contiguous()
