"""What AdapterHub computes, for `test_peers.py`; run in an environment of its own.

    pip install torch==2.11.0 adapters==1.3.0
    python tests/peers/make_adapterhub.py

Bottlenecks of three configurations with random non-zero weights in a tiny random CLIP vision tower:
`seq_bn` (Pfeiffer: on the sum of residual and MLP), `double_seq_bn` (Houlsby: on the outputs of
attention and MLP, before they are added) and `par_bn` (He: on the residual stream beside the MLP).
"""

from __future__ import annotations

import copy
from pathlib import Path

import adapters
import torch
import transformers
from adapters import DoubleSeqBnConfig, ParBnConfig, SeqBnConfig
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModel

CONFIG = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "image_size": 16, "patch_size": 8,
}  # fmt: skip


def main() -> None:
    torch.manual_seed(0)
    backbone = CLIPVisionModel(CLIPVisionConfig(**CONFIG)).eval()
    pixels = torch.randn(2, 3, 16, 16)
    kept = {
        f"backbone.{name.removeprefix('vision_model.')}": value.clone()
        for name, value in backbone.state_dict().items()
        if "position_ids" not in name
    }
    for name, config in {
        "seq_bn": SeqBnConfig(reduction_factor=4),
        "double_seq_bn": DoubleSeqBnConfig(reduction_factor=4),
        "par_bn": ParBnConfig(reduction_factor=4),
    }.items():
        model = copy.deepcopy(backbone)
        adapters.init(model)
        model.add_adapter("a", config=config)
        model.set_active_adapters("a")
        model.eval()
        for key, parameter in model.named_parameters():
            if "adapters.a." in key:
                torch.nn.init.normal_(parameter, std=0.3)
                kept[f"{name}.{key.removeprefix('vision_model.')}"] = parameter.detach().clone()
        with torch.no_grad():
            kept[f"{name} output"] = model(pixels).last_hidden_state.clone()
    kept["pixels"] = pixels
    versions = (
        f"adapters {adapters.__version__}, transformers {transformers.__version__}, "
        f"{torch.__version__}"
    )
    path = Path(__file__).resolve().parent / "adapterhub_bottleneck.safetensors"
    save_file({k: v.contiguous() for k, v in kept.items()}, path, {"made with": versions})
    print(path.name, path.stat().st_size, versions)
    print(*[f"{key} {tuple(value.shape)}" for key, value in kept.items() if "bn." in key], sep="\n")


if __name__ == "__main__":
    main()
