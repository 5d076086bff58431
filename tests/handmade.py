"""Small models with anatomies written by hand, and adapters as a third party would write them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

import mmadapt as mm
from mmadapt.core.layer import Layer, empty

CHANNELS = 6


class Block(nn.Module):
    """x + linear(norm(x)); x (B, T, C)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(CHANNELS)
        self.linear = nn.Linear(CHANNELS, CHANNELS)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states + self.linear(self.norm(hidden_states))


class Small(nn.Module):
    """Three blocks and a head with four outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(CHANNELS, 4)

    def forward(self, hidden_states: Tensor) -> Tensor:
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return self.head(hidden_states)


def small() -> mm.Backbone:
    """A `Small` with its anatomy."""
    torch.manual_seed(1)
    block = "blocks.{i}"
    anatomy = mm.Anatomy(
        family="small",
        spans={
            "layers[i]": mm.Span(block, channels=f"{block}.norm.weight"),
            "layers[i].mlp": mm.Span(
                f"{block}.linear",
                ("out", "in", "weight"),
                "0|input",
                weight=f"{block}.linear.weight",
            ),
            "logits": mm.Span("head", ("out",), "0|input", channels="head.weight"),
        },
        towers={"all": ""},
        taps={"layers[i].norm1": f"{block}.norm:out"},
    )
    return mm.Backbone(Small().eval(), anatomy=anatomy)


def hidden(rows: int = 2) -> Tensor:
    """Hidden states (rows, 5, CHANNELS)."""
    return torch.randn(rows, 5, CHANNELS, generator=torch.Generator().manual_seed(2))


# -- outputs of every kind ------------------------------------------------------------------------


class Pair(NamedTuple):
    """A named tuple, as some models return."""

    extra: Tensor
    value: Tensor


@dataclass
class Fields(ModelOutput):
    """An output object, as transformers returns; `missing` stays None."""

    missing: Any = None
    value: Any = None
    extra: Any = None


class Returns(nn.Module):
    """A linear whose result leaves wrapped in `kind`."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.weight = nn.Parameter(torch.randn(CHANNELS, CHANNELS))

    def forward(self, x: Tensor) -> Any:
        y, extra = x @ self.weight.T, torch.ones(1)
        return {
            "tensor": lambda: y,
            "tuple": lambda: (y, None),
            "list": lambda: [extra, y],
            "namedtuple": lambda: Pair(extra, y),
            "dict": lambda: {"extra": extra, "value": y},
            "fields": lambda: Fields(value=y, extra=extra),
        }[self.kind]()


class Wrapped(nn.Module):
    """Calls a `Returns` and hands its output through."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.inner = Returns(kind)

    def forward(self, x: Tensor) -> Any:
        return self.inner(x)


class Attention(nn.Module):
    """Self-attention by nn.MultiheadAttention, whose out_proj is a Linear that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(CHANNELS, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x, x, x, need_weights=False)[0]


# -- a third party's methods ------------------------------------------------------------------------


@dataclass(frozen=True)
class NormGate(mm.Adapter):
    """y + gate · norm1, where norm1 is what the block's first norm returned."""

    method: ClassVar[str] = "handmade_norm_gate"
    layer: ClassVar[str] = "handmade:NormGateLayer"
    default_sites: ClassVar[tuple[str, ...]] = ("*.layers[*].mlp", "layers[*].mlp")

    start: float = 0.0


class NormGateLayer(Layer):
    """Parameters: gate (C,)."""

    taps: ClassVar[tuple[str, ...]] = ("norm1",)

    def __init__(self, adapter: NormGate, site: Any, generator: torch.Generator) -> None:
        super().__init__()
        self.gate = empty(site, site.width)
        nn.init.constant_(self.gate, adapter.start)

    def after(self, acc: Tensor, y: Tensor, x: Tensor, context: Any, site: Any) -> Tensor:
        return acc + self.gate * context.read(site.taps["norm1"])


@dataclass(frozen=True)
class Shift(mm.Adapter):
    """x + shift, before the module is called."""

    method: ClassVar[str] = "handmade_shift"
    layer: ClassVar[str] = "handmade:ShiftLayer"
    ports: ClassVar[tuple[str, ...]] = ("in",)


class ShiftLayer(Layer):
    """Parameters: shift (C_in,)."""

    def __init__(self, adapter: Shift, site: Any, generator: torch.Generator) -> None:
        super().__init__()
        self.shift = empty(site, site.width_in)
        nn.init.zeros_(self.shift)

    def before(self, x: Tensor, context: Any, site: Any) -> Tensor:
        return x + self.shift


@dataclass(frozen=True)
class Scale(mm.Adapter):
    """y · scale: not an addition, so it has no meaning in a sum."""

    method: ClassVar[str] = "handmade_scale"
    layer: ClassVar[str] = "handmade:ScaleLayer"


class ScaleLayer(Layer):
    """Parameters: scale (C,)."""

    additive: ClassVar[bool] = False

    def __init__(self, adapter: Scale, site: Any, generator: torch.Generator) -> None:
        super().__init__()
        self.scale = empty(site, site.width)
        nn.init.ones_(self.scale)

    def after(self, acc: Tensor, y: Tensor, x: Tensor, context: Any, site: Any) -> Tensor:
        return acc * self.scale
