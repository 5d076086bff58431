"""A zero-shot classifier: class names and templates turned into the rows of a cosine head.

Radford et al. 2021, Learning Transferable Visual Models From Natural Language Supervision,
arXiv:2103.00020
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmadapt.core.backbone import Backbone, unwrap
from mmadapt.errors import BackboneError, DataError
from mmadapt.tasks.few_shot.data import check_names


class CosineHead(nn.Module):
    """scale · cos(features, weight) + bias for features (B, D) of any length and weight (K, D)."""

    weight: Tensor

    def __init__(self, weight: Tensor, scale: float, bias: float = 0.0) -> None:
        super().__init__()
        self.register_buffer("weight", F.normalize(weight, dim=-1))
        self.scale = scale
        self.bias = bias

    def forward(self, features: Tensor) -> Tensor:
        unit = F.normalize(features, dim=-1)
        return self.scale * F.linear(unit, self.weight.to(unit.dtype)) + self.bias


class ZeroShotClassifier(nn.Module):
    """Image embeddings (B, D) to logits (B, K); `classify` takes images.

    Its one site is `logits`, where cache methods such as `TipAdapter` attach. The backbone is not a
    part of it: adapters inside the backbone act on the embeddings it is given.
    """

    backbone: Backbone

    def __init__(self, backbone: Backbone, head: CosineHead, names: tuple[str, ...]) -> None:
        super().__init__()
        self.head = head
        self.names = names
        self.__dict__["backbone"] = backbone  # neither a sub-module nor in the state dict

    def forward(self, features: Tensor) -> Tensor:
        return self.head(features)

    @torch.no_grad()
    def classify(self, images: Any) -> list[str]:
        """The most likely class name of each image (PIL, or uint8 arrays (H, W, 3))."""
        from mmadapt.tasks.few_shot.features import embed

        logits = self(embed(self.backbone, images))
        return [self.names[index] for index in logits.argmax(1).tolist()]

    def __repr__(self) -> str:
        return (
            f"ZeroShotClassifier({len(self.names)} classes, {self.head.weight.shape[1]} features)"
        )


def as_backbone(m: Any) -> Backbone:
    """A backbone with what this task needs: both encoders, preprocessing and a tokenizer."""
    if not isinstance(m, Backbone):
        raise BackboneError(
            f"few_shot needs a Backbone with preprocess and tokenize, got {type(m).__name__}",
            "mmadapt.Backbone(model=model, preprocess=…, tokenize=…)",
        )
    _, anatomy, _ = unwrap(m)
    missing = [
        *(f"an {kind} encoder" for kind in ("image", "text") if kind not in anatomy.encode),
        *(word for word in ("preprocess", "tokenize") if getattr(m, word) is None),
    ]
    if missing:
        raise BackboneError(
            f"few_shot needs {', '.join(missing)}, which {m!r} lacks",
            "use a contrastive backbone such as tiny/clip",
        )
    return m


@torch.no_grad()
def zero_shot(
    m: Backbone, names: Sequence[str], templates: Sequence[str] = ("a photo of a {}",)
) -> ZeroShotClassifier:
    """Build the classifier: each class is the mean, renormalised, of its unit template embeddings.

    Templates hold one "{}". Every active adapter of the text tower takes part.
    """
    backbone = as_backbone(m)
    names, templates = tuple(names), tuple(templates)
    check_names(names)
    for template in templates:
        if not isinstance(template, str) or template.count("{}") != 1:
            raise DataError(
                f"template {template!r} does not hold one '{{}}'", 'for example "a photo of a {}"'
            )
    if not templates:
        raise DataError("no template was given", 'for example ("a photo of a {}",)')
    model, anatomy, _ = unwrap(backbone)
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        total = torch.zeros(())
        for template in templates:
            tokens = _tokens(backbone, [template.format(name.replace("_", " ")) for name in names])
            embeddings = anatomy.encode["text"](model, tokens.to(device))
            total = total + F.normalize(embeddings.float(), dim=-1).cpu()
    finally:
        model.train(was_training)
    scale = getattr(model, "logit_scale", None)
    bias = getattr(model, "logit_bias", None)
    head = CosineHead(
        F.normalize(total, dim=-1).to(device),
        float(scale.exp()) if scale is not None else 100.0,
        float(bias) if bias is not None else 0.0,
    )
    return ZeroShotClassifier(backbone, head, names).eval()


def _tokens(backbone: Backbone, texts: list[str]) -> Tensor:
    """Token ids; a text that fills the whole context has probably been cut, which libraries hide."""
    assert backbone.tokenize is not None
    tokens = backbone.tokenize(texts)
    ids = tokens["input_ids"] if hasattr(tokens, "keys") else tokens
    full = [text for text, row in zip(texts, ids, strict=True) if int(row[-1]) != 0]
    if full:
        warnings.warn(
            f"{len(full)} texts fill the tokenizer's {ids.shape[1]} tokens and may be cut, first "
            f"{full[0]!r}",
            stacklevel=3,
        )
    return tokens
