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

Activation = Literal["relu", "gelu", "gelu_new", "quick_gelu", "silu", "tanh", "identity"]
ACTIVATIONS: tuple[str, ...] = (
    "relu",
    "gelu",
    "gelu_new",
    "quick_gelu",
    "silu",
    "tanh",
    "identity",
)


@dataclass(frozen=True)
class Adapter:
    """A method with its hyper-parameters: what to build, and at which sites by default.

    Subclasses are frozen dataclasses whose fields are plain JSON values, or tuples of them; one with
    a `__post_init__` of its own calls this one.
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

    #: site patterns of this very adapter, as presets set them; None means `default_sites`
    at: tuple[str, ...] | None = dataclasses.field(default=None, kw_only=True, repr=False)

    def __post_init__(self) -> None:
        at: Any = (self.at,) if isinstance(self.at, str) else self.at
        if at is None:
            return
        strings = isinstance(at, (list, tuple)) and all(isinstance(one, str) and one for one in at)
        if not strings or not at:
            raise AdapterError(
                f"{type(self).__name__}: at is {self.at!r}, expected a site pattern or several",
                'for example at="vision.layers[-6:].mlp"',
            )
        object.__setattr__(self, "at", tuple(at))

    @property
    def patterns(self) -> tuple[str, ...]:
        """Site patterns used when `attach` is given none."""
        return self.default_sites if self.at is None else self.at

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
        if self.at is None:
            del fields["at"]
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}
        return {"method": self.method, **plain}


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
    cls.__repr__ = _short_repr
    return cls


def _short_repr(self: Any) -> str:
    """The class and the hyper-parameters that differ from their defaults."""
    fields = [
        f"{f.name}={getattr(self, f.name)!r}"
        for f in dataclasses.fields(self)
        if getattr(self, f.name) != f.default
    ]
    return f"{type(self).__name__}({', '.join(fields)})"


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
    known = _REGISTRY if method in _REGISTRY else adapters()  # plug-ins are looked for on disk
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


def _flag(adapter: Adapter, *names: str) -> None:
    for name in names:
        if not isinstance(getattr(adapter, name), bool):
            raise AdapterError(
                f"{type(adapter).__name__}: {name} is {getattr(adapter, name)!r}, expected True or "
                "False"
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

    `sequential` reads the site's output y, `parallel` its input x (He et al. 2022):
    y + norm_after(s·up(dropout(act(down(norm_before(z)))))) with z = y or x.

    `norm` adds a LayerNorm of the adapter's own before the down-projection or after the scaling.
    `scale` is the number s; with `scale_kind` "learned" or "channel" it is where one trained number,
    or one a channel, begins. `start="houlsby"` draws both projections from N(0, 0.01²) within two
    deviations, which is no identity. The class methods give published configurations with their sites.

    Parameters per site: 2·C·width + width + C for C channels; with a norm 2·C more, with a trained
    scale 1 or C more.
    """

    method: ClassVar[str] = "bottleneck"
    layer: ClassVar[str] = "mmadapt.methods.bottleneck:BottleneckLayer"
    ports: ClassVar[tuple[str, ...]] = ("out",)
    default_sites: ClassVar[tuple[str, ...]] = ("*.layers[*].mlp", "blocks[*].mlp")
    not_identity: ClassVar[str] = 'start="houlsby" draws the up-projection too, as published'
    source: ClassVar[str] = (
        "Houlsby et al. 2019, arXiv:1902.00751; He et al. 2022, arXiv:2110.04366"
    )

    width: int = 32
    placement: Literal["sequential", "parallel"] = "sequential"
    activation: Activation = "gelu"
    scale: float = 1.0
    scale_kind: Literal["fixed", "learned", "channel"] = "fixed"
    norm: Literal["none", "before", "after"] = "none"
    dropout: float = 0.0
    start: Literal["zero", "houlsby"] = "zero"

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive(self, "width")
        _one_of(self, "placement", ("sequential", "parallel"))
        _one_of(self, "activation", ACTIVATIONS)
        _number(self, "scale", low=-1e6, high=1e6)
        _one_of(self, "scale_kind", ("fixed", "learned", "channel"))
        _one_of(self, "norm", ("none", "before", "after"))
        _number(self, "dropout", low=0.0, high=0.999)
        _one_of(self, "start", ("zero", "houlsby"))

    def starts_as_identity(self) -> bool:
        return self.start == "zero"

    @classmethod
    def houlsby(cls, width: int = 64, **changes: Any) -> Bottleneck:
        """Two per block, behind the attention and the MLP branch (arXiv:1902.00751)."""
        options: dict[str, Any] = {
            "activation": "silu",
            "at": ("*.layers[*].attn", "*.layers[*].mlp"),
        }
        return cls(width, **{**options, **changes})

    @classmethod
    def pfeiffer(cls, width: int = 48, **changes: Any) -> Bottleneck:
        """One per block, behind the MLP and its residual connection (arXiv:2005.00247)."""
        options: dict[str, Any] = {"activation": "relu", "at": ("*.layers[*]",)}
        return cls(width, **{**options, **changes})

    @classmethod
    def parallel(cls, width: int = 512, **changes: Any) -> Bottleneck:
        """One beside each MLP, reading the MLP's input, scale 4 (arXiv:2110.04366)."""
        options: dict[str, Any] = {
            "placement": "parallel",
            "activation": "relu",
            "scale": 4.0,
            "at": ("*.layers[*].mlp",),
        }
        return cls(width, **{**options, **changes})

    @classmethod
    def adaptformer(cls, width: int = 64, **changes: Any) -> Bottleneck:
        """One beside each MLP with an input LayerNorm, scale 0.1 (arXiv:2205.13535).

        In pre-norm backbones the MLP's input is normalised already; `norm="none"` then reads the
        paper's equation with the backbone's own norm.
        """
        options: dict[str, Any] = {
            "placement": "parallel",
            "activation": "relu",
            "scale": 0.1,
            "norm": "before",
            "dropout": 0.1,
            "at": ("*.layers[*].mlp",),
        }
        return cls(width, **{**options, **changes})

    @classmethod
    def adapterplus(cls, width: int = 8, **changes: Any) -> Bottleneck:
        """One behind each block with a trained scale per channel (Adapter+, arXiv:2406.06820).

        Starts as published, with Houlsby's draw; `start="zero"` makes it an identity.
        """
        options: dict[str, Any] = {
            "activation": "gelu",
            "scale_kind": "channel",
            "start": "houlsby",
            "at": ("*.layers[*]",),
        }
        return cls(width, **{**options, **changes})


