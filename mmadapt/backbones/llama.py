"""Decoders with rotary positions: Llama, Mistral, Qwen2, Qwen3, Gemma, and others built alike.

A block computes h = x + attn(norm1(x)), then h + mlp(norm2(h)), the norms without a mean. `attn.heads`
is where the heads, side by side, meet their output projection; the tap `attn.q` gives the queries
that made them: after their norm where there is one, and rotated to their positions.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from mmadapt.backbones.blocks import block_taps, linears, logits, norm
from mmadapt.core.anatomy import Anatomy
from mmadapt.core.site import Attention, Derived, SiteView, Span

if TYPE_CHECKING:
    from torch import Tensor, nn

_PROJECTIONS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}
#: families that norm each head of queries (B, T, H, d) and keys before their rotation
_HEAD_NORMS = ("qwen3",)


def llama_anatomy(model: nn.Module) -> Anatomy:
    """Llama, Mistral, Qwen2, Qwen3 and Gemma of transformers, bare or with a head."""
    anatomy = probe(model)
    assert anatomy is not None  # these classes are built so
    return anatomy


def probe(model: Any) -> Anatomy | None:
    """The anatomy of any decoder whose blocks have q, k, v and o projections and rotary positions.

    None where there is no such decoder. One inside a larger model is found too. Attentions that do
    more to their queries than rotate them offer everything but `attn.heads`.
    """
    path = _find_decoder(model)
    if path is None:
        return None
    inner = f"{path}." if path else ""
    block, role = f"{inner}layers.{{i}}", "text.layers[i]"
    attn, mlp = f"{block}.self_attn", f"{block}.mlp"
    layer = model.get_submodule(f"{inner}layers.0")
    width = f"{attn}.o_proj.weight@0"
    spans = {
        role: Span(block, channels=width),
        f"{role}.attn": Span(attn, channels=width),
        **linears(f"{role}.attn", attn, _PROJECTIONS),
        f"{role}.mlp": Span(mlp, x="0|x", channels=width),
        **linears(f"{role}.mlp", mlp, {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}),
        "text.embeddings": Span(
            f"{inner}embed_tokens", ("out",), x="0|input", channels=f"{inner}embed_tokens.weight@1"
        ),
        "text.norm": norm(f"{inner}norm"),
        **_head(model, inner),
    }
    taps: dict[str, str | Derived] = {}
    second = next((n for n in _SECOND_NORMS if hasattr(layer, n)), "")
    if hasattr(layer, "input_layernorm") and second:
        spans[f"{role}.norm1"] = norm(f"{block}.input_layernorm")
        spans[f"{role}.norm2"] = norm(f"{block}.{second}")
        taps.update(block_taps("text", f"{inner}layers", "input_layernorm", second))
    found = {_queries(one.self_attn) for one in model.get_submodule(f"{inner}layers").children()}
    queries = found.pop() if len(found) == 1 else ""  # layers may differ: some do not rotate
    if queries:
        spans[f"{role}.attn.heads"] = Span(
            f"{attn}.o_proj",
            ("in",),
            x="0|input",
            channels=f"{attn}.o_proj.weight@1",
            attention=attention_of,
        )
        sources = (f"{attn}.{queries}:out", f"{attn}:kw:position_embeddings")
        taps[f"{role}.attn.q"] = Derived(sources, rotated_queries)
        if queries == "q_norm":
            spans[f"{role}.attn.q_norm"] = norm(f"{attn}.q_norm", "BTHC")
            spans[f"{role}.attn.k_norm"] = norm(f"{attn}.k_norm", "BTHC")
    return Anatomy(
        family=model.config.model_type,
        spans=spans,
        towers={"text": path},
        taps=taps,
        fills={path: causal_mask},
        facts=_facts,
    )


#: the norm that the MLP reads behind; where both are there, the other one norms what attention gives
_SECOND_NORMS = ("pre_feedforward_layernorm", "post_attention_layernorm")


def _head(model: Any, inner: str) -> dict[str, Span]:
    """The output layer. Tied to the embeddings it is met by its call only, never by its weight."""
    if getattr(model, "score", None) is not None:
        return {"logits": logits("score", "BTK")}
    head = getattr(model, "lm_head", None)
    if head is None:
        return {}
    if head.weight is model.get_submodule(f"{inner}embed_tokens").weight:
        size = "lm_head.weight"
        return {
            "logits": Span(
                "lm_head",
                ("out", "in"),
                x="0|input",
                channels=f"{size}@0",
                channels_in=f"{size}@1",
                layout="BTK",
            )
        }
    return {"logits": logits("lm_head", "BTK")}


# -- what an attention does ---------------------------------------------------------------------------


def attention_of(module: Any) -> Attention:
    """What an attention with q_proj, k_proj, v_proj and o_proj does to tokens."""
    width = module.head_dim
    return Attention(
        k=module.k_proj,
        v=module.v_proj,
        heads=module.o_proj.in_features // width,
        key_heads=module.k_proj.out_features // width,
        head_width=width,
        scale=module.scaling,
        width=module.k_proj.in_features,
        k_norm=getattr(module, "k_norm", None),
        rotate=_rotation(module),
    )


def rotated_queries(site: SiteView, q: Tensor, positions: tuple[Tensor, Tensor]) -> Tensor:
    """Queries (B, H, T, d) as they meet the keys, by the rotation of the backbone's own family."""
    attention = site.attention
    assert attention is not None and attention.rotate is not None
    if q.ndim == 3:
        q = q.unflatten(-1, (attention.heads, attention.head_width))
    return attention.rotate(q, *positions).transpose(1, 2)


