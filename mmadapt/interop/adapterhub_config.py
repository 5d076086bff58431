"""What AdapterHub's `adapter_config.json` says, and which of its methods are refused."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmadapt.adapter import Bottleneck
from mmadapt.adapter.validation import ACTIVATIONS
from mmadapt.core.attached import NAME
from mmadapt.errors import AdapterFileError
from mmadapt.interop.peft_config import CONFIG

if TYPE_CHECKING:
    from torch import Tensor

#: families whose blocks norm before each branch, so that the one rule holds
_PRE_NORM = ("vit", "clip", "whisper")
_OPTIONS = {
    "use_gating": "gating (UniPELT)",
    "phm_layer": "PHM layers (Compacter)",
    "inv_adapter": "invertible adapters",
    "use_dora": "DoRA",
    "vera_d": "VeRA",
    "vera_b": "VeRA",
}
_ACTIVATIONS = {"swish": "silu", "gelu_pytorch_tanh": "gelu_new", "linear": "identity"}
#: adapter-transformers, the predecessor, wrote these names for others
_BEFORE = {"gelu": "gelu_new", "gelu_orig": "gelu"}


@dataclass(frozen=True)
class Architecture:
    """The part of a configuration that says what is computed."""

    method: str  # "bottleneck" or "lora"
    name: str
    notes: tuple[str, ...] = ()
    #: whether no layer was left out
    everywhere: bool = True
    # a LoRA's
    rank: int = 1
    alpha: float = 1.0
    dropout: float = 0.0
    # a bottleneck's
    activation: Any = "relu"
    scale: float | str = 1.0
    norm_before: bool = False
    norm_after: bool = False
    placement: Any = "sequential"
    drop_path: float = 0.0

    def has(self, tensor: str) -> bool:
        """Whether its layers have a tensor of ours."""
        if tensor == "scale":
            return isinstance(self.scale, str)
        if tensor.startswith("norm_"):
            return self.norm_before
        return self.norm_after if tensor.startswith("after_") else True

    def bottleneck(self, width: int, block: str, branch: str) -> tuple[str, Bottleneck]:
        """The role and the adapter for one of its layers."""
        role, placement = f"{block}.{branch}", self.placement
        if placement == "joined" and branch == "mlp":  # what the block returns
            role, placement = block, "sequential"
        both = {(True, True): "both", (True, False): "before", (False, True): "after"}
        return role, Bottleneck(
            width,
            placement=placement,
            activation=self.activation,
            scale=1.0 if isinstance(self.scale, str) else self.scale,
            scale_kind=self.scale if isinstance(self.scale, str) else "fixed",  # type: ignore[arg-type]
            norm=both.get((self.norm_before, self.norm_after), "none"),  # type: ignore[arg-type]
            drop_path=self.drop_path,
        )

    def ours(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of one of its layers under the names its adapter has for them."""
        found = dict(tensors)
        if self.scale == "learned":
            found["scale"] = found["scale"].reshape(())
        if self.norm_after and not self.norm_before:
            found["norm_weight"], found["norm_bias"] = (
                found.pop("after_weight"),
                found.pop("after_bias"),
            )
        return found


def architecture(folder: Path, config: Mapping[str, Any]) -> Architecture:
    """Check a configuration; `AdapterFileError` names what cannot be read."""
    inner: Any = config.get("config")
    if not isinstance(inner, dict):
        raise AdapterFileError(f"{folder / CONFIG} has no configuration of an adapter")
    _refuse_others(folder, config, inner)
    name = str(config.get("name") or "default")
    name = name if NAME.fullmatch(name) and name != "training" else "default"
    if inner.get("architecture") == "lora":
        return _lora(folder, config, inner, name)
    return _bottleneck(folder, config, inner, name)


def _refuse(folder: Path, what: str, hint: str = "") -> AdapterFileError:
    return AdapterFileError(
        f"{folder} is an adapter of AdapterHub with {what}, which cannot be read", hint
    )


def _refuse_others(folder: Path, config: Mapping[str, Any], inner: Mapping[str, Any]) -> None:
    kind = inner.get("architecture")
    if kind not in (None, "lora"):
        raise _refuse(
            folder,
            f"the architecture {kind!r}",
            "bottlenecks and LoRA of ViT, CLIP and Whisper are read",
        )
    found = [word for option, word in _OPTIONS.items() if inner.get(option)]
    if inner.get("composition_mode") == "scale":
        found.append("(IA)³")
    if found:
        raise _refuse(folder, " and ".join(dict.fromkeys(found)))
    family = config.get("model_type")
    if kind is None and family not in _PRE_NORM:
        raise _refuse(
            folder,
            f"bottlenecks of a {family!r} backbone",
            f"{', '.join(_PRE_NORM)} can be read: in blocks that norm behind their branches AdapterHub's "
            "bottlenecks stand inside the norm",
        )