@register_adapter
@dataclass(frozen=True)
class LoRA(Adapter):
    """Low-rank update of a weight: W + (alpha / rank)·B·A (Hu et al. 2021).

    Called linears are met at their `out` port; weights that their module reads itself (packed
    attention projections) at the `weight` port, row by row, so that q and v of a packed projection
    can be adapted without k. Kernels of convolutions in one, two and three dimensions without groups
    change the same way: A is a kernel with `rank` channels, B mixes them.

    `alpha=None` means alpha = rank, a scale of one; `rank_stabilized` divides alpha by √rank
    instead (Kalajdzievski 2023, arXiv:2312.03732).

    Parameters per site: rank·(inputs + outputs); a kernel's inputs count its taps.
    """

    method: ClassVar[str] = "lora"
    layer: ClassVar[str] = "mmadapt.methods.lowrank:LoRALayer"
    ports: ClassVar[tuple[str, ...]] = ("out", "weight")
    default_sites: ClassVar[tuple[str, ...]] = ("*.layers[*].attn.q", "*.layers[*].attn.v")
    source: ClassVar[str] = "Hu et al. 2021, arXiv:2106.09685"

    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    rank_stabilized: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive(self, "rank")
        if self.alpha is not None:
            _number(self, "alpha", low=-1e6, high=1e6)
        _number(self, "dropout", low=0.0, high=0.999)
        _flag(self, "rank_stabilized")
        if self.rank_stabilized and self.alpha is None:
            raise AdapterError(
                "LoRA: rank_stabilized divides alpha by √rank, and alpha is None",
                "pass alpha, for example alpha=16",
            )

    @property
    def scale(self) -> float:
        """Factor on B·A."""
        if self.alpha is None:
            return 1.0
        return self.alpha / (self.rank**0.5 if self.rank_stabilized else self.rank)


