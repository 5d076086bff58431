"""AdapterHub's files, as it wrote them, against what it computed with them.

`peers/make_adapterhub_files.py` made both.
"""

from __future__ import annotations

from typing import Any

import pytest
from peer_files import IMAGE, PEERS, SIZE, distance, fill, outputs, part
from safetensors.torch import load_file
from torch import Tensor, nn

import mmadapt as mm

FILES = PEERS / "adapterhub"
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


def backbone(kind: str, saved: dict[str, Tensor]) -> Any:
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
    return fill(model, part(saved, f"{kind} backbone."))


def outputs_of(kind: str, model: Any, saved: dict[str, Tensor]) -> Tensor:
    return outputs(model, **part(saved, f"{kind} batch."))


# -- what it computes -------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("kind", ["vit", "clip", "whisper"])
def test_an_adapter_computes_what_adapterhub_did(
    kind: str, config: str, saved: dict[str, Tensor]
) -> None:
    model = backbone(kind, saved)
    bare = saved[f"{kind} bare"]
    assert distance(outputs_of(kind, model, saved), bare) < 5e-6
    attachment = mm.load_adapter(model, FILES / f"{kind}_{config}.zip")
    assert attachment.name == "mine"
    expected = saved[f"{kind} {config}"]
    assert distance(bare, expected) > 0.05
    assert distance(outputs_of(kind, model, saved), expected) < 5e-6
    mm.detach(model)
    assert distance(outputs_of(kind, model, saved), bare) < 5e-6
