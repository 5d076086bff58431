"""Adapter files that AdapterHub writes and what it computes with them, for `test_interop_adapterhub.py`.

Run in an environment of its own:

    pip install torch==2.11.0 adapters==1.3.0
    python tests/peers/make_adapterhub_files.py

Tiny random ViT, CLIP and Whisper, each with six adapters of random weights: the folders as
`save_adapter` writes them, zipped, in `adapterhub/`; backbones, inputs and outputs in
`adapterhub_files.safetensors`.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import adapters
import torch
import transformers
from adapters import (
    AdapterPlusConfig,
    DoubleSeqBnConfig,
    LoRAConfig,
    ParBnConfig,
    SeqBnConfig,
    ViTAdapterModel,
)
from kept import HERE, IMAGE, SIZE, TEXT, WHISPER, keep, off_their_starts, zipped
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
    WhisperConfig,
    WhisperModel,
)

CONFIGS: dict[str, Any] = {
    "seq": SeqBnConfig(reduction_factor=4, mh_adapter=True),
    "double": DoubleSeqBnConfig(reduction_factor=4, cross_adapter=True),
    "par": ParBnConfig(reduction_factor=4, mh_adapter=True, scaling="learned"),
    "plus": AdapterPlusConfig(reduction_factor=4),
    "norms": SeqBnConfig(reduction_factor=4, ln_before=True, ln_after=True, scaling=0.5),
    "lora": LoRAConfig(
        r=2, alpha=6, attn_matrices=["q", "k", "v"], intermediate_lora=True, output_lora=True
    ),
}
#: what is to be refused by name, on ViT
REFUSED: dict[str, Any] = {
    "gated": SeqBnConfig(reduction_factor=4, use_gating=True),
    "phm": adapters.CompacterPlusPlusConfig(reduction_factor=4, phm_dim=2),
    "ia3": adapters.IA3Config(),
    "dora": adapters.DoRAConfig(r=2),
    "prefix": adapters.PrefixTuningConfig(flat=True, prefix_length=2),
}


def backbones() -> dict[str, nn.Module]:
    clip = CLIPConfig(
        text_config={**SIZE, **TEXT}, vision_config={**SIZE, **IMAGE}, projection_dim=8
    )
    found: dict[str, nn.Module] = {
        "vit": ViTModel(ViTConfig(**SIZE, **IMAGE)),
        "clip": CLIPModel(clip),
        "whisper": WhisperModel(WhisperConfig(**WHISPER)),
    }
    return {kind: off_their_starts(model) for kind, model in found.items()}


def outputs(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        given = model(**batch)
    if "logits" in given:
        return given.logits
    if "image_embeds" in given:
        return torch.stack([given.text_embeds, given.image_embeds])
    return given.last_hidden_state


def add(model: Any, name: str, config: Any) -> None:
    model.add_adapter(name, config=config)
    model.set_active_adapters(name)
    model.eval()
    for key, parameter in model.named_parameters():
        if f".{name}." in key:
            parameter.data.add_(0.2 * torch.randn(parameter.shape))


def main() -> None:
    torch.manual_seed(0)
    folder = HERE / "adapterhub"
    folder.mkdir(exist_ok=True)
    ids = torch.randint(0, 20, (2, 6))
    ids[:, -1] = TEXT["eos_token_id"]
    pixels = torch.randn(2, 3, 16, 16)
    batches = {
        "vit": {"pixel_values": pixels},
        "clip": {"input_ids": ids, "pixel_values": pixels},
        "whisper": {
            "input_features": torch.randn(2, 4, 16),
            "decoder_input_ids": torch.randint(2, 20, (2, 5)),
        },
    }
    kept: dict[str, Tensor] = {}
    for kind, bare in backbones().items():
        kept |= {
            f"{kind} backbone.{k}": v
            for k, v in bare.state_dict().items()
            if "position_ids" not in k
        }
        kept |= {f"{kind} batch.{k}": v for k, v in batches[kind].items()}
        kept[f"{kind} bare"] = outputs(bare, batches[kind])
        for word, config in CONFIGS.items():
            model = copy.deepcopy(bare)
            adapters.init(model)
            add(model, "mine", config)
            kept[f"{kind} {word}"] = outputs(model, batches[kind])
            plain = {} if word == "norms" else {"use_safetensors": True}  # it shares tensors
            zipped(
                partial(model.save_adapter, adapter_name="mine", **plain),
                folder / f"{kind}_{word}.zip",
            )
    config = ViTConfig(**SIZE, **IMAGE, num_labels=3)
    vit = {k[13:]: v for k, v in kept.items() if k.startswith("vit backbone.")}
    flexible = ViTAdapterModel(config)
    missing = flexible.vit.load_state_dict(vit, strict=False)
    assert not missing.unexpected_keys and all("prompt" in key for key in missing.missing_keys)
    add(flexible, "pets", SeqBnConfig(reduction_factor=4))
    labels = {0: "cat", 1: "dog", 2: "newt"}
    flexible.add_image_classification_head("pets", num_labels=3, layers=1, id2label=labels)
    kept["vit pets"] = outputs(flexible.eval(), batches["vit"])
    zipped(partial(flexible.save_adapter, adapter_name="pets"), folder / "vit_pets.zip")
    fixed = ViTForImageClassification(config)
    fixed.vit.load_state_dict({k: v for k, v in vit.items() if "pooler" not in k})
    adapters.init(fixed)
    add(fixed, "own", LoRAConfig(r=2, alpha=2))
    kept["vit own"] = outputs(fixed, batches["vit"])
    zipped(partial(fixed.save_adapter, adapter_name="own"), folder / "vit_own.zip")
    for word, refused in REFUSED.items():
        model = backbones()["vit"]
        adapters.init(model)
        model.add_adapter("mine", config=refused)
        zipped(partial(model.save_adapter, adapter_name="mine"), folder / f"vit_{word}.zip")
    versions = (
        f"adapters {adapters.__version__}, transformers {transformers.__version__}, "
        f"{torch.__version__}"
    )
    keep(kept, "adapterhub_files", versions, folder)


if __name__ == "__main__":
    main()
