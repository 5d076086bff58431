"""Roles of residual blocks that several families share."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from mmadapt.core.site import Span


def linear(path: str) -> Span:
    """A linear layer that is called: its input, its output and its weight can be met."""
    return Span(path, ("out", "in", "weight"), x="0|input", weight=f"{path}.weight")


def linears(prefix: str, path: str, names: dict[str, str]) -> dict[str, Span]:
    """`linear` for each role word and module name, below the role `prefix` and the module `path`."""
    return {f"{prefix}.{word}": linear(f"{path}.{name}") for word, name in names.items()}


def norm(path: str, layout: str = "BTC") -> Span:
    """A norm over channels, met at its output or at its weight."""
    weight = f"{path}.weight"
    return Span(path, ("out", "weight"), "0|input", channels=weight, layout=layout, weight=weight)


def norms(prefix: str, path: str, first: str, second: str) -> dict[str, Span]:
    """The roles `norm1` and `norm2` of a block: before attention and MLP, or behind them."""
    return {
        f"{prefix}.norm1": norm(f"{path}.{first}"),
        f"{prefix}.norm2": norm(f"{path}.{second}"),
    }


def patches(path: str) -> Span:
    """The convolution that makes a token of each patch."""
    weight = f"{path}.weight"
    return Span(
        path,
        ("out", "weight"),
        x="0|input",
        channels=f"{weight}@0",
        channels_in=f"{weight}@1",
        layout="BCHW",
        weight=weight,
    )


def logits(path: str, layout: str = "BK") -> Span:
    """A linear classifier: features in, one value per class out."""
    return Span(
        path,
        ("out", "in", "weight"),
        x="0|input",
        channels=f"{path}.weight@0",
        channels_in=f"{path}.weight@1",
        layout=layout,
        weight=f"{path}.weight",
    )


def hf_layers(tower: str, path: str) -> dict[str, Span]:
    """Pre-norm blocks of transformers' CLIP and SigLIP: four called projections, fc1 and fc2."""
    block, role = path + ".{i}", f"{tower}.layers[i]"
    channels = f"{block}.layer_norm1.weight"
    projections = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"}
    return {
        role: Span(block, channels=channels),
        f"{role}.attn": Span(f"{block}.self_attn", channels=channels),
        **linears(f"{role}.attn", f"{block}.self_attn", projections),
        f"{role}.mlp": Span(f"{block}.mlp", channels=channels),
        **linears(f"{role}.mlp", f"{block}.mlp", {"up": "fc1", "down": "fc2"}),
        **norms(role, block, "layer_norm1", "layer_norm2"),
    }


def timm_layers(tower: str, path: str, model: Any) -> dict[str, Span]:
    """Pre-norm blocks of timm's vision transformers.

    q, k and v share one called linear, `attn.qkv`: each is a third of its output columns.
    """
    block, role = path + ".{i}", f"{tower}.layers[i]"
    channels = f"{block}.norm1.weight"
    fused = f"{block}.attn.qkv"
    spans = {
        role: Span(block, x="0|x", channels=channels),
        f"{role}.attn": Span(f"{block}.attn", x="0|x", channels=channels),
    }
    for place, word in enumerate("qkv"):
        spans[f"{role}.attn.{word}"] = Span(
            fused, ("out", "weight"), x="0|input", weight=f"{fused}.weight", block=(place, 3)
        )
    spans = {
        **spans,
        f"{role}.attn.o": linear(f"{block}.attn.proj"),
        f"{role}.mlp": Span(f"{block}.mlp", x="0|x", channels=channels),
        **linears(f"{role}.mlp", f"{block}.mlp", {"up": "fc1", "down": "fc2"}),
        **norms(role, block, "norm1", "norm2"),
    }
    return with_prefix(spans, model.num_prefix_tokens)


def block_taps(tower: str, path: str, first: str, second: str) -> dict[str, str]:
    """The taps of every pre-norm block: `norm1`, `norm2` and, beside each branch, `residual`.

    A residual is the stream as its branch's norm reads it, raw.
    """
    block, role = path + ".{i}", f"{tower}.layers[i]"
    return {
        f"{role}.norm1": f"{block}.{first}:out",
        f"{role}.norm2": f"{block}.{second}:out",
        f"{role}.attn.residual": f"{block}.{first}:in",
        f"{role}.mlp.residual": f"{block}.{second}:in",
    }


def wholes(
    tower: str,
    channels: str,
    positions: Callable[[Any], Any],
    words: Callable[[Any], Any] | None = None,
) -> dict[str, Span]:
    """Where a method may take other inputs: a bare tower's embeddings, and its own call."""
    shared = Span("", ("around",), channels=channels, aligned=False, parts=words)
    return {
        "model": shared,
        f"{tower}.embeddings": replace(shared, module="embeddings", parts=positions),
    }


def with_prefix(spans: dict[str, Span], tokens: int) -> dict[str, Span]:
    """The same spans, where T holds a grid of patches behind so many other tokens."""
    return {role: replace(span, prefix=tokens) for role, span in spans.items()}


def activation_name(module: object) -> str:
    """One name for the same activation in every library: gelu, gelu_tanh, quick_gelu, relu …"""
    name = type(module).__name__.lower()
    if "quick" in name:
        return "quick_gelu"
    if "gelu" in name:
        tanh = "tanh" in name or getattr(module, "approximate", "none") == "tanh"
        return "gelu_tanh" if tanh else "gelu"
    return name


def text_mask(module: Any, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The fact "mask", bool (B, T), from the `attention_mask` a tower of transformers was called with."""
    names = list(inspect.signature(module.forward).parameters)
    given = dict(zip(names, args, strict=False)) | kwargs
    mask = given.get("attention_mask")
    return {"mask": mask.bool() if mask is not None and mask.ndim == 2 else None}
