"""What a module of no known family offers: spans read from its weights, norms and signatures.

The layout of a span says where its channels are: last in BTC and BHWC, second in BCT, BCHW and
BCDHW. Which child of a block ends a residual branch is not guessed.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from mmadapt.core.site import Span
from mmadapt.errors import BackboneError

if TYPE_CHECKING:
    from torch import nn

#: children of a block that keep their own name as a role
BRANCHES = ("attn", "attention", "self_attn", "mlp", "ffn", "feed_forward")

#: classes that read the weights of their own linears, whose calls a hook would wait for in vain
READERS = (
    "torch.nn.modules.activation.MultiheadAttention",
    "torchvision.models.swin_transformer.ShiftedWindowAttention",
    "timm.models.swin_transformer_v2.WindowAttention",
    "timm.models.eva.EvaAttention",
    "timm.models.beit.Attention",
)

#: classes whose weight is the transpose of a linear's, so that no row of it is an output
TRANSPOSED = ("transformers.pytorch_utils.Conv1D",)

#: module of a block's class -> layout of the block and of its children; elsewhere tokens are BTC
CHANNELS_LAST_GRIDS = {
    "torchvision.models.swin_transformer": ("BHWC", "BHWC"),
    "timm.models.swin_transformer": ("BHWC", "BTC"),
    "timm.models.swin_transformer_v2": ("BHWC", "BTC"),
    "timm.models.swin_transformer_v2_cr": ("BHWC", "BTC"),
}


def block_roles(role: str, path: str, block: nn.Module) -> dict[str, Span]:
    """Roles of one block: itself, its named branches, its linears, convolutions and norms."""
    _, inside = _layouts(block)
    whole = _whole(path, block)
    spans = {} if whole is None else {role: whole}
    for name, child in block.named_children():
        if name in BRANCHES and any(True for _ in child.parameters()):
            branch = _branch(path, name, child, whole, inside)
            if branch is not None:
                spans[f"{role}.{name}"] = branch
    for name, span in _weight_roles(path, block, inside):
        spans[f"{role}.{name}"] = span
    for name, child in block.named_modules():
        if _is_norm(child):
            spans[f"{role}.{_legal(name)}"] = _norm_span(f"{path}.{name}", child, block)
    return spans


def _layouts(block: nn.Module) -> tuple[str, str]:
    """Layout of a block's input and output, and of the linears inside it."""
    if type(block).__module__ in CHANNELS_LAST_GRIDS:
        return CHANNELS_LAST_GRIDS[type(block).__module__]
    if _starts_with_convolution(block):
        own = _conv_layout(block)
        return own, {"BCT": "BTC", "BCHW": "BHWC", "BCDHW": "BDHWC"}[own]
    return "BTC", "BTC"


def _starts_with_convolution(module: nn.Module) -> bool:
    """Whether the first weight or batch norm inside belongs to a convolution network."""
    from torch import nn
    from torch.nn.modules.batchnorm import _BatchNorm
    from torch.nn.modules.conv import _ConvNd

    for child in module.modules():
        if isinstance(child, (_ConvNd, _BatchNorm)):
            return True
        if isinstance(child, nn.Linear):
            return False
    return False


def _conv_layout(module: nn.Module) -> str:
    from torch import nn

    for child in module.modules():
        for kind, layout in ((nn.Conv1d, "BCT"), (nn.Conv2d, "BCHW"), (nn.Conv3d, "BCDHW")):
            if isinstance(child, kind):
                return layout
    return "BCHW"


def _whole(path: str, module: nn.Module) -> Span | None:
    """A module's own call; its width is that of its norm, or of its last weight's output."""
    layout, _ = _layouts(module)
    weights, x = _weights(module), _first_argument(module)
    norm = _direct_norm(module) if layout.endswith("C") else ""
    if norm:
        return Span(path, x=x, channels=f"{path}.{norm}.weight", layout=layout)
    if not weights:
        return None
    first, last = (module.get_submodule(weights[place]) for place in (0, -1))
    reads = f"{path}.{weights[0]}.weight@{1 - _output_axis(first)}"
    if getattr(first, "groups", 1) > 1:  # a row of it does not show all inputs; most keep the width
        same = first.in_channels == first.out_channels
        reads = f"{path}.{weights[0]}.weight@0" if same else ""
    return Span(
        path,
        x=x,
        channels=f"{path}.{weights[-1]}.weight@{_output_axis(last)}",
        channels_in=reads,
        layout=layout,
    )


def _direct_norm(block: nn.Module) -> str:
    """The first child that normalises channels, which then has the width of the residual stream."""
    return next((name for name, child in block.named_children() if _is_norm(child)), "")


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return "norm" in type(module).__name__.lower() and getattr(weight, "ndim", 0) == 1


def _branch(path: str, name: str, child: nn.Module, block: Span | None, inside: str) -> Span | None:
    """A named child: as wide as its block where a norm tells the block's width."""
    layout = _conv_layout(child) if _starts_with_convolution(child) else inside
    if block is not None and "@" not in block.channels:
        channels = block.channels
    elif _weights(child):
        last = _weights(child)[-1]
        size = f"weight@{_output_axis(child.get_submodule(last))}"
        channels = ".".join(filter(None, (path, name, last, size)))
    else:
        return None
    return Span(f"{path}.{name}", x=_first_argument(child), channels=channels, layout=layout)


