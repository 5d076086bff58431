"""Adapters: methods with their hyper-parameters, as frozen dataclasses that need no torch.

An adapter says which roles it wants and which ports it can use; the layer it builds at each site
lives in `mmadapt.methods` and is imported only when it is built. A third party adds a method with
one such dataclass and one layer class, announced through the entry-point group `mmadapt.adapters`
or `register_adapter`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from mmadapt.errors import AdapterError, did_you_mean

if TYPE_CHECKING:
    import torch

    from mmadapt.core.layer import Layer
    from mmadapt.core.site import SiteView

Activation = Literal["relu", "gelu", "quick_gelu", "silu", "tanh", "identity"]
ACTIVATIONS: tuple[str, ...] = ("relu", "gelu", "quick_gelu", "silu", "tanh", "identity")


@dataclass(frozen=True)
class Adapter:
    """A method with its hyper-parameters: what to build, and at which sites by default.

    Subclasses are frozen dataclasses whose fields are plain JSON values.
    """

    #: name in adapter files; unique among registered adapters
    method: ClassVar[str] = ""
    #: "module:class" of the layer built at each site
    layer: ClassVar[str] = ""
    #: ports the layer can use, preferred first
    ports: ClassVar[tuple[str, ...]] = ("out",)
    #: site patterns used when `attach` is given none
    default_sites: ClassVar[tuple[str, ...]] = ()
    #: "" when the method starts as the identity, else the reason why it does not
    not_identity: ClassVar[str] = ""
    #: the paper
    source: ClassVar[str] = ""

    def build(self, site: SiteView, generator: torch.Generator) -> Layer:
        """Make the trainable layer for one site, drawing from `generator` only."""
        import importlib

        module, _, name = self.layer.partition(":")
        return getattr(importlib.import_module(module), name)(self, site, generator)

    def starts_as_identity(self) -> bool:
        """Whether a freshly attached layer leaves the backbone's outputs as they are."""
        return not self.not_identity

    def to_json(self) -> dict[str, Any]:
        """The adapter as plain JSON, `from_json`'s inverse."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {"method": self.method, **fields}


_REGISTRY: dict[str, type[Adapter]] = {}
_A = TypeVar("_A", bound=Adapter)


def register_adapter(cls: type[_A]) -> type[_A]:
    """Class decorator: make an adapter known by its `method` name, so that its files load."""
    if not cls.method:
        raise AdapterError(f"{cls.__name__} has no method name", "set the class variable `method`")
    known = _REGISTRY.get(cls.method)
    if known is not None and known.__qualname__ != cls.__qualname__:
        raise AdapterError(f"method {cls.method!r} is already registered by {known.__name__}")
    _REGISTRY[cls.method] = cls
    return cls


def adapters() -> dict[str, type[Adapter]]:
    """Every registered adapter class by method name, those of installed plug-ins included."""
    from importlib.metadata import entry_points

    for entry in entry_points(group="mmadapt.adapters"):
        if entry.name not in _REGISTRY:
            register_adapter(entry.load())
    return dict(sorted(_REGISTRY.items()))


def from_json(data: dict[str, Any]) -> Adapter:
    """Rebuild an adapter from `Adapter.to_json`; unknown methods and fields are refused by name."""
    fields = dict(data)
    method = fields.pop("method", None)
    known = adapters()
    if not isinstance(method, str) or method not in known:
        raise AdapterError(f"unknown adapter method {method!r}", did_you_mean(str(method), known))
    cls = known[method]
    allowed = [f.name for f in dataclasses.fields(cls)]
    for name in fields:
        if name not in allowed:
            raise AdapterError(
                f"{cls.__name__} has no hyper-parameter {name!r}", did_you_mean(name, allowed)
            )
    return cls(**fields)


def _positive(adapter: Adapter, *names: str) -> None:
    for name in names:
        value = getattr(adapter, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise AdapterError(
                f"{type(adapter).__name__}: {name} is {value!r}, expected a whole number of at least 1"
            )


def _one_of(adapter: Adapter, name: str, options: tuple[str, ...]) -> None:
    value = getattr(adapter, name)
    if value not in options:
        raise AdapterError(
            f"{type(adapter).__name__}: {name} is {value!r}, expected one of {', '.join(options)}",
            did_you_mean(str(value), options),
        )


def _number(adapter: Adapter, *names: str, low: float = float("-inf"), high: float = float("inf")):
    for name in names:
        value = getattr(adapter, name)
        real = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not (real and low <= value <= high):  # a NaN fails both comparisons
            raise AdapterError(
                f"{type(adapter).__name__}: {name} is {value!r}, expected a number in "
                f"[{low:g}, {high:g}]"
            )


@register_adapter
@dataclass(frozen=True)
class Bottleneck(Adapter):
    """Down-projection, activation, up-projection and a residual connection (Houlsby et al. 2019).

    `sequential` reads the branch's output y and returns y + s·up(act(down(y))); `parallel` reads the
    branch's input x and returns y + s·up(act(down(x))) (He et al. 2022; AdaptFormer with relu, 0.1).

    Parameters per site: 2·C·width + width + C for C channels.
    """

    method: ClassVar[str] = "bottleneck"
    layer: ClassVar[str] = "mmadapt.methods.bottleneck:BottleneckLayer"
    ports: ClassVar[tuple[str, ...]] = ("out",)
    default_sites: ClassVar[tuple[str, ...]] = ("*.layers[*].mlp",)
    source: ClassVar[str] = (
        "Houlsby et al. 2019, arXiv:1902.00751; He et al. 2022, arXiv:2110.04366"
    )

    width: int = 32
    placement: Literal["sequential", "parallel"] = "sequential"
    activation: Activation = "gelu"
    scale: float = 1.0

    def __post_init__(self) -> None:
        _positive(self, "width")
        _one_of(self, "placement", ("sequential", "parallel"))
        _one_of(self, "activation", ACTIVATIONS)
        _number(self, "scale", low=-1e6, high=1e6)


@register_adapter
@dataclass(frozen=True)
class LoRA(Adapter):
    """Low-rank update of a weight: W + (alpha / rank)·B·A (Hu et al. 2021).

    Called linears are met at their `out` port; weights that their module reads itself (packed
    attention projections) at the `weight` port, row by row, so that q and v of a packed projection
    can be adapted without k. `alpha=None` means alpha = rank, a scale of one.

    Parameters per site: rank·(inputs + outputs).
    """

    method: ClassVar[str] = "lora"
    layer: ClassVar[str] = "mmadapt.methods.lowrank:LoRALayer"
    ports: ClassVar[tuple[str, ...]] = ("out", "weight")
    default_sites: ClassVar[tuple[str, ...]] = ("*.layers[*].attn.q", "*.layers[*].attn.v")
    source: ClassVar[str] = "Hu et al. 2021, arXiv:2106.09685"

    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        _positive(self, "rank")
        if self.alpha is not None:
            _number(self, "alpha", low=-1e6, high=1e6)
        _number(self, "dropout", low=0.0, high=0.999)

    @property
    def scale(self) -> float:
        """Factor on B·A."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


