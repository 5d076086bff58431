"""Bottlenecks and LoRA in the files of AdapterHub, read.

A folder with `adapter_config.json` and `adapter.safetensors` or `pytorch_adapter.bin`; the adapter's
name stands inside the keys. A bottleneck after a branch, b its output, r the residual stream before it:

    r + b + A(x),   A(x) = norm_after(s·up(act(down(norm_before(x)))))

with x = r beside the branch (`is_parallel`), r + b where the configuration adds the two first
(`original_ln_before`), else b. That holds for blocks that norm before each branch: ViT, CLIP, Whisper.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmadapt.errors import AdapterFileError
from mmadapt.interop.adapterhub_config import Architecture, architecture
from mmadapt.interop.adapterhub_head import place_head
from mmadapt.interop.foreign import ForeignFile, load_tensors, some, told_of
from mmadapt.interop.module_paths import Places
from mmadapt.interop.peft_config import CONFIG, read_json, weights_at
from mmadapt.interop.placing import Placing

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = ("adapter.safetensors", "pytorch_adapter.bin")
_LEGACY = re.compile(r"\.(?:attention_text|layer_text)_(?:task|lang)_adapters\.")
_BOTTLENECK = re.compile(
    r"(.+?\.)(?:output\.)?(attention|cross_attention|output)_adapters\.adapters\.([^.]+)\.(.+)\Z"
)
_NAME = re.compile(r"\.(?:adapters|loras)\.([^.]+)\.")
_LORA = re.compile(r"(.+)\.loras\.([^.]+)\.(lora_[AB])\Z")
#: theirs -> ours; the norm before stands twice in a file, below its own name and as adapter_down.0
_WORDS = {
    "adapter_up.weight": "up",
    "adapter_up.bias": "up_bias",
    "scaling": "scale",
    "adapter_norm_before.weight": "norm_weight",
    "adapter_norm_before.bias": "norm_bias",
    "adapter_norm_after.weight": "after_weight",
    "adapter_norm_after.bias": "after_bias",
}
_BRANCH = {"attention": "attn", "cross_attention": "cross", "output": "mlp"}


def read_adapterhub(
    m: Any, path: str | Path, name: str | None = None, replace: bool = False
) -> ForeignFile:
    """Attach what a folder of AdapterHub holds, under its own name or another; strict about every key.

    Bottlenecks of ViT, CLIP and Whisper, and LoRA. A plain classifier beside them becomes a `Head` where
    the backbone has a site `logits`; what is left out the report tells. Raises `AdapterFileError`
    before anything is changed, naming what cannot be read.

        mm.interop.read_adapterhub(vit, "./cifar")
    """
    folder = Path(path).expanduser()
    config = read_json(folder / CONFIG)
    with told_of(folder):
        return _attach(m, folder, architecture(folder, config), name, replace)


def _attach(
    m: Any, folder: Path, made: Architecture, name: str | None, replace: bool
) -> ForeignFile:
    placing = Placing(Places.of(m))
    stored = load_tensors(weights_at(folder, WEIGHTS))
    renamed = {_LEGACY.sub(".adapters.", key): value for key, value in stored.items()}
    names = {match[1] for key in renamed for match in [_NAME.search(key)] if match}
    if len(renamed) < len(stored) or len(names) > 1:
        raise AdapterFileError(
            f"{folder} holds several adapters in one file: {some(sorted(names))}",
            "save them one by one with AdapterHub's save_adapter",
        )
    place = _place_lora if made.method == "lora" else _place_bottlenecks
    roles = place(placing, made, renamed)
    if made.everywhere:
        placing.require_everywhere(roles)
    notes = [*made.notes, *place_head(placing, folder)]
    attachment = placing.attach(name or made.name, replace)
    return ForeignFile(f"adapterhub {made.method}", len(stored), (), tuple(notes), attachment)


def _place_lora(
    placing: Placing, made: Architecture, stored: Mapping[str, Tensor]
) -> Collection[str]:
    """Place what there is; the roles it stands at."""
    from mmadapt.adapter import LoRA

    pairs: dict[str, dict[str, str]] = {}
    found: set[str] = set()
    for key in stored:
        match = _LORA.match(key)
        if match:
            pairs.setdefault(match[1], {})[match[3]] = key
        else:
            placing.unexpected.append(key)
    for path, keys in pairs.items():
        roles = placing.places.of_module(path)
        if len(roles) != 1 or found & set(roles):
            placing.unexpected += keys.values()
            continue
        found |= set(roles)
        if len(keys) < 2:
            placing.missing += [
                key.replace("lora_A", "lora_B") if "A" in word else key.replace("lora_B", "lora_A")
                for word, key in keys.items()
            ]
            continue
        a, b = stored[keys["lora_A"]], stored[keys["lora_B"]]
        view = placing.places.view(roles[0], LoRA.ports)
        fits = placing.fits(keys["lora_A"], a, made.rank, view.width_in)
        if placing.fits(keys["lora_B"], b, view.width, made.rank) and fits:
            adapter = LoRA(made.rank, made.alpha, made.dropout if view.port == "out" else 0.0)
            placing.put(adapter, roles[0], a=a, b=b)
    return found


@dataclass(frozen=True)
class _Place:
    """Where a bottleneck stands: a block of this backbone and one of its branches."""

    block: str
    branch: str


def _place_bottlenecks(
    placing: Placing, made: Architecture, stored: Mapping[str, Tensor]
) -> Collection[str]:
    """Place what there is; the branches it stands at."""
    found: dict[_Place, dict[str, str]] = {}
    for key in stored:
        match = _BOTTLENECK.match(key)
        block, rest = placing.places.block(match[1]) if match else ("", "")
        place = _Place(block, _BRANCH[match[2]]) if match else None
        known = place is not None and f"{block}.{place.branch}" in placing.places.spans
        if match is None or place is None or not known or rest:
            placing.unexpected.append(key)
        else:
            if found.setdefault(place, {}).setdefault(match[4], key) != key:
                placing.unexpected.append(key)
    for place, keys in found.items():
        _place_bottleneck(placing, made, place, keys, stored)
    return {f"{place.block}.{place.branch}" for place in found}


def _place_bottleneck(
    placing: Placing,
    made: Architecture,
    place: _Place,
    keys: Mapping[str, str],
    stored: Mapping[str, Tensor],
) -> None:
    linear = "adapter_down.1" if made.norm_before else "adapter_down.0"
    words = {f"{linear}.weight": "down", f"{linear}.bias": "down_bias", **_WORDS}
    wanted = {theirs: ours for theirs, ours in words.items() if made.has(ours)}
    twice = {"adapter_down.0.weight", "adapter_down.0.bias"} if made.norm_before else set()
    front = next(iter(keys.values())).removesuffix(next(iter(keys)))
    placing.missing += [front + word for word in sorted(wanted.keys() - keys.keys())]
    placing.unexpected += [keys[word] for word in sorted(keys.keys() - wanted.keys() - twice)]
    if not wanted.keys() <= keys.keys():
        return
    down = stored[keys[f"{linear}.weight"]]
    width = len(down)
    channels = placing.places.view(f"{place.block}.{place.branch}", ("out",)).width
    shapes = {
        "down": (width, channels),
        "down_bias": (width,),
        "up": (channels, width),
        "scale": (1,) if made.scale == "learned" else (channels,),
    }
    tensors = {ours: stored[keys[theirs]] for theirs, ours in wanted.items()}
    fit = [
        placing.fits(keys[theirs], stored[keys[theirs]], *shapes.get(ours, (channels,)))
        for theirs, ours in wanted.items()
    ]
    if all(fit):
        role, adapter = made.bottleneck(width, place.block, place.branch)
        placing.put(adapter, role, **made.ours(tensors))
