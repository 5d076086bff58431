"""The set-ups that `cost.py` compares: the same methods by mmadapt, by its peers and by hand.

A builder takes a fresh copy of the backbone, changes it, and returns what calls it. Libraries are
imported by their own builders only, so that every process needs just what it measures.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

BATCH, MANY = 4, 33
RANK = 8


@dataclass(frozen=True)
class Shape:
    """A vision transformer with random weights, and how wide its adapters are."""

    config: dict[str, int]
    bottleneck: int
    #: shapes a bottleneck of AdapterHub: channels / bottleneck
    reduction: int

    @property
    def layers(self) -> int:
        return self.config["num_hidden_layers"]


#: so small that calling operations, not computing, takes the time: 17 tokens
LAUNCH = Shape(
    {"hidden_size": 64, "num_hidden_layers": 12, "num_attention_heads": 4,
     "intermediate_size": 256, "image_size": 32, "patch_size": 8}, 16, 4,
)  # fmt: skip
#: ViT-B/16 at 224 pixels: 197 tokens
VIT_B = Shape(
    {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
     "intermediate_size": 3072, "image_size": 224, "patch_size": 16}, 48, 16,
)  # fmt: skip
#: for tests
TINY = Shape(
    {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
     "intermediate_size": 64, "image_size": 16, "patch_size": 8}, 8, 4,
)  # fmt: skip


@dataclass
class Case:
    """One set-up: who made it, what it is, and the calls to time."""

    library: str
    name: str
    #: places where something is added, for the time a place; 0 where that has no meaning
    sites: int
    model: nn.Module
    #: one forward pass; gradients are the caller's business
    call: Callable[[], Any]
    #: whether a training step means something here
    trains: bool = True
    #: what it is compared with
    base: str = "ViT"

    @property
    def key(self) -> str:
        return f"{self.library}: {self.name}"

    def forward(self) -> None:
        with torch.no_grad():
            self.call()

    def loss(self) -> torch.Tensor:
        output = self.call()
        hidden = output if isinstance(output, torch.Tensor) else output.last_hidden_state
        return hidden.pow(2).mean()

    def step(self) -> None:
        """Forward and backward; the optimiser's own arithmetic is the same for everyone."""
        for parameter in self.trained:
            parameter.grad = None
        self.loss().backward()

    @functools.cached_property
    def trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]


class Bench:
    """A bare backbone, its input, and copies that share its weights."""

    def __init__(self, shape: Shape) -> None:
        from transformers import ViTConfig, ViTModel

        torch.manual_seed(0)
        self.shape = shape
        self.bare = ViTModel(ViTConfig(**shape.config), add_pooling_layer=False).eval()
        size = shape.config["image_size"]
        self.pixels = torch.randn(BATCH, 3, size, size)

    def twin(self) -> Any:
        """A copy with modules of its own and the same weights, so that all have one memory."""
        tensors = (*self.bare.parameters(), *self.bare.buffers())
        return copy.deepcopy(self.bare, {id(tensor): tensor for tensor in tensors})

    def apart(self) -> Any:
        """A copy with weights of its own, for what trains or changes them."""
        return copy.deepcopy(self.bare)

    def case(self, library: str, name: str, sites: int, model: nn.Module, **options: Any) -> Case:
        return Case(library, name, sites, model, functools.partial(model, self.pixels), **options)


# -- mmadapt ------------------------------------------------------------------------------------


