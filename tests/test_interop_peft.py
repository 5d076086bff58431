"""PEFT's LoRA files, as it wrote them, against what it computed with them, and files for it.

`peers/make_peft_files.py` made both, under a transformers whose modules have their former names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from peer_files import IMAGE, PEERS, SIZE, distance, fill, outputs, part
from safetensors.torch import load_file
from torch import Tensor, nn

import mmadapt as mm

FILES = PEERS / "peft"
AST = {
    "max_length": 24,
    "num_mel_bins": 16,
    "patch_size": 8,
    "frequency_stride": 8,
    "time_stride": 8,
}


@pytest.fixture(scope="module")
def saved() -> dict[str, Tensor]:
    return load_file(PEERS / "peft_files.safetensors")


def backbone(kind: str, saved: dict[str, Tensor]) -> Any:
    """Today's class with the weights PEFT saw."""
    import timm
    import transformers as t
    from open_clip.transformer import VisionTransformer

    makers: dict[str, Callable[[], nn.Module]] = {
        "vit": lambda: t.ViTForImageClassification(t.ViTConfig(**SIZE, **IMAGE, num_labels=3)),
        "ast": lambda: t.ASTForAudioClassification(t.ASTConfig(**SIZE, **AST, num_labels=3)),
        "dinov2": lambda: t.Dinov2Model(t.Dinov2Config(**SIZE, **IMAGE, mlp_ratio=2)),
        "clip_vision": lambda: t.CLIPVisionModel(t.CLIPVisionConfig(**SIZE, **IMAGE)),
        "open_clip": lambda: VisionTransformer(16, 8, 16, 2, 2, 2.0, output_dim=8),
        "timm": lambda: timm.create_model(
            "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2,
            num_classes=3,
        ),
    }  # fmt: skip
    return fill(makers[kind](), part(saved, f"{kind} backbone."))


# -- what it computes -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["vit", "ast", "dinov2", "clip_vision", "open_clip", "timm"])
def test_a_lora_computes_what_peft_did(kind: str, saved: dict[str, Tensor]) -> None:
    model, batch = backbone(kind, saved), saved[f"{kind} batch"]
    assert distance(outputs(model, batch), saved[f"{kind} bare"]) < 5e-6
    assert distance(saved[f"{kind} bare"], saved[kind]) > 0.1
    mm.load_adapter(model, FILES / f"{kind}.zip", name="theirs")
    assert distance(outputs(model, batch), saved[kind]) < 5e-6
    mm.detach(model)
    assert distance(outputs(model, batch), saved[f"{kind} bare"]) < 5e-6
