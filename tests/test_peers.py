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


LLAMA = {
    "vocab_size": 24, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3,
    "num_attention_heads": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def texts(padding: str) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 24, (2, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padding == "left":
        mask[0, :3] = 0
    if padding == "right":
        mask[0, -3:] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("key_heads", [4, 2], ids=["each its own", "grouped queries"])
@pytest.mark.parametrize("situation", ["none", "left", "right", "cache"])
def test_zero_init_attention_equals_peft(situation: str, key_heads: int, bits: int) -> None:
    from test_backbones_llama import step_by_step
    from transformers import LlamaConfig, LlamaForCausalLM

    saved = part(load_file(PEERS / "peft_prompt.safetensors"), f"{key_heads} ")
    dtype = torch.float64 if bits == 64 else torch.float32
    model: Any = LlamaForCausalLM(LlamaConfig(**LLAMA, num_key_value_heads=key_heads)).eval()
    model.load_state_dict(part(saved, "backbone."))
    model.to(dtype)
    adapter = mm.LlamaAdapter(5, layers=2, gate="layer", activation="identity")
    attachment = mm.attach(model, adapter)
    theirs = part(saved, "prompt.")
    for index in (1, 2):
        put(
            attachment,
            f"text.layers[{index}].attn.heads:in",
            prompt=theirs[f"layers.{index}.adaption_prompt"][0],
            gate=theirs[f"layers.{index}.adaption_gate"],
        )
    batch = texts("left" if situation == "cache" else situation)
    seen = batch["attention_mask"].bool()

    def logits() -> torch.Tensor:
        with torch.no_grad():
            if situation == "cache":
                return step_by_step(model, batch, 4)[seen]
            return model(**batch, use_cache=False).logits[seen]

    expected = saved[f"{bits} {situation}"][seen]
    with mm.disabled(model):
        assert float((logits() - expected).abs().max()) > 0.1  # the prompts do something
    assert float((logits() - expected).abs().max()) <= (0.0 if bits == 64 else 2e-6)