def _lora(
    folder: Path, config: Mapping[str, Any], inner: Mapping[str, Any], name: str
) -> Architecture:
    rank, alpha = _whole(folder, inner, "r"), _number(folder, inner, "alpha", 8.0)
    notes = []
    if rank != alpha and _before(config, (1, 1)):
        notes.append(
            f"trained by a release before 1.1.0, which scaled by 1, so alpha is {rank} instead of {alpha:g}"
        )
        alpha = float(rank)
    dropout = _number(folder, inner, "dropout", 0.0)
    everywhere = not inner.get("leave_out")
    return Architecture("lora", name, tuple(notes), everywhere, rank, alpha, dropout)


def _bottleneck(
    folder: Path, config: Mapping[str, Any], inner: Mapping[str, Any], name: str
) -> Architecture:
    notes = []
    if _number(folder, inner, "dropout", 0.0):
        notes.append(
            "AdapterHub drops out the change, mmadapt what is between the projections: set to 0"
        )
    scale = inner.get("scaling", 1.0)
    if scale not in ("learned", "channel"):
        scale = _number(folder, inner, "scaling", 1.0)
    return Architecture(
        "bottleneck",
        name,
        tuple(notes),
        not inner.get("leave_out"),
        activation=_activation(folder, config, inner),
        scale=scale,
        norm_before=bool(inner.get("ln_before")),
        norm_after=bool(inner.get("ln_after")),
        placement=_placement(folder, inner),
        drop_path=_number(folder, inner, "stochastic_depth", 0.0),
    )


def _placement(folder: Path, inner: Mapping[str, Any]) -> str:
    """What a bottleneck reads; every other combination drops or doubles the residual stream."""
    if inner.get("is_parallel"):
        if inner.get("original_ln_after", True):
            return "residual"
        raise _refuse(folder, "no residual connection (original_ln_after=False)")
    before, after = (
        bool(inner.get("original_ln_before")),
        bool(inner.get("original_ln_after", True)),
    )
    residual = inner.get("residual_before_ln", True)
    if inner.get("ln_after") and inner.get("adapter_residual_before_ln"):
        raise _refuse(folder, "a norm over its own residual (adapter_residual_before_ln)")
    fits = residual is True if before and after else after or (before and residual is False)
    if not fits or residual not in (True, False):
        raise _refuse(
            folder,
            f"original_ln_before={before}, original_ln_after={after}, residual_before_ln={residual!r}",
            "the residual stream would be lost or counted twice in a block that norms before its branches",
        )
    return "joined" if before else "sequential"


def _activation(folder: Path, config: Mapping[str, Any], inner: Mapping[str, Any]) -> str:
    theirs = str(inner.get("non_linearity", "relu")).lower()
    if not str(config.get("version") or "").startswith("adapters."):
        theirs = _BEFORE.get(theirs, theirs)
    ours = _ACTIVATIONS.get(theirs, theirs)
    if ours not in ACTIVATIONS:
        raise _refuse(folder, f"the activation {theirs!r}", f"known: {', '.join(ACTIVATIONS)}")
    return ours


def _before(config: Mapping[str, Any], release: tuple[int, int]) -> bool:
    """Whether a release of `adapters` older than this wrote the file."""
    match = re.match(r"adapters\.(\d+)\.(\d+)", str(config.get("version") or ""))
    return match is not None and (int(match[1]), int(match[2])) < release


def _number(folder: Path, inner: Mapping[str, Any], option: str, otherwise: float) -> float:
    value = inner.get(option)
    if value is None:
        return otherwise
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise AdapterFileError(f"{folder / CONFIG}: {option} is {value!r:.60}, expected a number")
    return float(value)


def _whole(folder: Path, inner: Mapping[str, Any], option: str) -> int:
    value = _number(folder, inner, option, 0.0)
    if value < 1 or value != int(value):
        raise AdapterFileError(
            f"{folder / CONFIG}: {option} is {inner.get(option)!r}, expected 1 or more"
        )
    return int(value)
