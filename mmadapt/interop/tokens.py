"""Tokens and gates of the top layers, whoever's file they come from or go to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mmadapt.errors import AdapterFileError
from mmadapt.interop.foreign import ForeignFile, install_tensors, parts

if TYPE_CHECKING:
    from torch import Tensor


def attach_tokens(
    m: Any,
    name: str,
    length: Any,
    tensors: dict[int, tuple[Tensor, Tensor]],
    gate: Any,
    activation: Any,
    layout: str,
    ignored: tuple[str, ...],
    notes: tuple[str, ...] = (),
    replace: bool = False,
) -> ForeignFile:
    """Attach tokens (K, C) and gates of the layers of these indices, which are the top ones."""
    from mmadapt.adapter import LlamaAdapter

    adapter = LlamaAdapter(length, gate=gate, activation=activation, layers=len(tensors))
    values = {}
    for i, (prompt, opening) in tensors.items():
        site = f"0/text.layers[{i}].attn.heads:in"
        values |= {f"{site}/prompt": prompt, f"{site}/gate": opening}
    attachment = install_tensors(m, (adapter,), name, values, replace)
    return ForeignFile(layout, 2 * len(tensors), ignored, notes, attachment)


def attached_tokens(
    m: Any, layout: str, name: str | None, activation: str | None
) -> tuple[list[Tensor], list[Tensor], int]:
    """Tokens and gates of an attachment, from its first layer up, and how many layers there are.

    Gates are such that `activation` before them gives what the attachment has. Raises
    `AdapterFileError` where something else is attached, or no such gate exists.
    """
    import torch

    from mmadapt.adapter import ZeroInitAttention
    from mmadapt.ops.reference import ACTIVATIONS

    if activation not in ("tanh", "identity"):
        raise AdapterFileError(
            f"activation is {activation!r}",
            'say what the reading code puts before the gates: "tanh" or "identity"',
        )
    record, layers, depth = parts(m, name)
    if len(record.adapters) != 1 or not isinstance(record.adapters[0], ZeroInitAttention):
        raise AdapterFileError(
            f"layout {layout!r} holds tokens and gates alone, and this attachment has "
            f"{', '.join(type(a).__name__ for a in record.adapters)}"
        )
    adapter = record.adapters[0]
    top = [f"0/text.layers[{i}].attn.heads:in" for i in range(depth - len(layers), depth)]
    if adapter.visual != "none" or adapter.heads is not None or sorted(layers) != sorted(top):
        raise AdapterFileError(
            f"layout {layout!r} holds tokens of all heads in the top layers, without features",
            f"this is {adapter} at {', '.join(record.sites[0][:3])}",
        )
    prompts = [layers[key].prompt.detach().cpu() for key in top]
    gates = [ACTIVATIONS[adapter.activation](layers[key].gate.detach().cpu()) for key in top]
    if activation == "tanh":
        if any(bool((gate.abs() >= 1).any()) for gate in gates):
            raise AdapterFileError(
                "a gate is 1 or more, which no tanh gives", 'pass activation="identity"'
            )
        same = adapter.activation == "tanh"
        raw = [layers[key].gate.detach().cpu() for key in top]
        gates = raw if same else [torch.atanh(gate) for gate in gates]
    return prompts, gates, depth


def check_depth(count: Any, depth: int) -> None:
    """Raise `AdapterFileError` where a file has more layers than the backbone, or none."""
    if not isinstance(count, int) or not 0 < count <= depth:
        raise AdapterFileError(
            f"the file has tokens for {count} layers, and this backbone has {depth}"
        )
