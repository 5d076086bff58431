"""Tokens that a backbone's own queries attend to, behind a gate that starts closed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from mmadapt.adapter.affine import BiasScale
from mmadapt.adapter.base import Adapter
from mmadapt.adapter.registry import register_adapter
from mmadapt.adapter.unlock import Unlock
from mmadapt.adapter.validation import one_of, positive
from mmadapt.errors import AdapterError

if TYPE_CHECKING:
    import torch

    from mmadapt.core.layer import Layer
    from mmadapt.core.site import SiteView


@register_adapter
@dataclass(frozen=True)
class ZeroInitAttention(Adapter):
    """Attention to extra tokens beside the backbone's own, heads + g(gate)·softmax(q·kᵀ·s)·v.

    q are the backbone's queries, rotated where it rotates them; k and v are its own projections of
    `length` trained tokens, not rotated; the softmax is apart from the backbone's, so the gate is all
    that decides how much of them is seen. A gate per head, or with `gate="layer"` one for all, starts
    at 0; g is tanh, or the identity.

    Features of another modality come with the forward pass, `mm.context(model, visual=features)`,
    (B, V) or (B, N, V), V being `features`. One linear projection, shared by all sites, takes them to
    the backbone's width. `visual="added"` adds them to the trained tokens (one to all of them, or N
    to N); `visual="tokens"` attends to them instead, which is early fusion at a first layer. With
    `projected=False` they come in the backbone's width, from a projection of your own.

    `heads` limits the branch to some heads; the others' gates are left out.

    Parameters per site: length·C + heads (without the tokens with "tokens"); with features
    V·C + C once.

        llama = mm.load("tiny/llama")
        mm.attach(llama, mm.ZeroInitAttention(4, visual="added", features=64))
        tokens = llama.tokenize(["what is it? "], return_tensors="pt")
        with mm.context(llama, visual=torch.randn(1, 64)):            # one image's features
            logits = llama(**tokens).logits
    """

    method: ClassVar[str] = "zero_init_attention"
    layer: ClassVar[str] = "mmadapt.methods.zero_init:ZeroInitAttentionLayer"
    shared: ClassVar[str] = "mmadapt.methods.zero_init:VisualProjection"
    ports: ClassVar[tuple[str, ...]] = ("in",)
    default_sites: ClassVar[tuple[str, ...]] = ("*.layers[*].attn.heads",)
    elsewhere: ClassVar[str] = (
        "choose a backbone whose q, k, v and output projections are linears of their own that it "
        "calls, such as Llama, Mistral, Qwen2, Qwen3 or Gemma"
    )
    source: ClassVar[str] = "Zhang et al. 2023 (LLaMA-Adapter), arXiv:2303.16199"

    length: int = 10
    gate: Literal["head", "layer"] = "head"
    activation: Literal["tanh", "identity"] = "tanh"
    visual: Literal["none", "added", "tokens"] = "none"
    features: int | None = None
    heads: tuple[int, ...] | None = None
    projected: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        positive(self, "length")
        one_of(self, "gate", ("head", "layer"))
        one_of(self, "activation", ("tanh", "identity"))
        one_of(self, "visual", ("none", "added", "tokens"))
        if (self.visual == "none") != (self.features is None):
            raise AdapterError(
                f"{name}: visual is {self.visual!r} and features is {self.features!r}",
                'give both, for example visual="added", features=768, or neither',
            )
        if self.features is not None:
            positive(self, "features")
        elif not self.projected:
            raise AdapterError(f"{name}: projected is False, and there are no features")
        if self.heads is None:
            return
        whole = isinstance(self.heads, (list, tuple)) and all(type(h) is int for h in self.heads)
        if not whole or not self.heads or min(self.heads) < 0:
            raise AdapterError(
                f"{name}: heads is {self.heads!r}, expected whole numbers from 0, such as (0, 2)"
            )
        if len(set(self.heads)) < len(self.heads) or self.gate == "layer":
            raise AdapterError(
                f"{name}: heads is {self.heads!r} and gate is {self.gate!r}",
                'name each head once, with gate="head"',
            )
        object.__setattr__(self, "heads", tuple(self.heads))

    def build_shared(self, sites: Sequence[SiteView], generator: torch.Generator) -> Layer | None:
        if self.features is None or not self.projected:
            return None
        return super().build_shared(sites, generator)


@register_adapter
@dataclass(frozen=True)
class LlamaAdapter(ZeroInitAttention):
    """LLaMA-Adapter: `length` trained tokens in each of the top `layers` layers (Zhang et al. 2023).

    The defaults are the paper's for Llama 7B: 10 tokens in 30 of 32 layers, a tanh gate per head,
    1.2 M parameters. The authors' inference script and PEFT leave the tanh out,
    `activation="identity"`; PEFT has one gate a layer, `gate="layer"`. With `visual="added"` and
    `features` it is the paper's form for images.

    Parameters: layers·(length·C + heads).

        llama = mm.load("tiny/llama")
        mm.attach(llama, mm.LlamaAdapter(length=4, layers=2))         # its top two of four layers
        tokens = llama.tokenize(["spell ab backwards = "], return_tensors="pt")
        answer = llama.model.generate(**tokens, max_new_tokens=3)
    """

    method: ClassVar[str] = "llama_adapter"

    layers: int = 30

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "layers")

    @classmethod
    def v2(
        cls,
        features: int | None = None,
        scale: Literal["output", "input"] = "output",
        layers: int = 31,
    ) -> tuple[Adapter, ...]:
        """LLaMA-Adapter V2, arXiv:2304.15010, as one list of adapters.

        Norms unlocked, a bias and scale at every linear (`scale="input"`: as the authors released
        them), 10 tokens in each of the top `layers` layers, the paper's being all of 32 but the first;
        with `features`, the width of visual ones, also early fusion: the first layer attends to them.

            mm.attach(model, mm.LlamaAdapter.v2(layers=15))     # of sixteen
        """
        # hooks that come later stand in front, so tokens join before the output projection's scale
        adapters = (*cls.v2_chat(scale), cls(layers=layers))
        if features is None:
            return adapters
        first = ("text.layers[0].attn.heads",)
        return (*adapters, ZeroInitAttention(visual="tokens", features=features, at=first))

    @classmethod
    def v2_chat(cls, scale: Literal["output", "input"] = "input") -> tuple[Adapter, ...]:
        """LLaMA-Adapter V2 without tokens, as its chat models were released: norms, biases, scales."""
        norms = ("text.layers[*].norm1", "text.layers[*].norm2", "text.norm")
        return (Unlock(at=norms), BiasScale(scale=scale))

    @property
    def patterns(self) -> tuple[str, ...]:
        if self.at is not None:
            return self.at
        return tuple(f"text.layers[{i}].attn.heads" for i in range(-self.layers, 0))

    @property
    def every_pattern(self) -> bool:
        return True  # a layer that is not there is an error
