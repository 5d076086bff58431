"""BERT of transformers: post-norm blocks.

A block computes h = LayerNorm(x + attn(x)), then LayerNorm(h + mlp(h)). The roles `attn` and `mlp`
are the branches as Houlsby et al. 2019 adapt them: after their last linear, before the sum and its
LayerNorm. That linear is their module, so `attn` and `attn.o` meet in one place, `mlp` and
`mlp.down` too. What they read is the stream before the branch (the tap `residual`): x, and h.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mmadapt.backbones.blocks import linear, linears, logits, norm, norms
from mmadapt.core.anatomy import Anatomy
from mmadapt.core.site import Span

if TYPE_CHECKING:
    from torch import nn


def bert_anatomy(model: nn.Module) -> Anatomy:
    """`transformers.BertModel` and the BERT models with a head on it."""
    inner = "bert." if hasattr(model, "bert") else ""
    path = f"{inner}encoder.layer"
    block, role = path + ".{i}", "text.layers[i]"
    mixed, down = f"{block}.attention.output.dense", f"{block}.output.dense"
    words = {"q": "query", "k": "key", "v": "value"}
    return Anatomy(
        family="bert",
        spans={
            role: Span(block, channels=f"{block}.output.LayerNorm.weight"),
            f"{role}.attn": Span(mixed, ("out",), x="tap:residual", channels=f"{mixed}.weight@0"),
            **linears(f"{role}.attn", f"{block}.attention.self", words),
            f"{role}.attn.o": linear(mixed),
            f"{role}.mlp": Span(down, ("out",), x="tap:residual", channels=f"{down}.weight@0"),
            f"{role}.mlp.up": linear(f"{block}.intermediate.dense"),
            f"{role}.mlp.down": linear(down),
            **norms(role, block, "attention.output.LayerNorm", "output.LayerNorm"),
            "text.embeddings.norm": norm(f"{inner}embeddings.LayerNorm"),
            "text.pooled": Span(
                f"{inner}pooler", channels=f"{inner}pooler.dense.weight", layout="BD"
            ),
            "logits": logits("classifier", "BK" if f"{inner}pooler" in _names(model) else "BTK"),
        },
        towers={"text": inner.rstrip(".")},
        taps={
            f"{role}.norm1": f"{block}.attention.output.LayerNorm:out",
            f"{role}.norm2": f"{block}.output.LayerNorm:out",
            f"{role}.attn.residual": f"{block}.attention.self.query:in",
            f"{role}.mlp.residual": f"{block}.attention.output.LayerNorm:out",
        },
        facts=_facts,
    )


def _names(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_modules()}


def _facts(model: Any) -> dict[str, Any]:
    config = model.config
    return {
        "text_layers": config.num_hidden_layers,
        "width": config.hidden_size,
        "vocabulary": config.vocab_size,
        "context": config.max_position_embeddings,
        "activation": config.hidden_act,
        "classes": config.num_labels if hasattr(model, "classifier") else None,
    }
