"""AdapterHub's files, as it wrote them, against what it computed with them.

`peers/make_adapterhub_files.py` made both.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import mmadapt as mm

PEERS = Path(__file__).parent / "peers"
FILES = PEERS / "adapterhub"
SIZE = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip
IMAGE = {"image_size": 16, "patch_size": 8}
TEXT = {
    "vocab_size": 24, "max_position_embeddings": 6, "bos_token_id": 21, "eos_token_id": 22,
    "pad_token_id": 23,
}  # fmt: skip
WHISPER = {
    "vocab_size": 24, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24, "num_mel_bins": 4, "max_source_positions": 8, "max_target_positions": 8,
    "pad_token_id": 1, "bos_token_id": 1, "eos_token_id": 1, "decoder_start_token_id": 1,
}  # fmt: skip
CONFIGS = ("seq", "double", "par", "plus", "norms", "lora")


@pytest.fixture(scope="module")
def saved() -> dict[str, Tensor]:
    return load_file(PEERS / "adapterhub_files.safetensors")


def part(saved: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in saved.items() if k.startswith(prefix)}


def backbone(kind: str, saved: dict[str, Tensor], **more: Any) -> Any:
    """Today's class of transformers with the weights that AdapterHub's release had."""
    import transformers as t

    if kind == "vit":
        model: nn.Module = t.ViTModel(t.ViTConfig(**SIZE, **IMAGE))
    elif kind == "clip":
        vision, text = {**SIZE, **IMAGE}, {**SIZE, **TEXT}
        config = t.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
        model = t.CLIPModel(config)
    else:
        model = t.WhisperModel(t.WhisperConfig(**WHISPER))
    fill(model, part(saved, f"{kind} backbone."))
    return model.eval()


def fill(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load what transformers 4 called by its old names."""
    for old, new in (
        (r"encoder\.layer\.", "layers."),
        (r"attention\.attention\.(\w)\w+", r"attention.\1_proj"),
        (r"attention\.output\.dense", "attention.o_proj"),
        (r"intermediate\.dense", "mlp.fc1"),
        (r"(layers\.\d+)\.output\.dense", r"\1.mlp.fc2"),
    ):
        weights = {re.sub(old, new, key): value for key, value in weights.items()}
    unplaced = model.load_state_dict(weights, strict=False)
    assert not unplaced.unexpected_keys
    assert all("position_ids" in key or "classifier" in key for key in unplaced.missing_keys)


def outputs(kind: str, model: Any, saved: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        given = model(**part(saved, f"{kind} batch."))
    if "logits" in given:
        return given.logits
    if "image_embeds" in given:
        return torch.stack([given.text_embeds, given.image_embeds])
    return given.last_hidden_state


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


# -- what it computes -------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("kind", ["vit", "clip", "whisper"])
def test_an_adapter_computes_what_adapterhub_did(
    kind: str, config: str, saved: dict[str, Tensor]
) -> None:
    model = backbone(kind, saved)
    bare = saved[f"{kind} bare"]
    assert distance(outputs(kind, model, saved), bare) < 5e-6
    attachment = mm.load_adapter(model, FILES / f"{kind}_{config}.zip")
    assert attachment.name == "mine"
    expected = saved[f"{kind} {config}"]
    assert distance(bare, expected) > 0.05
    assert distance(outputs(kind, model, saved), expected) < 5e-6
    mm.detach(model)
    assert distance(outputs(kind, model, saved), bare) < 5e-6
