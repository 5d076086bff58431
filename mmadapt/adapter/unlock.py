"""Backbone tensors that are trained themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mmadapt.adapter.base import Adapter
from mmadapt.adapter.registry import register_adapter


@register_adapter
@dataclass(frozen=True)
class Unlock(Adapter):
    """The backbone's own tensors, trained: BitFit, tuned norms, a decoder left open.

    Works at every site with a `weight` port, and has no sites of its own. What is trained, summed
    and saved is the change from the backbone's value, so weight decay pulls towards the backbone.

    Parameters per site: those of the tensor.

        clip = mm.load("tiny/clip")
        mm.attach(clip, mm.Unlock(at=("vision.layers[*].norm1", "vision.layers[*].*.*.bias")))
        features = clip.model.encode_image(torch.randn(2, 3, 32, 32))
    """

    method: ClassVar[str] = "unlock"
    layer: ClassVar[str] = "mmadapt.methods.unlock:UnlockLayer"
    ports: ClassVar[tuple[str, ...]] = ("weight",)
    source: ClassVar[str] = "Ben Zaken et al. 2022 (BitFit), arXiv:2106.10199"
