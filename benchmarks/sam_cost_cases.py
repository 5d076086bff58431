"""The SAMs and the ways to adapt them that `sam_cost.py` compares."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import mmadapt as mm

#: channels, blocks, heads and the blocks that attend over the whole grid, as Meta published them
SIZES: dict[str, tuple[int, int, int, tuple[int, ...]]] = {
    "vit_b": (768, 12, 12, (2, 5, 8, 11)),
    "vit_l": (1024, 24, 16, (5, 11, 17, 23)),
    "vit_h": (1280, 32, 16, (7, 15, 23, 31)),
}
#: what the clock is set on: channels, blocks, heads, global blocks and pixels; windows fit exactly
REDUCED = (256, 6, 4, (2, 5), 448)
#: whose images are encoded once: vit_b's encoder on smaller images
VIT_B = (768, 12, 12, (2, 5, 8, 11), 448)
#: for tests
TINY = (32, 2, 2, (1,), 64)
#: pixels and precision of the memory tables
COLUMNS = [
    (1024, torch.float32),
    (1024, torch.bfloat16),
    (512, torch.float32),
    (256, torch.float32),
]
SLICES = 8
RANK = 8


@dataclass(frozen=True)
class Way:
    """One way to adapt the image encoder."""

    name: str
    adapter: Any = None
    at: Any = None
    #: slices that one volume has; 1 for single images
    depth: int = 1
    #: "frozen" beside the adapter, or "trained"
    backbone: str = "frozen"

    def attach(self, model: Any) -> None:
        """Adapt the model."""
        model.requires_grad_(self.backbone == "trained")
        at = self.at
        if at is LAST:
            at = f"vision.layers[-{len(model.image_encoder.blocks) // 3}:].mlp"
        if self.adapter is not None:
            mm.attach(model, self.adapter, at=at)

    @contextlib.contextmanager
    def attached(self, model: Any) -> Iterator[None]:
        """Inside, the model is adapted and told how many slices a volume has."""
        self.attach(model)
        try:
            with (
                mm.context(model, depth=self.depth) if self.depth > 1 else contextlib.nullcontext()
            ):
                yield
        finally:
            if self.adapter is not None:
                mm.detach(model)


MLP = "vision.layers[*].mlp"
QV = ("vision.layers[*].attn.q", "vision.layers[*].attn.v")
PROJECTION = "vision.layers[*].attn.o"
#: the last third
LAST = "last"
WAYS = [
    Way("bottleneck 64 behind each MLP", mm.Bottleneck(64), MLP),
    Way("bottleneck 64, last third of the blocks", mm.Bottleneck(64), LAST),
    Way(f"LoRA {RANK} on q, v", mm.LoRA(RANK), QV),
    Way("MedSA, slices apart", mm.MedSA(decoder="frozen")),
    Way("ConvDepth 32", mm.ConvDepth(32), depth=SLICES),
    Way("MedSA with depth", mm.MedSA(decoder="frozen", depth=True), depth=SLICES),
    Way("everything trained", backbone="trained"),
]


def published(size: str, pixels: int) -> nn.Module:
    """A SAM of segment_anything with a published encoder, for square images of so many pixels."""
    from segment_anything.modeling import (
        ImageEncoderViT,
        MaskDecoder,
        PromptEncoder,
        Sam,
        TwoWayTransformer,
    )

    width, blocks, heads, whole = SIZES[size]
    encoder = ImageEncoderViT(
        img_size=pixels,
        embed_dim=width,
        depth=blocks,
        num_heads=heads,
        norm_layer=functools.partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=14,
        global_attn_indexes=whole,
    )
    transformer = TwoWayTransformer(depth=2, embedding_dim=256, num_heads=8, mlp_dim=2048)
    grid = (pixels // 16, pixels // 16)
    prompts = PromptEncoder(256, grid, (pixels, pixels), 16)
    return Sam(encoder, prompts, MaskDecoder(transformer_dim=256, transformer=transformer)).eval()


def reduced(shape: tuple = REDUCED) -> Any:
    """transformers' SAM with random weights, smaller than any published one."""
    from transformers import SamConfig, SamModel

    width, blocks, heads, whole, pixels = shape
    vision = {
        "hidden_size": width,
        "mlp_dim": 4 * width,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "global_attn_indexes": list(whole),
        "image_size": pixels,
        "initializer_range": 0.02,  # its default makes an encoder that is constant
    }
    torch.manual_seed(0)
    return SamModel(
        SamConfig(vision_config=vision, prompt_encoder_config={"image_size": pixels})
    ).eval()


@contextlib.contextmanager
def checkpointed(encoder: nn.Module) -> Iterator[None]:
    """Inside, backward recomputes every block of segment_anything's encoder but the last one."""

    class Recomputed(nn.Module):
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.__dict__["block"] = block

        def forward(self, x: Tensor) -> Any:
            from torch.utils.checkpoint import checkpoint

            return checkpoint(self.__dict__["block"], x, use_reentrant=False)

    blocks = list(encoder.blocks)  # type: ignore[arg-type]
    recomputed = [Recomputed(block) for block in blocks[:-1]]
    encoder._modules["blocks"] = nn.ModuleList([*recomputed, blocks[-1]])
    try:
        yield
    finally:
        encoder._modules["blocks"] = nn.ModuleList(blocks)


@dataclass
class Case:
    """One set-up to time."""

    library: str
    name: str
    model: nn.Module
    call: Callable[[], Tensor]

    @property
    def key(self) -> str:
        return f"{self.library}: {self.name}"

    def forward(self) -> None:
        with torch.no_grad():
            self.call()

    @functools.cached_property
    def trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def step(self) -> None:
        """Forward and backward, without an optimiser."""
        for parameter in self.trained:
            parameter.grad = None
        self.call().square().mean().backward()


def timed(shape: tuple, slices: int) -> Iterator[Case]:
    """Set-ups on one volume of so many slices; PEFT's where it can be imported."""
    pixels = torch.randn(
        slices, 3, shape[-1], shape[-1], generator=torch.Generator().manual_seed(1)
    )

    def call(model: Any, context: Any = contextlib.nullcontext) -> Tensor:
        with context():
            return model.vision_encoder(pixels).last_hidden_state

    for name, trains in (("forward", False), ("everything trained", True)):
        model = reduced(shape).requires_grad_(trains)
        yield Case("plain", name, model, functools.partial(call, model))
    ways = [way for way in WAYS if way.adapter is not None and way.at is not LAST]
    ways.append(Way(f"LoRA {RANK} on the output projection", mm.LoRA(RANK), PROJECTION))
    for way in ways:
        model = reduced(shape)
        way.attach(model)
        inside = functools.partial(mm.context, model, depth=slices) if way.depth > 1 else None
        yield Case(
            "mmadapt",
            way.name,
            model,
            functools.partial(call, model, inside or contextlib.nullcontext),
        )
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        return
    for name, module in ((f"LoRA {RANK} on the whole fused qkv", "qkv"),
                         (f"LoRA {RANK} on the output projection", "proj")):  # fmt: skip
        target = rf"vision_encoder\.layers\.\d+\.attn\.{module}"
        model = get_peft_model(
            reduced(shape), LoraConfig(r=RANK, lora_alpha=RANK, target_modules=target)
        )
        yield Case("PEFT", name, model, functools.partial(call, model.base_model.model))