def mmadapt_cases(bench: Bench, small: bool = True) -> Iterator[Case]:
    """Ours; `small` adds what only shows where calls cost more than arithmetic."""
    import mmadapt as mm

    width, layers = bench.shape.bottleneck, bench.shape.layers
    per_row = ["a0", "a1", "a2", "a3"]

    def attached(adapter: Any, count: int = 1, model: Any = None, at: Any = None) -> Any:
        model = bench.twin() if model is None else model
        for index in range(count):
            mm.attach(model, adapter, name=f"a{index}", at=at)
        mm.set_active(model, "a0")
        return model

    def mixed(model: Any) -> Any:
        with mm.context(model, rows=per_row):
            return model(bench.pixels)

    if small:
        model = attached(mm.Bottleneck(width))
        mm.set_active(model)
        yield bench.case("mmadapt", "attached, none active", layers, model, trains=False)
    one = attached(mm.Bottleneck(width))
    yield bench.case("mmadapt", "bottleneck behind each MLP", layers, one)
    pfeiffer = attached(mm.Bottleneck.pfeiffer(width))
    yield bench.case("mmadapt", "bottleneck (Pfeiffer)", layers, pfeiffer)
    if small:
        houlsby = attached(mm.Bottleneck.houlsby(width))
        yield bench.case("mmadapt", "bottlenecks (Houlsby)", 2 * layers, houlsby)
    yield bench.case("mmadapt", "LoRA on q, v", 2 * layers, attached(mm.LoRA(RANK)))
    if small:
        many = attached(mm.LoRA(RANK), MANY)
        yield bench.case("mmadapt", f"LoRA, 1 of {MANY} active", 2 * layers, many)
        merged = attached(mm.LoRA(RANK), model=bench.apart())
        mm.merge(merged)
        yield bench.case("mmadapt", "LoRA merged", 0, merged, trains=False)
    for word, adapter, sites in (
        ("bottlenecks (Pfeiffer)", mm.Bottleneck.pfeiffer(width), layers),
        ("LoRA", mm.LoRA(RANK), 2 * layers),
    ):
        four = attached(adapter, 4)
        call = functools.partial(mixed, four)
        yield Case("mmadapt", f"4 {word} mixed in the batch", sites, four, call)
        if small:
            four = attached(adapter, 4)
            mm.context(four, rows=per_row).__enter__()  # for as long as the model lives
            yield bench.case(
                "mmadapt", f"4 {word} mixed, same rows again", sites, four, trains=False
            )


def timm_cases(bench: Bench) -> Iterator[Case]:
    """A fused projection: q and v of timm's `qkv`, at its output and in its weight."""
    from timm.models.vision_transformer import VisionTransformer

    import mmadapt as mm

    config = bench.shape.config
    torch.manual_seed(0)
    base = VisionTransformer(
        img_size=config["image_size"],
        patch_size=config["patch_size"],
        embed_dim=config["hidden_size"],
        depth=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        num_classes=0,
        global_pool="",
    ).eval()
    yield bench.case("timm", "bare", 0, copy.deepcopy(base), base="timm")
    for port in ("out", "weight"):
        model = copy.deepcopy(base)
        at = [f"*.layers[*].attn.{role}:{port}" for role in "qv"]
        mm.attach(model, mm.LoRA(RANK), at=at)
        name = f"LoRA on q, v of fused qkv, `{port}`"
        yield bench.case("mmadapt", name, bench.shape.layers, model, base="timm")
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        return
    model: Any = get_peft_model(copy.deepcopy(base), LoraConfig(r=RANK, target_modules=["qkv"]))
    name = "LoRA on the whole fused qkv"
    yield bench.case("PEFT", name, bench.shape.layers, model.eval(), base="timm")


# -- PEFT ---------------------------------------------------------------------------------------


def peft_cases(bench: Bench, small: bool = True) -> Iterator[Case]:
    from peft import LoraConfig, get_peft_model

    sites = 2 * bench.shape.layers

    def attached(count: int = 1, model: Any = None) -> Any:
        def lora() -> Any:
            return LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["q_proj", "v_proj"])

        model = get_peft_model(bench.twin() if model is None else model, lora(), "a0")
        for index in range(1, count):
            model.add_adapter(f"a{index}", lora())
        model.set_adapter("a0")
        return model.eval()

    yield bench.case("PEFT", "LoRA on q, v", sites, attached())
    if small:
        yield bench.case("PEFT", f"LoRA, 1 of {MANY} active", sites, attached(MANY))
        merged = attached(model=bench.apart())
        merged.merge_adapter()
        yield bench.case("PEFT", "LoRA merged", 0, merged, trains=False)
    four = attached(4)
    call = functools.partial(four, bench.pixels, adapter_names=["a0", "a1", "a2", "a3"])
    yield Case("PEFT", "4 LoRA mixed in the batch", sites, four, call, trains=False)


# -- AdapterHub ---------------------------------------------------------------------------------


