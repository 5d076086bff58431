"""The modules of a block by their paths in other libraries and releases, as the roles they play.

One table for files of PEFT and of AdapterHub: both name a layer by the path of the module it stands
at, and paths change between releases of transformers and between libraries. A path that the backbone
at hand has itself needs no table.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmadapt.core.backbone import unwrap

if TYPE_CHECKING:
    from torch import nn

    from mmadapt.core.anatomy import Anatomy
    from mmadapt.core.site import SiteView, Span

#: beginning of a path, up to the block's index -> towers it can mean: the first that is there, and of
#: "vision|text" the only one (a path of a tower on its own means neither in a model that has both)
_BLOCKS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"(?:.+\.)?vision_model\.encoder\.layers", ("vision",)),  # CLIP, SigLIP; releases before 5
    (r"(?:.+\.)?text_model\.encoder\.layers", ("text",)),
    (r"(?:\w+\.)?decoder\.layers", ("text",)),  # Whisper
    (r"(?:\w+\.)?encoder\.layers", ("audio", "vision|text")),  # Whisper, wav2vec 2.0, CLIP alone
    (r"(?:\w+\.)?encoder\.layer", ("audio", "vision|text")),  # ViT, BEiT, AST before 5; BERT
    (r"(?:\w+\.)?layers", ("audio", "vision|text")),  # ViT, BEiT, AST from 5 on; decoders
    (r"(?:vision_encoder\.layers|image_encoder\.blocks)", ("vision",)),  # SAM of both libraries
    (r"visual\.(?:transformer\.resblocks|trunk\.blocks)", ("vision",)),  # open_clip
    (r"text\.transformer\.resblocks", ("text",)),
    (
        r"transformer\.resblocks",
        ("text", "vision"),
    ),  # the text tower of CLIP; its image tower alone
    (r"blocks", ("vision",)),  # timm
)
#: what stands behind the index -> role below the block; three words share the rows of one weight
_WORDS: dict[str, tuple[str, ...]] = {
    # ViT, BEiT, AST and DINOv2 of transformers before 5
    "attention.attention.query": ("attn.q",),
    "attention.attention.key": ("attn.k",),
    "attention.attention.value": ("attn.v",),
    "attention.output.dense": ("attn.o",),
    "intermediate.dense": ("mlp.up",),
    "output.dense": ("mlp.down",),
    # the same from 5 on; SAM; timm
    **{f"attention.{word}_proj": (f"attn.{word}",) for word in "qkvo"},
    "attention.out_proj": ("attn.o",),
    "mlp.fc1": ("mlp.up",),
    "mlp.fc2": ("mlp.down",),
    "mlp.lin1": ("mlp.up",),
    "mlp.lin2": ("mlp.down",),
    "attn.qkv": ("attn.q", "attn.k", "attn.v"),
    "attn.proj": ("attn.o",),
    # CLIP, SigLIP, Whisper and decoders
    **{f"self_attn.{word}_proj": (f"attn.{word}",) for word in "qkvo"},
    "self_attn.out_proj": ("attn.o",),
    **{f"encoder_attn.{word}_proj": (f"cross.{word}",) for word in "qkv"},
    "encoder_attn.out_proj": ("cross.o",),
    "fc1": ("mlp.up",),
    "fc2": ("mlp.down",),
    # open_clip
    "attn": ("attn.q", "attn.k", "attn.v"),
    "attn.out_proj": ("attn.o",),
    "mlp.c_fc": ("mlp.up",),
    "mlp.c_proj": ("mlp.down",),
    # norms, whose biases PEFT can train
    **dict.fromkeys(
        ("layernorm_before", "layer_norm1", "self_attn_layer_norm", "ln_1"), ("norm1",)
    ),
    **dict.fromkeys(("layernorm_after", "layer_norm2", "final_layer_norm", "ln_2"), ("norm2",)),
    "encoder_attn_layer_norm": ("norm_cross",),
    # BERT
    "attention.self.query": ("attn.q",),
    "attention.self.key": ("attn.k",),
    "attention.self.value": ("attn.v",),
}
#: what classes with a head put in front of the bare model's paths
_INNER = re.compile(
    r"(?:model|vit|deit|beit|dinov2|audio_spectrogram_transformer|wav2vec2|hubert|wavlm|bert)\."
)


@dataclass(frozen=True, eq=False)
class Places:
    """The roles of one backbone, found by the module paths that files use."""

    model: nn.Module
    anatomy: Anatomy
    entry: Any
    spans: dict[str, Span]
    #: path of a weight or bias of this backbone -> the roles that share its rows, in their order
    weights: dict[str, tuple[str, ...]]

    @classmethod
    def of(cls, m: Any) -> Places:
        """The places of a backbone or of any module with a known anatomy."""
        model, anatomy, entry = unwrap(m)
        spans = anatomy.roles(model)
        found: dict[str, dict[int, str]] = {}
        for role, span in spans.items():
            if span.weight:
                found.setdefault(span.weight, {}).setdefault(span.block[0], role)
        whole = {
            path: tuple(rows[place] for place in sorted(rows))
            for path, rows in found.items()
            if len(rows) == spans[next(iter(rows.values()))].block[1]
        }
        return cls(model, anatomy, entry, spans, whole)

    def of_module(self, path: str) -> tuple[str, ...]:
        """The roles whose weight a module at `path` holds; empty where this backbone has none."""
        own = self._own(path)
        if own:
            return own
        block, rest = self.block(path)
        named = tuple(f"{block}.{word}" for word in _WORDS.get(rest, ())) if block else ()
        if named and all(role in self.spans for role in named):
            return named
        bare = _INNER.sub("", path, count=1) if _INNER.match(path) else path
        for word, tower in (("vision_model.", "vision"), ("text_model.", "text")):
            if f"{tower}.layers[0]" in self.spans:  # a tower on its own, in releases before 5
                bare = bare.removeprefix(word)
        inner = {match[0] for match in map(_INNER.match, self.weights) if match}
        return next((found for front in ("", *inner) if (found := self._own(front + bare))), ())

    def _own(self, path: str) -> tuple[str, ...]:
        return self.weights.get(f"{path}.weight") or self.weights.get(f"{path}.in_proj_weight", ())

    def block(self, path: str) -> tuple[str, str]:
        """(role of the block, what stands behind it) of a module path; ("", "") outside the blocks."""
        for begin, towers in _BLOCKS:
            match = re.match(rf"{begin}\.(\d+)\.", path)
            if match is not None:
                tower = self._tower(towers)
                role = f"{tower}.layers[{match[1]}]"
                return (role, path[match.end() :]) if role in self.spans else ("", "")
        return "", ""

    def _tower(self, towers: tuple[str, ...]) -> str:
        for either in towers:
            here = [tower for tower in either.split("|") if f"{tower}.layers[0]" in self.spans]
            if here:
                return here[0] if len(here) == 1 else ""
        return ""

    def view(self, role: str, ports: Iterable[str]) -> SiteView:
        """The site at `role` with the first of `ports` that it offers."""
        span = self.spans[role]
        port = next(port for port in ports if port in span.ports)
        return self.anatomy.view(self.model, role, port, span)

    def tensor(self, role: str) -> Any:
        """This backbone's own value of a role's rows."""
        view = self.view(role, ("weight",))
        assert view.holder is not None
        return view.holder.get_parameter(view.parameter).detach()[slice(*view.rows)]
