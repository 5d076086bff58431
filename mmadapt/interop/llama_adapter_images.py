"""The models for images of LLaMA-Adapter V2 in their authors' files.

Tokens of a CLIP meet learned queries in a few transformer blocks; what the queries become is added to
the trained tokens of every adapted layer. Norms, and biases at five of a block's seven linears, are
trained as well.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mmadapt.core.backbone import unwrap
from mmadapt.errors import AdapterFileError
from mmadapt.interop.foreign import (
    ForeignFile,
    attention_of,
    depth_of,
    install_tensors,
    refuse_keys,
)
from mmadapt.interop.llama_adapter_v2 import NORMS, halves
from mmadapt.interop.tokens import check_depth

if TYPE_CHECKING:
    from torch import Tensor

_BIASES = {
    "attention.wq": "attn.q", "attention.wo": "attn.o", "feed_forward.w1": "mlp.gate",
    "feed_forward.w3": "mlp.up", "feed_forward.w2": "mlp.down",
}  # fmt: skip


def read_images(
    m: Any, stored: dict[str, Tensor], name: str, activation: str | None, replace: bool
) -> ForeignFile:
    """Attach the tensors of a file that has been read; the report's `encoder` is its way to see."""
    from mmadapt.adapter import BiasScale, LlamaAdapter, Unlock
    from mmadapt.interop.visual_queries import VisualQueries

    if activation not in (None, "tanh"):
        raise AdapterFileError(
            f"activation is {activation!r}, and the gates of V2 have a tanh", "leave it out"
        )
    adapted = [key for key in stored if "lora_" in key or key.endswith("new_gate")]
    if adapted:
        raise AdapterFileError(
            f"the file holds {len(adapted)} tensors of LoRA, first {adapted[0]}, which its code "
            "gives to words and not to the trained tokens",
            "only files with biases and norms, such as BIAS-7B, can be read",
        )
    visual = {k: v for k, v in stored.items() if k.startswith(("visual_", "clip_proj"))}
    depth = depth_of(m)
    length = len(stored["visual_query.weight"])
    rows = stored.get("adapter_query.weight")
    if rows is None or len(rows) % length:
        raise AdapterFileError(
            f"adapter_query.weight has {'no' if rows is None else len(rows)} rows, expected a "
            f"multiple of the {length} of visual_query.weight"
        )
    count = len(rows) // length
    check_depth(count, depth)
    places = _places(m, stored, count)
    ignored = tuple(k for i in range(depth - count) if (k := _gate(i)) in stored)
    known = {*places, *visual, *ignored, "adapter_query.weight"}
    refuse_keys(sorted(places.keys() - stored.keys()), sorted(stored.keys() - known))
    encoder = VisualQueries.of(visual)
    width = attention_of(m).width
    if encoder.width_out != width:
        raise AdapterFileError(
            f"visual_proj.weight gives {encoder.width_out} channels, and this backbone has {width}"
        )
    norms = any(place.endswith("/change") for place in places.values())
    biases = any(place.endswith("/bias") for place in places.values())
    adapters: list[Any] = []
    if norms:
        adapters.append(Unlock(at=("text.layers[*].norm1", "text.layers[*].norm2", "text.norm")))
    if biases:
        adapters.append(BiasScale(at=tuple(f"text.layers[*].{own}" for own in _BIASES.values())))
    adapters.append(
        LlamaAdapter(length, layers=count, visual="added", features=width, projected=False)
    )
    numbers = {kind: str(i) for i, kind in enumerate(type(a).__name__ for a in adapters)}
    values = _values(m, stored, places, numbers)
    last = numbers["LlamaAdapter"]
    for i, block in zip(range(depth - count, depth), rows.chunk(count), strict=True):
        values[f"{last}/text.layers[{i}].attn.heads:in/prompt"] = block
    attachment = install_tensors(m, tuple(adapters), name, values, replace)
    notes = ("pass what the encoder makes of CLIP's tokens: mm.context(m, visual=encoder(tokens))",)
    taken = len(places) + len(visual) + 1
    return ForeignFile("official_v2_images", taken, ignored, notes, attachment, encoder=encoder)


def _places(m: Any, stored: dict[str, Tensor], count: int) -> dict[str, str]:
    """Key in the file -> "kind/site/tensor" of ours; norms and biases only where the file has any."""
    depth, places = depth_of(m), {}
    norms = "llama.norm.weight" in stored
    biases = any(key.endswith(".bias") and key.startswith("llama.") for key in stored)
    if norms:
        places["llama.norm.weight"] = "Unlock/text.norm:weight/change"
    for i in range(depth):
        layer, ours = f"llama.layers.{i}", f"text.layers[{i}]"
        if i >= depth - count:
            places[_gate(i)] = f"LlamaAdapter/{ours}.attn.heads:in/gate"
        for theirs, own in NORMS.items() if norms else ():
            places[f"{layer}.{theirs}.weight"] = f"Unlock/{ours}.{own}:weight/change"
        for theirs, own in _BIASES.items() if biases else ():
            places[f"{layer}.{theirs}.bias"] = f"BiasScale/{ours}.{own}:out/bias"
    return places


def _values(
    m: Any, stored: dict[str, Tensor], places: dict[str, str], numbers: dict[str, str]
) -> dict[str, Tensor]:
    """Our tensors by file key: gates, changes of norms, biases with their rows turned, scales of one."""
    import torch

    model, anatomy, _ = unwrap(m)
    spans, heads = anatomy.roles(model), attention_of(m).heads
    values: dict[str, Tensor] = {}
    for key, place in places.items():
        kind, site, tensor = place.split("/")
        value = stored[key].flatten()
        if tensor == "change":
            own = model.get_parameter(spans[site.rpartition(":")[0]].weight).detach()
            if own.shape != value.shape:
                raise AdapterFileError(
                    f"{key} has {len(value)} numbers, and {site} of this backbone {len(own)}"
                )
            value = value.to(own.device, own.dtype) - own
        if tensor == "bias":
            value = halves(value, heads) if key.endswith("wq.bias") else value
            values[f"{numbers[kind]}/{site}/scale"] = torch.ones_like(value)
        values[f"{numbers[kind]}/{site}/{tensor}"] = value
    return values


def _gate(layer: int) -> str:
    return f"llama.layers.{layer}.attention.gate"
