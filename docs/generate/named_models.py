"""Models of known sizes, without their numbers: what methods cost there is counted, not stated."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import mmadapt as mm
from mmadapt.adapter import Adapter
from mmadapt.errors import MmadaptError


def _of(name: str, config: str, **facts: Any) -> Callable[[], Any]:
    """transformers' model of this class in its configuration's own, published size."""

    def build() -> Any:
        import torch
        import transformers

        with torch.device("meta"):
            return getattr(transformers, name)(getattr(transformers, config)(**facts))

    return build


#: what people call it, with transformers' class -> how to build it
MODELS: dict[str, Callable[[], Any]] = {
    "ViT-B/16 (`ViTModel`)": _of("ViTModel", "ViTConfig"),
    "ViT-B/16, 1,000 classes (`ViTForImageClassification`)": _of(
        "ViTForImageClassification", "ViTConfig", num_labels=1000
    ),
    "CLIP ViT-B/32 (`CLIPModel`)": _of("CLIPModel", "CLIPConfig"),
    "SAM ViT-B (`SamModel`)": _of("SamModel", "SamConfig"),
    "BERT base (`BertForSequenceClassification`)": _of(
        "BertForSequenceClassification", "BertConfig"
    ),
    "Llama 7B (`LlamaForCausalLM`)": _of("LlamaForCausalLM", "LlamaConfig"),
    "AST base, 527 classes (`ASTForAudioClassification`)": _of(
        "ASTForAudioClassification", "ASTConfig", num_labels=527
    ),
    "wav2vec 2.0 base (`Wav2Vec2ForCTC`)": _of("Wav2Vec2ForCTC", "Wav2Vec2Config"),
}


@functools.cache
def model(name: str) -> Any:
    """The model of this name, on no device."""
    return MODELS[name]()


def costs(adapter: Adapter) -> list[tuple[str, int, int, float]]:
    """(model, sites, trained numbers, percent of the model's own) where the adapter finds its sites."""
    found = []
    for name in MODELS:
        try:
            plan = mm.plan(model(name), adapter)
        except MmadaptError:
            continue
        trained = sum(record["parameters"] for record in plan.records())
        sites = sum(record["site"] != "shared" for record in plan.records())
        own = sum(parameter.numel() for parameter in model(name).parameters())
        found.append((name, sites, trained, 100 * trained / own))
    return found
