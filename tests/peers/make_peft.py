"""What PEFT computes, for `test_peers.py`; run in an environment of its own.

    pip install torch==2.11.0 transformers==5.23.0 peft==0.21.2
    python tests/peers/make_peft.py

Random backbone, random non-zero LoRA weights on q and v of a tiny ViT; plain and rank-stabilised.
"""

from __future__ import annotations

from pathlib import Path

import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import ViTConfig, ViTModel

CONFIG = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "image_size": 16, "patch_size": 8,
}  # fmt: skip


def main() -> None:
    torch.manual_seed(0)
    backbone = ViTModel(ViTConfig(**CONFIG)).eval()
    pixels = torch.randn(2, 3, 16, 16)
    kept = {f"backbone.{name}": value.clone() for name, value in backbone.state_dict().items()}
    model = get_peft_model(
        backbone, LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"])
    ).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
            role = name.removeprefix("base_model.model.").replace(".default.weight", "")
            kept[f"lora.{role}"] = parameter.detach().clone()
    with torch.no_grad():
        kept["output"] = model(pixels).last_hidden_state.clone()
        for module in model.modules():  # alpha / sqrt(rank) instead of alpha / rank
            if hasattr(module, "scaling") and isinstance(module.scaling, dict):
                module.scaling["default"] = 6 / 4**0.5
        kept["output rank-stabilised"] = model(pixels).last_hidden_state.clone()
    kept["pixels"] = pixels
    versions = (
        f"peft {peft.__version__}, transformers {transformers.__version__}, {torch.__version__}"
    )
    path = Path(__file__).resolve().parent / "peft_lora.safetensors"
    save_file({k: v.contiguous() for k, v in kept.items()}, path, {"made with": versions})
    print(path.name, path.stat().st_size, versions)


if __name__ == "__main__":
    main()
