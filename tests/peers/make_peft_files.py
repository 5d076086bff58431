"""LoRA files that PEFT writes and what it computes with them, for `test_interop_peft.py`.

Run in an environment of its own, with a transformers whose modules have their former names:

    pip install torch==2.11.0 transformers==4.57.6 peft==0.21.2 open_clip_torch==3.3.0 timm==1.0.31
    python tests/peers/make_peft_files.py

Tiny random backbones with LoRAs of random weights: the folders as `save_pretrained` writes them,
zipped, in `peft/`; backbones, inputs and outputs in `peft_files.safetensors`.
"""

from __future__ import annotations

import copy
from typing import Any

import open_clip
import peft
import timm
import torch
import transformers
from kept import AST, HERE, IMAGE, SIZE, TIMM, keep, off_their_starts, zipped
from open_clip.transformer import VisionTransformer
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    ASTConfig,
    ASTForAudioClassification,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTForImageClassification,
)

OLD = ["query", "value", "intermediate.dense", "output.dense"]
CASES: dict[str, LoraConfig] = {
    "vit": LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=[*OLD, "projection"],
        rank_pattern={"layer.0.intermediate.dense": 2},
        alpha_pattern={"value": 10},
        use_rslora=True,
        modules_to_save=["classifier"],
    ),
    "ast": LoraConfig(r=2, lora_alpha=6, target_modules=OLD, bias="all"),
    "dinov2": LoraConfig(r=2, lora_alpha=6, target_modules=["query", "fc1"]),
    "clip_vision": LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "v_proj", "fc1"]),
    "open_clip": LoraConfig(r=2, lora_alpha=6, target_modules=["attn", "c_fc", "conv1"]),
    "timm": LoraConfig(r=2, lora_alpha=6, target_modules=["qkv", "fc1"]),
}
#: what is to be refused by name
REFUSED: dict[str, LoraConfig] = {
    "dora": LoraConfig(r=2, target_modules=["q_proj"], use_dora=True),
    "pissa": LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa"),
}


def backbones() -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {
        "vit": ViTForImageClassification(ViTConfig(**SIZE, **IMAGE, num_labels=3)),
        "ast": ASTForAudioClassification(ASTConfig(**SIZE, **AST, num_labels=3)),
        "dinov2": Dinov2Model(Dinov2Config(**SIZE, **IMAGE, mlp_ratio=2)),
        "clip_vision": CLIPVisionModel(CLIPVisionConfig(**SIZE, **IMAGE)),
        "open_clip": VisionTransformer(16, 8, 16, 2, 2, 2.0, output_dim=8),
        "timm": timm.create_model(**TIMM),
    }
    return {kind: off_their_starts(model) for kind, model in found.items()}


def outputs(model: Any, batch: Tensor) -> Tensor:
    with torch.no_grad():
        given = model(batch)
    if isinstance(given, Tensor):
        return given
    return given.logits if "logits" in given else given.last_hidden_state


def adapted(bare: nn.Module, config: LoraConfig) -> Any:
    model = get_peft_model(copy.deepcopy(bare), config).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.2 * torch.randn(parameter.shape))
    return model


def main() -> None:
    torch.manual_seed(0)
    folder = HERE / "peft"
    folder.mkdir(exist_ok=True)
    pixels, spectra = torch.randn(2, 3, 16, 16), torch.randn(2, 24, 16)
    kept: dict[str, Tensor] = {}
    bare = backbones()
    for kind, config in CASES.items():
        batch = spectra if kind == "ast" else pixels
        kept |= {f"{kind} backbone.{key}": value for key, value in bare[kind].state_dict().items()}
        kept |= {f"{kind} batch": batch, f"{kind} bare": outputs(bare[kind], batch)}
        model = adapted(bare[kind], config)
        kept[kind] = outputs(model.base_model.model, batch)
        zipped(model.save_pretrained, folder / f"{kind}.zip")
    for word, config in REFUSED.items():
        zipped(adapted(bare["clip_vision"], config).save_pretrained, folder / f"{word}.zip")
    versions = (
        f"peft {peft.__version__}, transformers {transformers.__version__}, open_clip "
        f"{open_clip.__version__}, timm {timm.__version__}, {torch.__version__}"
    )
    keep(kept, "peft_files", versions, folder)


if __name__ == "__main__":
    main()