def rotated_by_family(family: Any, q: Tensor, *positions: Tensor) -> Tensor:
    """Queries (B, T, H, d) by the family's own function, which turns keys (B, H, T, d) beside them."""
    q = q.transpose(1, 2)
    return family(q, q[:, :1], *positions)[0].transpose(1, 2)


def rotated_by_halves(family: Any, q: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """The same in half as many operations, where the family turns the first half with the second."""
    if cosines.shape[-1] != q.shape[-1]:  # some of the channels only
        return rotated_by_family(family, q, cosines, sines)
    half = q.shape[-1] // 2
    turned = torch.cat((-q.narrow(-1, half, half), q.narrow(-1, 0, half)), dim=-1)
    return (q * cosines.unsqueeze(2)).add_(turned * sines.unsqueeze(2))


def _rotation(module: Any) -> Any:
    """The function of queries and positions that turns them as the module does; None without one."""
    family = _rotary(module)
    if family is None:
        return None
    return functools.partial(rotated_by_halves if _by_halves(family) else rotated_by_family, family)


@functools.cache
def _by_halves(family: Any) -> bool:
    """Whether a family's rotation of double-precision queries is, bit for bit, that by halves."""
    if list(inspect.signature(family).parameters)[:4] != ["q", "k", "cos", "sin"]:
        return False
    numbers = torch.arange(1, 81, dtype=torch.float64, device="cpu").sin()
    q, given = (
        numbers[:64].view(1, 4, 2, 8),
        (numbers[16:48].view(1, 4, 8), numbers[48:80].view(1, 4, 8)),
    )
    return torch.equal(rotated_by_halves(family, q, *given), rotated_by_family(family, q, *given))


def _rotary(module: Any) -> Any:
    """The function of queries, keys, cosines and sines that the family's code defines."""
    code = sys.modules.get(type(module).__module__)
    return getattr(code, "apply_rotary_pos_emb", None)


def _is_rotary(module: Any) -> bool:
    return (
        all(hasattr(module, name) for name in ("head_dim", *_PROJECTIONS.values()))
        and "position_embeddings" in inspect.signature(module.forward).parameters
    )


def _queries(attention: Any) -> str:
    """The module whose output is the queries before their rotation; "" where more happens to them."""
    cosines_fit = getattr(attention, "rotary_ndims", attention.head_dim) == attention.head_dim
    square = attention.q_proj.out_features == attention.o_proj.in_features
    plain = hasattr(attention, "scaling") and getattr(attention, "use_rope", True)
    if _rotary(attention) is None or not (cosines_fit and square and plain):
        return ""
    normed = [name for name in ("q_norm", "k_norm", "q_layernorm") if hasattr(attention, name)]
    if not normed:
        return "q_proj"
    return "q_norm" if attention.config.model_type in _HEAD_NORMS else ""


# -- where the decoder is, and what it is told ----------------------------------------------------------


def _find_decoder(model: Any) -> str | None:
    """Path of the module that holds `embed_tokens` and the repeated `layers`; None without one."""
    config = getattr(model, "config", None)
    if not hasattr(config, "model_type") or getattr(config, "is_encoder_decoder", False):
        return None
    for path, module in model.named_modules():
        layers = getattr(module, "layers", None)
        if hasattr(module, "embed_tokens") and isinstance(layers, Iterable):
            first = next(iter(layers), None)
            if _is_rotary(getattr(first, "self_attn", None)):
                return path
    return None


def causal_mask(module: Any, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The fact "mask", bool (B, T), for the T tokens of this call: with a cache, the last ones."""
    names = list(inspect.signature(module.forward).parameters)
    given = dict(zip(names, args, strict=False)) | kwargs
    mask = given.get("attention_mask")
    tokens = given.get("input_ids")
    tokens = given.get("inputs_embeds") if tokens is None else tokens
    if mask is None or mask.ndim != 2 or tokens is None:
        return {"mask": None}
    return {"mask": mask[:, -tokens.shape[1] :].bool()}


def _facts(model: Any) -> dict[str, Any]:
    config = model.config.get_text_config()
    attention = model.get_submodule(f"{_find_decoder(model)}.layers.0.self_attn".lstrip("."))
    head = getattr(model, "score", None)
    return {
        "text_layers": config.num_hidden_layers,
        "width": config.hidden_size,
        "heads": attention.q_proj.out_features // attention.head_dim,
        "key_heads": attention.k_proj.out_features // attention.head_dim,
        "inner": config.intermediate_size,
        "vocabulary": config.vocab_size,
        "activation": getattr(config, "hidden_act", None),
        "classes": None if head is None else head.out_features,
    }
