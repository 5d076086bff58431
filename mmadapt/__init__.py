"""mmadapt: small trainable adapters for large frozen models of any modality.

    import mmadapt as mm

    clip = mm.load("tiny/clip")
    att = mm.attach(clip, mm.Bottleneck(32), name="sketch")

Everything here is imported on first use; `import mmadapt` itself imports nothing heavy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from mmadapt import adapter, errors, interop, ops, tasks, ui, zoo
    from mmadapt.adapter import (
        Adapter,
        AdapterBias,
        AdapterShadow,
        Any2Point,
        BiAdaptFormer,
        BiasScale,
        Bottleneck,
        ClipAdapter,
        Compacter,
        ConvAdapter,
        ConvDepth,
        Convpass,
        ConvPass1d,
        DeepPrompts,
        DenseMoA,
        Head,
        Invertible,
        LlamaAdapter,
        LoRA,
        MedSA,
        SAMMed2D,
        ScaleShift,
        SoftMoA,
        ThreeDSAM,
        TipAdapter,
        Unlock,
        ZeroInitAttention,
        register_adapter,
    )
    from mmadapt.core.anatomy import Anatomy
    from mmadapt.core.attach import active, attach, attachments, detach, disabled, set_active
    from mmadapt.core.attachment import Attachment
    from mmadapt.core.average import average
    from mmadapt.core.backbone import Backbone
    from mmadapt.core.check import check, check_laws
    from mmadapt.core.compose import Stack, Sum
    from mmadapt.core.given import context
    from mmadapt.core.merge import merge, unmerge
    from mmadapt.core.report import inspect, plan, sites
    from mmadapt.core.site import Span
    from mmadapt.core.store import save
    from mmadapt.errors import MmadaptError
    from mmadapt.interop.loading import load_adapter
    from mmadapt.train.cache import cached_prefix
    from mmadapt.train.checkpoint import Checkpoint
    from mmadapt.train.evaluation import Evaluation
    from mmadapt.train.fit import fit
    from mmadapt.train.flags import train_mode
    from mmadapt.train.history import History
    from mmadapt.train.optimiser import Optimiser
    from mmadapt.zoo.loading import load

_HOMES = {
    "mmadapt.adapter": (
        "Adapter AdapterBias AdapterShadow Any2Point BiAdaptFormer BiasScale Bottleneck ClipAdapter "
        "Compacter ConvAdapter ConvDepth ConvPass1d Convpass DeepPrompts DenseMoA Head Invertible "
        "LlamaAdapter LoRA MedSA SAMMed2D ScaleShift SoftMoA ThreeDSAM TipAdapter Unlock "
        "ZeroInitAttention register_adapter"
    ),
    "mmadapt.core.anatomy": "Anatomy",
    "mmadapt.core.attach": "active attach attachments detach disabled set_active",
    "mmadapt.core.attachment": "Attachment",
    "mmadapt.core.average": "average",
    "mmadapt.core.backbone": "Backbone",
    "mmadapt.core.check": "check check_laws",
    "mmadapt.core.compose": "Stack Sum",
    "mmadapt.core.merge": "merge unmerge",
    "mmadapt.core.report": "inspect plan sites",
    "mmadapt.core.given": "context",
    "mmadapt.core.site": "Span",
    "mmadapt.core.store": "save",
    "mmadapt.errors": "MmadaptError",
    "mmadapt.interop.loading": "load_adapter",
    "mmadapt.train.cache": "cached_prefix",
    "mmadapt.train.checkpoint": "Checkpoint",
    "mmadapt.train.evaluation": "Evaluation",
    "mmadapt.train.fit": "fit",
    "mmadapt.train.flags": "train_mode",
    "mmadapt.train.history": "History",
    "mmadapt.train.optimiser": "Optimiser",
    "mmadapt.zoo.loading": "load",
}
_MODULES = ("adapter", "errors", "interop", "ops", "tasks", "ui", "zoo")
_HOME = {name: module for module, names in _HOMES.items() for name in names.split()}

__all__ = ["__version__", *sorted(_HOME), *_MODULES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    if name in _MODULES:
        return importlib.import_module(f"mmadapt.{name}")
    from mmadapt.errors import no_attribute

    raise no_attribute("mmadapt", name, __all__)


def __dir__() -> list[str]:
    return sorted(__all__)