def _weights(module: nn.Module) -> list[str]:
    """Paths of the linears and convolutions inside, in order; "" for the module itself."""
    from torch import nn

    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return [
        name
        for name, child in module.named_modules()
        if isinstance(child, kinds) or _is_one_of(child, TRANSPOSED)
    ]


def _output_axis(module: nn.Module) -> int:
    return 1 if _is_one_of(module, TRANSPOSED) else 0


def _weight_roles(path: str, block: nn.Module, layout: str) -> Iterator[tuple[str, Span]]:
    """Role (below the block's) and span of every linear and convolution inside a block."""
    for name in _weights(block):
        parent, _, _ = name.rpartition(".")
        where = f"{path}.{name}" if name else path
        if _is_one_of(block.get_submodule(parent), READERS):
            holder = f"{path}.{parent}" if parent else path
            yield _legal(name), Span(holder, ("weight",), weight=f"{where}.weight", layout=layout)
        else:
            module = block.get_submodule(name)
            yield _legal(name), _weight_span(where, module, layout)
            if _is_one_of(module, TRANSPOSED) and module.bias is not None:
                yield f"{_legal(name)}.bias", Span(where, ("weight",), weight=f"{where}.bias")
    for name, child in block.named_modules():  # a packed projection is no module
        if isinstance(getattr(child, "in_proj_weight", None), _parameter()):
            where = f"{path}.{name}" if name else path
            for place, word in enumerate("qkv"):
                span = Span(where, ("weight",), weight=f"{where}.in_proj_weight", block=(place, 3))
                yield _legal(f"{name}.{word}"), span


def _parameter() -> type:
    from torch import nn

    return nn.Parameter


def _weight_span(path: str, module: nn.Module, layout: str) -> Span:
    """A linear by all ports. A convolution by its weight only: at `out`, channels are not last.

    A transposed linear by its call only: methods take the rows of a weight for outputs.
    """
    from torch import nn

    if _is_one_of(module, TRANSPOSED):
        return Span(
            path,
            ("out", "in"),
            x="0|x",
            channels=f"{path}.weight@1",
            channels_in=f"{path}.weight@0",
            layout=layout,
        )
    if isinstance(module, nn.Linear):
        return Span(
            path, ("out", "in", "weight"), x="0|input", weight=f"{path}.weight", layout=layout
        )
    return Span(
        path, ("weight",), x="0|input", weight=f"{path}.weight", layout=_conv_layout(module)
    )


def _norm_span(path: str, module: nn.Module, block: nn.Module) -> Span:
    """A norm by its weight, and by its output where the order of its axes is beyond doubt."""
    from torch import nn
    from torch.nn.modules.batchnorm import _BatchNorm

    own, inside = _layouts(block)
    second = isinstance(module, (_BatchNorm, nn.GroupNorm)) or type(module).__name__.endswith("2d")
    certain = own.endswith("C") != second and (second or own == inside == "BTC")
    layout = own if certain else inside
    ports = ("out", "weight") if certain else ("weight",)
    weight = f"{path}.weight"
    x = _first_argument(module)
    return Span(path, ports, x=x, channels=weight, layout=layout, weight=weight)


def _legal(path: str) -> str:
    """A dotted path as a role: parts that are numbers get an underscore."""
    return ".".join(
        f"_{part}" if part[:1].isdigit() else re.sub(r"\W", "_", part) for part in path.split(".")
    )


def _first_argument(module: nn.Module) -> str:
    """Where a module's call has its input: "0|name of the first parameter of its forward"."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):
        return "0|input"
    return f"0|{next((p.name for p in parameters if p.kind in kinds), 'input')}"


def _is_one_of(module: nn.Module, classes: tuple[str, ...]) -> bool:
    return any(f"{cls.__module__}.{cls.__qualname__}" in classes for cls in type(module).__mro__)


# -- modules named by hand ----------------------------------------------------------------------------


def span_of(model: nn.Module, path: str, module: nn.Module) -> Span:
    """The span of a module named by hand: a weight's, or a whole call with its widths."""
    if "" in _weights(module):  # a linear or convolution itself
        parent = path.rpartition(".")[0]
        if _is_one_of(model.get_submodule(parent), READERS):
            return Span(parent, ("weight",), weight=f"{path}.weight")
        return _weight_span(path, module, "BTC")
    whole = _whole(path, module)
    if whole is not None:
        return whole
    weight = f"{path}.weight"
    if getattr(module, "weight", None) is not None:  # a norm or an embedding: its last axis
        layout, _ = _layouts(module)
        offered = ("out", "in", "weight") if _is_norm(module) else ("out", "in")
        return Span(
            path,
            offered,
            x=_first_argument(module),
            channels=f"{weight}@-1",
            layout=layout,
            weight=weight if _is_norm(module) else "",
        )
    raise BackboneError(
        f"{path!r} is a {type(module).__name__} without a weight, so its channels are unknown",
        "name the module before or after it, or write its mmadapt.Span with channels=",
    )