def adapterhub_cases(bench: Bench, small: bool = True) -> Iterator[Case]:
    import adapters
    from adapters import DoubleSeqBnConfig, LoRAConfig, SeqBnConfig
    from adapters.composition import BatchSplit

    layers, reduction = bench.shape.layers, bench.shape.reduction
    pfeiffer = SeqBnConfig(reduction_factor=reduction)
    lora = LoRAConfig(r=RANK, alpha=RANK)

    def attached(config: Any, count: int = 1) -> Any:
        model = bench.twin()
        adapters.init(model)
        for index in range(count):
            model.add_adapter(f"a{index}", config=config)
        if count > 1:
            names = [f"a{index}" for index in range(count)]
            model.train_adapter(BatchSplit(*names, batch_sizes=[1] * count))
        elif config is not None:
            model.train_adapter("a0")
        return model.eval()

    if small:
        model = attached(None, 0)
        yield bench.case("AdapterHub", "attached, none active", layers, model, trains=False)
    yield bench.case("AdapterHub", "bottleneck (Pfeiffer)", layers, attached(pfeiffer))
    if small:
        houlsby = attached(DoubleSeqBnConfig(reduction_factor=reduction))
        yield bench.case("AdapterHub", "bottlenecks (Houlsby)", 2 * layers, houlsby)
    yield bench.case("AdapterHub", "LoRA on q, v", 2 * layers, attached(lora))
    for word, config, sites in (
        ("bottlenecks (Pfeiffer)", pfeiffer, layers),
        ("LoRA", lora, 2 * layers),
    ):
        four = attached(config, 4)
        yield bench.case("AdapterHub", f"4 {word} mixed in the batch", sites, four)


# -- by hand ------------------------------------------------------------------------------------


def by_hand_cases(bench: Bench, small: bool = True) -> Iterator[Case]:
    """The least that hooks in Python can cost: the arithmetic alone, with nothing to look up."""
    if not small:
        return
    channels, width = bench.shape.config["hidden_size"], bench.shape.bottleneck

    def hooked(*ends: str, hook: Callable[..., Any]) -> tuple[Any, int]:
        model = bench.twin().requires_grad_(False)
        kept, sites = nn.ParameterList(), 0
        for name, module in list(model.named_modules()):
            if name.endswith(ends):
                made, tensors = hook()
                kept.extend(tensors)
                module.register_forward_hook(made)
                sites += 1
        model.by_hand = kept
        return model, sites

    def new(*shape: int) -> nn.Parameter:
        return nn.Parameter(torch.randn(shape) / shape[-1] ** 0.5)

    def bottleneck() -> tuple[Any, list[nn.Parameter]]:
        down, down_bias, up, up_bias = tensors = [
            new(width, channels), new(width), new(channels, width), new(channels)
        ]  # fmt: skip

        def hook(module: Any, args: Any, y: torch.Tensor) -> torch.Tensor:
            return y + F.linear(F.gelu(F.linear(y, down, down_bias)), up, up_bias)

        return hook, tensors

    def lora() -> tuple[Any, list[nn.Parameter]]:
        a, b = tensors = [new(RANK, channels), new(channels, RANK)]

        def hook(module: Any, args: Any, y: torch.Tensor) -> torch.Tensor:
            return y + F.linear(F.linear(args[0], a), b)

        return hook, tensors

    def mixed_lora() -> tuple[Any, list[nn.Parameter]]:
        a, b = tensors = [new(BATCH, channels, RANK), new(BATCH, RANK, channels)]

        def hook(module: Any, args: Any, y: torch.Tensor) -> torch.Tensor:
            return torch.baddbmm(y, torch.bmm(args[0], a), b)

        return hook, tensors

    for name, ends, hook in (
        ("bottleneck behind each MLP", (".mlp",), bottleneck),
        ("LoRA on q, v", ("q_proj", "v_proj"), lora),
        ("4 LoRA mixed, same rows again", ("q_proj", "v_proj"), mixed_lora),
    ):
        model, sites = hooked(*ends, hook=hook)
        yield bench.case("by hand", name, sites, model)


BUILDERS: dict[str, Callable[..., Iterator[Case]]] = {
    "mmadapt": mmadapt_cases,
    "PEFT": peft_cases,
    "AdapterHub": adapterhub_cases,
    "by hand": by_hand_cases,
}


def cases(libraries: list[str], shape: Shape, small: bool) -> list[Case]:
    """The bare backbone and every set-up of these libraries on it."""
    bench = Bench(shape)
    bare = bench.twin()
    found = [bench.case("bare", "forward", 0, bare, trains=False)]
    full = bench.apart()
    found.append(bench.case("bare", "full fine-tuning", 0, full))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the peers' advice is not ours to print
        for library in libraries:
            if library == "timm":
                found += timm_cases(bench)
            else:
                found += BUILDERS[library](bench, small)
    return found
