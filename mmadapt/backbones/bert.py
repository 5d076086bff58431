"""BERT and its relatives in transformers: post-norm blocks.

A block computes h = LayerNorm(x + attn(x)), then LayerNorm(h + mlp(h)). The roles `attn` and `mlp`
are the branches as Houlsby et al. 2019 adapt them: after their last linear, before the sum and its
LayerNorm. That linear is their module, so `attn` and `attn.o` meet in one place, `mlp` and
`mlp.down` too. What they read is the stream before the branch (the tap `residual`): x, and h.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmadapt.backbones.blocks import linear, linears, logits, norm, norms, text_mask, wholes
from mmadapt.core.anatomy import Anatomy
from mmadapt.core.parts import WordPositions
from mmadapt.core.site import Span

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class _Paths:
    """Where one library's class keeps its parts, inside the bare model and inside a block."""

    blocks: str = "encoder.layer"
    q: str = "attention.self.query"
    k: str = "attention.self.key"
    v: str = "attention.self.value"
    o: str = "attention.output.dense"
    up: str = "intermediate.dense"
    down: str = "output.dense"
    norm1: str = "attention.output.LayerNorm"
    norm2: str = "output.LayerNorm"


_DEBERTA = _Paths(
    q="attention.self.query_proj", k="attention.self.key_proj", v="attention.self.value_proj"
)
_DISTILBERT = _Paths(
    blocks="transformer.layer",
    q="attention.q_lin",
    k="attention.k_lin",
    v="attention.v_lin",
    o="attention.out_lin",
    up="ffn.lin1",
    down="ffn.lin2",
    norm1="sa_layer_norm",
    norm2="output_layer_norm",
)


def bert_anatomy(model: nn.Module) -> Anatomy:
    """BERT, RoBERTa, XLM-RoBERTa, CamemBERT and ELECTRA, bare or with a head."""
    return _post_norm(model, _Paths())


def deberta_anatomy(model: nn.Module) -> Anatomy:
    """DeBERTa v2 and v3, bare or with a head."""
    return _post_norm(model, _DEBERTA)


def distilbert_anatomy(model: nn.Module) -> Anatomy:
    """DistilBERT, bare or with a head."""
    return _post_norm(model, _DISTILBERT)


def _post_norm(model: Any, paths: _Paths) -> Anatomy:
    prefix = model.base_model_prefix
    inner = f"{prefix}." if hasattr(model, prefix) else ""
    block, role = f"{inner}{paths.blocks}.{{i}}", "text.layers[i]"
    mixed, down = f"{block}.{paths.o}", f"{block}.{paths.down}"
    read = "tap:residual"
    pooler = "pooler" if getattr(model, "pooler", None) is not None else f"{inner}pooler"
    words = [cls.__name__ for cls in type(model).__mro__]
    by_token = any(word.endswith("ForTokenClassification") for word in words)
    head = getattr(model, "classifier", None)
    classifier = "classifier.out_proj" if hasattr(head, "out_proj") else "classifier"
    return Anatomy(
        family=model.config.model_type,
        spans={
            role: Span(block, channels=f"{block}.{paths.norm2}.weight"),
            f"{role}.attn": Span(mixed, ("out",), x=read, channels=f"{mixed}.weight@0"),
            **linears(f"{role}.attn", block, {"q": paths.q, "k": paths.k, "v": paths.v}),
            f"{role}.attn.o": linear(mixed),
            f"{role}.mlp": Span(down, ("out",), x=read, channels=f"{down}.weight@0"),
            f"{role}.mlp.up": linear(f"{block}.{paths.up}"),
            f"{role}.mlp.down": linear(down),
            **norms(role, block, paths.norm1, paths.norm2),
            **_wholes(model, inner),
            "text.embeddings.norm": norm(f"{inner}embeddings.LayerNorm"),
            "text.pooled": Span(pooler, channels=f"{pooler}.dense.weight", layout="BD"),
            "logits": logits(classifier, "BTK" if by_token else "BK"),
        },
        towers={"text": inner.rstrip(".")},
        taps={
            f"{role}.norm1": f"{block}.{paths.norm1}:out",
            f"{role}.norm2": f"{block}.{paths.norm2}:out",
            # of the three projections, v's alone sees nothing but x (DeBERTa's others see positions)
            f"{role}.attn.residual": f"{block}.{paths.v}:in",
            f"{role}.mlp.residual": f"{block}.{paths.norm1}:out",
        },
        fills={inner.rstrip("."): text_mask},
        facts=_facts,
    )


def _wholes(model: Any, inner: str) -> dict[str, Span]:
    """Of BERT itself: its relatives number positions from another row, or have others."""
    if inner or model.config.model_type != "bert":
        return {}
    return wholes("text", "embeddings.position_embeddings.weight@1", _word_positions)


def _word_positions(embeddings: Any) -> WordPositions:
    return WordPositions(embeddings.position_embeddings.weight, False, embeddings.LayerNorm)


def _facts(model: Any) -> dict[str, Any]:
    config = model.config
    activation = getattr(config, "hidden_act", None)
    return {
        "text_layers": config.num_hidden_layers,
        "width": config.hidden_size,
        "vocabulary": config.vocab_size,
        "context": config.max_position_embeddings,
        "activation": config.activation if activation is None else activation,
        "classes": config.num_labels if hasattr(model, "classifier") else None,
    }
