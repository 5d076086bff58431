"""How V2's models for images see: learned queries among the tokens of a CLIP."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmadapt.errors import AdapterFileError
from mmadapt.interop.foreign import refuse_keys

_BLOCK = re.compile(r"visual_blocks\.(\d+)\.")
_PARTS = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
HEAD_WIDTH = 48  # of the released models: 768 channels in 16 heads


class VisualQueries(nn.Module):
    """Tokens of a CLIP's last layer (B, N, V) to features (B, K, C) of a decoder of width C.

    The tokens are those behind CLIP's last norm and projection, the class token first. K learned
    queries stand before them in transformer blocks with the norm first; the queries are what is kept.
    """

    def __init__(self, tensors: dict[str, Tensor], heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.blocks = 1 + max(int(k[1]) for k in map(_BLOCK.match, tensors) if k is not None)
        self.tensors = nn.ParameterDict(
            {k.replace(".", "/"): nn.Parameter(v.float(), False) for k, v in tensors.items()}
        )

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> VisualQueries:
        """From a file's tensors; `AdapterFileError` where keys are missing or do not belong."""
        numbers = {int(k[1]) for k in map(_BLOCK.match, tensors) if k is not None}
        modules = ["clip_proj", "clip_proj_norm", "visual_proj", "visual_proj_norm"]
        modules += [f"visual_blocks.{i}.{p}" for i in range(len(numbers)) for p in _PARTS]
        wanted = {f"{name}.{part}" for name in modules for part in ("weight", "bias")}
        wanted.add("visual_query.weight")
        refuse_keys(sorted(wanted - tensors.keys()), sorted(tensors.keys() - wanted))
        width = tensors["visual_query.weight"].shape[1]
        if not numbers or width % HEAD_WIDTH:
            raise AdapterFileError(
                f"{len(numbers)} visual blocks of {width} channels, expected at least one and a "
                f"multiple of {HEAD_WIDTH}, the width of a head in the released models"
            )
        return cls(tensors, width // HEAD_WIDTH)

    @property
    def width_out(self) -> int:
        """Channels of what it gives."""
        return len(self._tensor("visual_proj.bias"))

    def forward(self, tokens: Tensor) -> Tensor:
        query = self._tensor("visual_query.weight")
        seen = self._norm("clip_proj_norm", self._linear("clip_proj", tokens.to(query.dtype)))
        x = torch.cat([query.expand(len(seen), -1, -1), seen], 1)
        for i in range(self.blocks):
            block = f"visual_blocks.{i}"
            x = x + self._attend(f"{block}.attn", self._norm(f"{block}.norm1", x))
            inner = F.gelu(self._linear(f"{block}.mlp.fc1", self._norm(f"{block}.norm2", x)))
            x = x + self._linear(f"{block}.mlp.fc2", inner)
        kept = self._linear("visual_proj", x[:, : len(query)])
        return self._norm("visual_proj_norm", kept)

    def _attend(self, name: str, x: Tensor) -> Tensor:
        parts = self._linear(f"{name}.qkv", x).unflatten(-1, (3, self.heads, -1))
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        heads = F.scaled_dot_product_attention(q, k, v)
        return self._linear(f"{name}.proj", heads.transpose(1, 2).flatten(2))

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self._tensor(f"{name}.weight"), self._tensor(f"{name}.bias"))

    def _norm(self, name: str, x: Tensor) -> Tensor:
        weight = self._tensor(f"{name}.weight")
        return F.layer_norm(x, weight.shape, weight, self._tensor(f"{name}.bias"))

    def _tensor(self, name: str) -> Tensor:
        return self.tensors[name.replace(".", "/")]