@register_adapter
@dataclass(frozen=True)
class ScaleShift(Adapter):
    """A trained scale and shift per channel, y·γ + β, behind every operation (SSF, Lian et al. 2022).

    Starts at γ = 1 and β = 0; `start="published"` draws them from N(1, 0.02²) and N(0, 0.02²). By
    default it stands at those norms, projections and linears of a block that the backbone calls.
    It replaces its site's output, so two of them stack and do not sum. Merges exactly into the
    linear or norm it stands behind.

    Parameters per site: 2·C.
    """

    method: ClassVar[str] = "scale_shift"
    layer: ClassVar[str] = "mmadapt.methods.affine:ScaleShiftLayer"
    ports: ClassVar[tuple[str, ...]] = ("out",)
    default_sites: ClassVar[tuple[str, ...]] = (
        "*.layers[*].norm1",
        "*.layers[*].attn.q",
        "*.layers[*].attn.k",
        "*.layers[*].attn.v",
        "*.layers[*].attn.o",
        "*.layers[*].norm2",
        "*.layers[*].mlp.up",
        "*.layers[*].mlp.down",
    )
    not_identity: ClassVar[str] = 'start="published" draws the scales and shifts'
    source: ClassVar[str] = "Lian et al. 2022, arXiv:2210.08823"

    start: Literal["identity", "published"] = "identity"

    def __post_init__(self) -> None:
        super().__post_init__()
        _one_of(self, "start", ("identity", "published"))

    def starts_as_identity(self) -> bool:
        return self.start == "identity"


@register_adapter
@dataclass(frozen=True)
class AdapterBias(Adapter):
    """A shift per token along one trained direction, y + (w·z + b)·v (Fu et al. 2022).

    Stands at the MLP's second linear: z is its input, the activations inside the MLP. v starts at
    zero. The paper's variant with one (w, b) for all layers is not offered.

    Parameters per site: inputs + outputs + 1.
    """

    method: ClassVar[str] = "adapter_bias"
    layer: ClassVar[str] = "mmadapt.methods.affine:AdapterBiasLayer"
    ports: ClassVar[tuple[str, ...]] = ("out",)
    default_sites: ClassVar[tuple[str, ...]] = ("*.layers[*].mlp.down",)
    source: ClassVar[str] = "Fu et al. 2022, arXiv:2205.00305"


@register_adapter
@dataclass(frozen=True)
class Compacter(Adapter):
    """A bottleneck whose projections are sums of Kronecker products (Karimi Mahabadi et al. 2021).

    Each projection is Σ_i A_i ⊗ (s_i·t_iᵀ) with `division` terms, both with biases; down and up of a
    site share the A_i. The paper shares them across layers too, and trains the backbone's norms
    beside them; here every site has its own A_i, division³ numbers, and norms are `Unlock`'s.
    `start="zero"` sets the up-projection's t_i to zero; "published" draws them.

    Parameters per site: 2·(C + width) + C + width + division³.
    """

    method: ClassVar[str] = "compacter"
    layer: ClassVar[str] = "mmadapt.methods.compacter:CompacterLayer"
    ports: ClassVar[tuple[str, ...]] = ("out",)
    default_sites: ClassVar[tuple[str, ...]] = ("*.layers[*].attn", "*.layers[*].mlp")
    not_identity: ClassVar[str] = 'start="published" draws every factor'
    source: ClassVar[str] = "Karimi Mahabadi et al. 2021, arXiv:2106.04647"

    width: int = 24
    division: int = 4
    activation: Activation = "gelu_new"
    start: Literal["zero", "published"] = "zero"

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive(self, "width", "division")
        _one_of(self, "activation", ACTIVATIONS)
        _one_of(self, "start", ("zero", "published"))
        if self.width % self.division:
            raise AdapterError(
                f"Compacter: division {self.division} does not divide the width {self.width}"
            )

    def starts_as_identity(self) -> bool:
        return self.start == "zero"

    @classmethod
    def plus_plus(cls, width: int = 24, **changes: Any) -> Compacter:
        """Compacter++: behind the MLP only."""
        options: dict[str, Any] = {"at": ("*.layers[*].mlp",)}
        return cls(width, **{**options, **changes})


