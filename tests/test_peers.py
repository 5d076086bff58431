"""Equality with other libraries on the same random weights, from fixtures they computed.

The scripts that made the fixtures stand beside them in `peers/`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import mmadapt as mm

PEERS = Path(__file__).parent / "peers"
CONFIG = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "image_size": 16, "patch_size": 8,
}  # fmt: skip


def part(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def put(attachment: mm.Attachment, site: str, **tensors: torch.Tensor) -> None:
    layer = attachment.layers[f"0/{site}"]
    with torch.no_grad():
        for name, value in tensors.items():
            getattr(layer, name).copy_(value)


def furthest(model: Any, pixels: torch.Tensor, expected: torch.Tensor) -> float:
    with torch.no_grad():
        return float((model(pixels).last_hidden_state - expected).abs().max())


@pytest.mark.parametrize("stabilised", [False, True])
def test_lora_equals_peft(stabilised: bool) -> None:
    from transformers import ViTConfig, ViTModel

    saved = load_file(PEERS / "peft_lora.safetensors")
    model = ViTModel(ViTConfig(**CONFIG)).eval()
    model.load_state_dict(part(saved, "backbone."))
    expected = saved["output rank-stabilised" if stabilised else "output"]
    attachment = mm.attach(model, mm.LoRA(4, alpha=6.0, rank_stabilized=stabilised))
    assert furthest(model, saved["pixels"], expected) > 0.1  # the adapters do something
    lora = part(saved, "lora.")
    for name in [name for name in lora if name.endswith("lora_A")]:
        index, role = re.findall(r"layers\.(\d+)\.attention\.(\w)_proj", name)[0]
        put(
            attachment,
            f"vision.layers[{index}].attn.{role}:out",
            a=lora[name],
            b=lora[name.replace("lora_A", "lora_B")],
        )
    assert furthest(model, saved["pixels"], expected) < 3e-6


@pytest.mark.parametrize(
    ("config", "adapter", "places"),
    [
        ("seq_bn", mm.Bottleneck(8, activation="relu"), {"output_adapters": "vision.layers[{}]"}),
        (
            "double_seq_bn",
            mm.Bottleneck(8, activation="silu"),
            {
                "attention_adapters": "vision.layers[{}].attn",
                "output_adapters": "vision.layers[{}].mlp",
            },
        ),
        ("par_bn", mm.Bottleneck.parallel(8), {"output_adapters": "vision.layers[{}].mlp"}),
    ],
)
def test_bottlenecks_equal_adapterhub(config: str, adapter: Any, places: dict[str, str]) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    saved = load_file(PEERS / "adapterhub_bottleneck.safetensors")
    model = CLIPVisionModel(CLIPVisionConfig(**CONFIG)).eval()
    model.load_state_dict(part(saved, "backbone."))
    expected = saved[f"{config} output"]
    attachment = mm.attach(model, adapter, at=[site.format("*") for site in places.values()])
    assert furthest(model, saved["pixels"], expected) > 0.1
    theirs = part(saved, f"{config}.")
    for index in range(CONFIG["num_hidden_layers"]):
        for word, site in places.items():
            ours = {
                "down": "adapter_down.0.weight",
                "down_bias": "adapter_down.0.bias",
                "up": "adapter_up.weight",
                "up_bias": "adapter_up.bias",
            }
            found = {
                mine: next(
                    v
                    for k, v in theirs.items()
                    if f"layers.{index}." in k and word in k and k.endswith(f".{name}")
                )
                for mine, name in ours.items()
            }
            put(attachment, f"{site.format(index)}:out", **found)
    assert furthest(model, saved["pixels"], expected) < 3e-6
