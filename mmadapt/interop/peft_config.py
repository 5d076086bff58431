"""What PEFT's `adapter_config.json` says of a LoRA, and which of its variants are refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any, TypeVar

from mmadapt.errors import AdapterFileError
from mmadapt.interop.foreign import some

_Number = TypeVar("_Number", int, float)

CONFIG = "adapter_config.json"
LAST_TWICE = (0, 21)
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")

#: options that change what is computed, or add tensors that no adapter here stands for
_VARIANTS = {
    "use_dora": "DoRA",
    "alora_invocation_tokens": "aLoRA",
    "use_bdlora": "BD-LoRA",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
    "kasa_config": "KaSA",
    "use_qalora": "QALoRA",
    "arrow_config": "Arrow",
    "layer_replication": "replicated layers",
    "target_parameters": "LoRA on bare parameters (target_parameters)",
    "trainable_token_indices": "trained rows of the embeddings (trainable_token_indices)",
}
#: beginnings that change the backbone's own weights, so that the file alone does not say what they are
_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class LoraFile:
    """The part of a LoRA's configuration that its tensors do not tell."""

    rank: int
    alpha: float
    dropout: float = 0.0
    stabilized: bool = False
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    #: whether PEFT adds the change of a packed attention's output projection twice, as its releases up
    #: to 0.21 do (huggingface/peft pull request 3774)
    twice: bool = False
    #: ends of module paths that stand for every layer; () where the file names layers, or a pattern
    everywhere: tuple[str, ...] = ()

    def at(self, path: str) -> tuple[int, float]:
        """(rank, alpha) of the module at `path`, by the first patterns that its path, or its end, matches."""
        return _first(self.ranks, path, self.rank), _first(self.alphas, path, self.alpha)


def _first(patterns: Mapping[str, Any], path: str, otherwise: Any) -> Any:
    matching = (v for pattern, v in patterns.items() if re.match(rf"(.*\.)?({pattern})$", path))
    return next(matching, otherwise)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; `AdapterFileError` for anything else."""
    if not path.is_file():
        raise AdapterFileError(f"{path.parent} has no {path.name}", "copy the whole folder")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterFileError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(found, dict):
        raise AdapterFileError(f"{path} holds {type(found).__name__}, expected an object")
    return found


def lora_file(path: Path, config: Mapping[str, Any]) -> LoraFile:
    """Check a LoRA's configuration; `AdapterFileError` names a variant that cannot be read."""
    variants = [word for option, word in _VARIANTS.items() if config.get(option)]
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(_STARTS):
        variants.append(f"the start {start!r}, which changes the backbone's own weights")
    if variants:
        raise AdapterFileError(
            f"{path} is a LoRA of PEFT with {' and '.join(variants)}, which cannot be read",
            "save_pretrained(…, path_initial_model_for_weight_conversion=…) makes a plain LoRA of it"
            if len(variants) == 1 and "the start" in variants[0]
            else "merge it in PEFT, or train a plain LoRA",
        )
    return LoraFile(
        _rank(path, "r", config.get("r", 8)),
        _number(path, "lora_alpha", config.get("lora_alpha", 8)),
        _number(path, "lora_dropout", config.get("lora_dropout", 0.0)),
        bool(config.get("use_rslora")),
        _patterns(path, config, "rank_pattern", _rank),
        _patterns(path, config, "alpha_pattern", _number),
        _release(config) <= LAST_TWICE,
        _everywhere(config),
    )


def _release(config: Mapping[str, Any]) -> tuple[int, int]:
    """The release of PEFT that wrote a file; older than all where it does not say."""
    match = re.match(r"(\d+)\.(\d+)", str(config.get("peft_version") or ""))
    return (int(match[1]), int(match[2])) if match else (0, 0)


def _number(path: Path, what: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not isfinite(value):
        raise AdapterFileError(f"{path}: {what} is {value!r:.60}, expected a number")
    return float(value)


def _rank(path: Path, what: str, value: Any) -> int:
    number = _number(path, what, value)
    if number < 1 or number != int(number):
        raise AdapterFileError(
            f"{path}: {what} is {value!r:.60}, expected a whole number of at least 1"
        )
    return int(number)


def _patterns(
    path: Path, config: Mapping[str, Any], option: str, read: Callable[[Path, str, Any], _Number]
) -> dict[str, _Number]:
    found = config.get(option) or {}
    if not isinstance(found, dict):
        raise AdapterFileError(f"{path}: {option} is {found!r:.60}, expected an object")
    for pattern in found:
        try:
            re.compile(pattern)
        except re.error as error:
            raise AdapterFileError(f"{path}: {option} has {pattern!r}: {error}") from None
    return {p: read(path, f"{option}[{p!r}]", value) for p, value in found.items()}


def _everywhere(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The module names that every layer has to have, where the configuration says so."""
    named = config.get("target_modules")
    narrowed = config.get("layers_to_transform") is not None or config.get("exclude_modules")
    if narrowed or not isinstance(named, list):
        return ()
    return tuple(str(one) for one in named if not re.search(r"(^|\.)\d+(\.|$)", str(one)))


def weights_at(folder: Path, names: Iterable[str]) -> Path:
    """The file of tensors in a folder, the first of these names that is there."""
    names = tuple(names)
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        raise AdapterFileError(
            f"{folder} has no {' or '.join(names)}; it holds {some(sorted(p.name for p in folder.iterdir()))}",
            "copy the whole folder",
        )
    return found