@register_adapter
@dataclass(frozen=True)
class BiAdaptFormer(Adapter):
    """A bottleneck beside the MLP whose weights have 2^bits values (Jie et al. 2023).

    Trains real weights that are quantised in every forward pass: standardised per matrix, moved to
    the nearest code, scaled back; the gradient passes the quantiser as if it were not there.
    No biases. Files hold the trained float weights, so they are not smaller than others'; `inspect`
    shows the bytes that bits·n/8 and two numbers a matrix would take. Placement, activation and
    scale are the defaults of this library; they were not checked against the paper's code.

    Parameters per site: 2·C·width.
    """

    method: ClassVar[str] = "bi_adaptformer"
    layer: ClassVar[str] = "mmadapt.methods.lowbit:BiAdaptFormerLayer"
    ports: ClassVar[tuple[str, ...]] = ("out",)
    default_sites: ClassVar[tuple[str, ...]] = ("*.layers[*].mlp",)
    not_identity: ClassVar[str] = "a matrix of zeros has no deviation to be quantised by"
    source: ClassVar[str] = "Jie et al. 2023, arXiv:2307.16867"

    width: int = 32
    bits: int = 1
    activation: Activation = "relu"
    scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive(self, "width")
        _one_of(self, "activation", ACTIVATIONS)
        _number(self, "scale", low=-1e6, high=1e6)
        if self.bits not in (1, 2, 3, 4) or isinstance(self.bits, bool):
            raise AdapterError(f"BiAdaptFormer: bits is {self.bits!r}, expected 1, 2, 3 or 4")


@register_adapter
@dataclass(frozen=True)
class Convpass(Adapter):
    """A bottleneck with a 3 × 3 convolution over the image's patches (Jie and Deng 2022).

    Two per block, beside attention and MLP: y + scale·up(dropout(g(conv(g(down(x)))))), g the quick
    GELU. Tokens are a square grid of patches in reading order, with or without one class token,
    which is convolved as an image of one pixel. `grid=(rows, columns)` says otherwise, and tokens
    before the grid then are all treated like a class token: give it for backbones with registers,
    whose count of tokens may by chance look like another square. `kernel="identity"` starts the
    convolution as one that does nothing.

    Parameters per site: 2·C·width + C + width + 9·width² + width.
    """

    method: ClassVar[str] = "convpass"
    layer: ClassVar[str] = "mmadapt.methods.conv:ConvpassLayer"
    ports: ClassVar[tuple[str, ...]] = ("out",)
    default_sites: ClassVar[tuple[str, ...]] = ("vision.layers[*].attn", "vision.layers[*].mlp")
    source: ClassVar[str] = "Jie and Deng 2022, arXiv:2207.07039"

    width: int = 8
    scale: float = 1.0
    dropout: float = 0.1
    kernel: Literal["identity", "xavier"] = "identity"
    grid: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive(self, "width")
        _number(self, "scale", low=-1e6, high=1e6)
        _number(self, "dropout", low=0.0, high=0.999)
        _one_of(self, "kernel", ("identity", "xavier"))
        if self.grid is None:
            return
        sides: Any = self.grid
        whole = isinstance(sides, (list, tuple)) and all(type(n) is int and n > 0 for n in sides)
        if not whole or len(sides) != 2:
            raise AdapterError(f"Convpass: grid is {sides!r}, expected (rows, columns) or None")
        object.__setattr__(self, "grid", tuple(sides))


@register_adapter
@dataclass(frozen=True)
class Unlock(Adapter):
    """The backbone's own tensors, trained: BitFit, tuned norms, a decoder left open.

    Works at every site with a `weight` port, and has no sites of its own. What is trained, summed
    and saved is the change from the backbone's value, so weight decay pulls towards the backbone.

    Parameters per site: those of the tensor.
    """

    method: ClassVar[str] = "unlock"
    layer: ClassVar[str] = "mmadapt.methods.unlock:UnlockLayer"
    ports: ClassVar[tuple[str, ...]] = ("weight",)
    source: ClassVar[str] = "Ben Zaken et al. 2022 (BitFit), arXiv:2106.10199"


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
        super().__post_init__()
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
        super().__post_init__()
        _positive(self, "entries")
        _number(self, "residual", low=0.0, high=1e6)
        _number(self, "sharpness", low=0.0, high=1e6)
        _flag(self, "train_keys")
