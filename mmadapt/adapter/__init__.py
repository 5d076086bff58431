"""Adapters: methods with their hyper-parameters, as frozen dataclasses that need no torch.

An adapter says which roles it wants and which ports it can use; the layer it builds at each site
lives in `mmadapt.methods` and is imported only when it is built. A third party adds a method with
one such dataclass and one layer class, announced through the entry-point group `mmadapt.adapters`
or `register_adapter`.
"""

from __future__ import annotations

from mmadapt.adapter.affine import AdapterBias, BiasScale, ScaleShift
from mmadapt.adapter.any2point import Any2Point
from mmadapt.adapter.base import Adapter
from mmadapt.adapter.bottleneck import Bottleneck
from mmadapt.adapter.compacter import Compacter
from mmadapt.adapter.conv import Convpass
from mmadapt.adapter.head import Head
from mmadapt.adapter.invertible import Invertible
from mmadapt.adapter.lowbit import BiAdaptFormer
from mmadapt.adapter.lowrank import LoRA
from mmadapt.adapter.pooled import ClipAdapter, TipAdapter
from mmadapt.adapter.registry import _REGISTRY, adapters, from_json, register_adapter
from mmadapt.adapter.segmentation import AdapterShadow, SAMMed2D
from mmadapt.adapter.sound import ConvAdapter, ConvPass1d, DeepPrompts, DenseMoA, SoftMoA
from mmadapt.adapter.three_d_sam import ThreeDSAM
from mmadapt.adapter.unlock import Unlock
from mmadapt.adapter.validation import ACTIVATIONS, Activation
from mmadapt.adapter.volume import ConvDepth, MedSA
from mmadapt.adapter.zero_init import LlamaAdapter, ZeroInitAttention

__all__ = [
    "ACTIVATIONS",
    "_REGISTRY",
    "Activation",
    "Adapter",
    "AdapterBias",
    "AdapterShadow",
    "Any2Point",
    "BiAdaptFormer",
    "BiasScale",
    "Bottleneck",
    "ClipAdapter",
    "Compacter",
    "ConvAdapter",
    "ConvDepth",
    "ConvPass1d",
    "Convpass",
    "DeepPrompts",
    "DenseMoA",
    "Head",
    "Invertible",
    "LlamaAdapter",
    "LoRA",
    "MedSA",
    "SAMMed2D",
    "ScaleShift",
    "SoftMoA",
    "ThreeDSAM",
    "TipAdapter",
    "Unlock",
    "ZeroInitAttention",
    "adapters",
    "from_json",
    "register_adapter",
]