@register_adapter
@dataclass(frozen=True)
class ClipAdapter(Adapter):
    """Two-layer bottleneck on pooled features, mixed with the originals (Gao et al. 2021).

    A(f) = relu(relu(f·W1)·W2) without biases; the site returns ratio·A(f) + (1 − ratio)·f.
    `start="published"` draws both matrices at random, as the paper does; `start="identity"` makes
    the ratio a trained number that begins at 0 (both matrices still random, so that the ratio has a
    gradient at once and the matrices after the first step).

    Parameters: 2·D²/reduction, one more with `start="identity"`.
    """

    method: ClassVar[str] = "clip_adapter"
    layer: ClassVar[str] = "mmadapt.methods.pooled:ClipAdapterLayer"
    ports: ClassVar[tuple[str, ...]] = ("out",)
    default_sites: ClassVar[tuple[str, ...]] = ("vision.pooled",)
    not_identity: ClassVar[str] = "the published start mixes in a random bottleneck at once"
    source: ClassVar[str] = "Gao et al. 2021, arXiv:2110.04544"

    reduction: int = 4
    ratio: float = 0.2
    start: Literal["published", "identity"] = "published"

    def __post_init__(self) -> None:
        _positive(self, "reduction")
        _number(self, "ratio", low=0.0, high=1.0)
        _one_of(self, "start", ("published", "identity"))

    def starts_as_identity(self) -> bool:
        return self.start == "identity"


@register_adapter
@dataclass(frozen=True)
class TipAdapter(Adapter):
    """Key-value cache of few-shot features that votes on the logits (Zhang et al. 2022).

    For a unit feature f, keys K (entries, D) and their labels: logits + residual·Σ_i
    exp(−sharpness·(1 − f·K_i))·onehot(label_i). `residual` is the paper's α and `sharpness` its β.
    `train_keys` gives Tip-Adapter-F. Until `mmadapt.tasks.few_shot.remember` fills it every slot is
    empty and casts no vote, so the layer starts as the identity.

    Trained parameters: entries·D with `train_keys`, else none.
    """

    method: ClassVar[str] = "tip_adapter"
    layer: ClassVar[str] = "mmadapt.methods.pooled:TipAdapterLayer"
    ports: ClassVar[tuple[str, ...]] = ("out",)
    default_sites: ClassVar[tuple[str, ...]] = ("logits",)
    source: ClassVar[str] = "Zhang et al. 2022, arXiv:2207.09519"

    entries: int = 16
    residual: float = 1.0
    sharpness: float = 5.5
    train_keys: bool = False

    def __post_init__(self) -> None:
        _positive(self, "entries")
        _number(self, "residual", low=0.0, high=1e6)
        _number(self, "sharpness", low=0.0, high=1e6)
        if not isinstance(self.train_keys, bool):
            raise AdapterError(
                f"TipAdapter: train_keys is {self.train_keys!r}, expected True or False"
            )
