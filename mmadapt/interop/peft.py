"""LoRA in the files of PEFT, read.

A folder with `adapter_config.json` and `adapter_model.safetensors` (or `.bin`), keyed by module paths:
`base_model.model.{path}.lora_A.weight` (R, inputs …) and `.lora_B.weight` (outputs, R …), the change
alpha/R · B·A, or alpha/√R · B·A where the file says so. `nn.MultiheadAttention` has a pair for its
packed q, k and v and one, below `base_layer.out_proj`, for its output. Modules that were trained whole
and biases stand there as they are after training.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmadapt.errors import AdapterFileError
from mmadapt.interop.foreign import ForeignFile, load_tensors, told_of
from mmadapt.interop.module_paths import Places
from mmadapt.interop.peft_config import CONFIG, WEIGHTS, LoraFile, lora_file, read_json, weights_at
from mmadapt.interop.placing import Placing

if TYPE_CHECKING:
    from torch import Tensor

    from mmadapt.adapter import Adapter

LAYOUT = "peft lora"
PREFIX = "base_model.model."
_LORA = re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.(weight|bias)\Z")
_PLAIN = re.compile(r"(.+?)(?:\.modules_to_save)?(?:\.default)?\.(weight|bias)\Z")
_INNER = ".base_layer"
_OUTPUT = f"{_INNER}.out_proj"  # of a packed attention


def read_peft(
    m: Any, path: str | Path, name: str = "default", replace: bool = False
) -> ForeignFile:
    """Attach the LoRA that a folder of PEFT holds; strict about every key.

    Module paths are those of this backbone or of another release or library that
    `mmadapt.interop.module_paths` knows. Modules trained whole become `Unlock`s, a classifier a `Head`.
    Raises `AdapterFileError` before anything is changed: for variants of LoRA, naming them, and for
    keys that are missing, left over or of another shape. `mmadapt.load_adapter` reads PEFT's
    adaption prompts too.

        mm.interop.read_peft(vit, "./lora")
    """
    folder = Path(path).expanduser()
    config = read_json(folder / CONFIG)
    if config.get("peft_type") != "LORA":
        raise AdapterFileError(
            f"{folder} holds PEFT's {config.get('peft_type')!r}, expected 'LORA'",
            "ADAPTION_PROMPT is read by mmadapt.interop.read_llama_adapter; others are not",
        )
    settings = lora_file(folder / CONFIG, config)
    stored = load_tensors(weights_at(folder, WEIGHTS))
    file = _Lora(settings, Placing(Places.of(m)))
    with told_of(folder):
        file.take(stored)
        attachment = file.placing.attach(name, replace)
    return ForeignFile(
        LAYOUT,
        len(stored),
        notes=tuple(file.notes),
        attachment=attachment,
        converted=tuple(file.converted),
    )


@dataclass(eq=False)
class _Lora:
    """A file on its way to the roles of a backbone."""

    settings: LoraFile
    placing: Placing
    notes: list[str] = field(default_factory=list)
    converted: list[str] = field(default_factory=list)
    #: roles a pair of the file stands for
    found: set[str] = field(default_factory=set)

    def take(self, stored: Mapping[str, Tensor]) -> None:
        """Place every tensor; what cannot be placed is listed in `placing`."""
        pairs: dict[str, dict[tuple[str, str], str]] = {}
        plain: dict[str, dict[str, str]] = {}
        for key in stored:
            short = key.removeprefix(PREFIX)
            pair, alone = _LORA.match(short), _PLAIN.match(short)
            if pair:
                kept = pairs.setdefault(pair[1], {}).setdefault((pair[2], pair[3]), key)
            elif alone and ".lora_" not in short:
                kept = plain.setdefault(alone[1], {}).setdefault(alone[2], key)
            else:
                kept = ""
            if kept != key:  # of no module, or there in another spelling
                self.placing.unexpected.append(key)
        for path, keys in pairs.items():
            self._pair(path, keys, stored)
        for path, keys in plain.items():
            self._whole(path, keys, stored)
        self._everywhere(list(pairs))

    def _pair(
        self, path: str, keys: Mapping[tuple[str, str], str], stored: Mapping[str, Tensor]
    ) -> None:
        from mmadapt.interop.packed import unpack

        roles = self.placing.places.of_module(path.replace(_INNER, ""))
        if not roles or ("A", "bias") in keys or self.found & set(roles):
            self.placing.unexpected += keys.values()
            return
        self.found |= set(roles)
        half = [f"{PREFIX}{path}.lora_{w}.weight" for w in "AB" if (w, "weight") not in keys]
        if half:
            self.placing.missing += half
            return
        key_a, key_b = keys["A", "weight"], keys["B", "weight"]
        a, b = stored[key_a], stored[key_b]
        rank, alpha = self.settings.at(path.partition(_INNER)[0])
        inputs, outputs = self._shape(roles[0])
        taps = (1,) * (len(inputs) - 1)
        fits = self.placing.fits(key_a, a, rank, *inputs)
        if not self.placing.fits(key_b, b, outputs * len(roles), rank, *taps) or not fits:
            return
        if path.endswith(_OUTPUT) and self.settings.twice:
            alpha *= 2
            self._note("PEFT's releases up to 0.21 add changes of packed attentions' outputs twice")
        scale = alpha / (rank**0.5 if self.settings.stabilized else rank)
        b = b.flatten(1)
        changes = unpack(a, b, len(roles)) if len(roles) > 1 else [(a, b)]
        for role, change in zip(roles, changes, strict=True):
            if change is not None:
                adapter = self._adapter(role, len(change[0]), rank, alpha, scale)
                self.placing.put(adapter, role, a=change[0], b=change[1])
        if ("B", "bias") in keys:  # added to the outputs, so to the bias
            key = keys["B", "bias"]
            self._changes(roles, "bias", key, {key: scale * stored[key]}, added=True)

    def _shape(self, role: str) -> tuple[tuple[int, ...], int]:
        """(inputs and taps, outputs) of the weight at a role."""
        view = self.placing.places.view(role, ("weight",))
        assert view.holder is not None
        return tuple(view.holder.get_parameter(view.parameter).shape[1:]), view.width

    def _adapter(self, role: str, rank: int, filed: int, alpha: float, scale: float) -> Adapter:
        from mmadapt.adapter import LoRA

        called = "out" in self.placing.places.spans[role].ports
        dropout = self.settings.dropout if called else 0.0
        if self.settings.dropout and not called:
            self._note("weights that their module reads itself train without the file's dropout")
        if rank != filed:  # fewer of a packed projection's rows were in use here
            return LoRA(rank, scale * rank, dropout)
        return LoRA(rank, alpha, dropout, self.settings.stabilized)

    def _whole(self, path: str, keys: Mapping[str, str], stored: Mapping[str, Tensor]) -> None:
        """A module that was trained whole, or a bias."""
        roles = self.placing.places.of_module(path.replace(_INNER, ""))
        if not roles:
            self.placing.unexpected += keys.values()
        elif roles == ("logits",) and "weight" in keys:
            self._head(keys, stored)
        else:
            for word, key in keys.items():
                self._changes(roles, word, key, stored)

    def _head(self, keys: Mapping[str, str], stored: Mapping[str, Tensor]) -> None:
        from mmadapt.adapter import Head

        matrix = stored[keys["weight"]]
        classes = len(matrix)
        bias = stored[keys["bias"]] if "bias" in keys else matrix.new_zeros(classes)
        features = self.placing.places.view("logits", Head.ports).width_in
        fits = self.placing.fits(keys["weight"], matrix, classes, features)
        if fits and self.placing.fits(keys.get("bias", ""), bias, classes):
            self.placing.put(Head(classes), "logits", matrix=matrix, bias=bias)
            self._note(f"an output layer of {classes} classes takes the place of the backbone's")

    def _changes(
        self,
        roles: tuple[str, ...],
        word: str,
        key: str,
        stored: Mapping[str, Tensor],
        added: bool = False,
    ) -> None:
        """What a tensor of the file changes of the backbone's own, or adds to it, by the roles' rows."""
        from mmadapt.adapter import Unlock

        named = roles if word == "weight" else tuple(f"{role}.bias" for role in roles)
        if not all(role in self.placing.places.spans for role in named):
            self.placing.unexpected.append(key)
            return
        own = [self.placing.places.tensor(role) for role in named]
        value = stored[key]
        if not self.placing.fits(key, value, sum(map(len, own)), *own[0].shape[1:]):
            return
        for role, here, rows in zip(
            named, own, value.split([len(one) for one in own]), strict=True
        ):
            change = rows.to(here) if added else rows.to(here) - here
            before = self.placing.adapters.get(Unlock(), {}).get(role, {}).get("change", 0)
            self.placing.put(Unlock(), role, change=before + change)
        self.converted.append(key)

    def _everywhere(self, paths: list[str]) -> None:
        """Where names of the file stand for the modules of every layer, each layer has to be there."""
        ends = self.settings.everywhere
        named = [path for path in (p.replace(_INNER, "") for p in paths) if _ends(path, ends)]
        roles = {role for path in named for role in self.placing.places.of_module(path)}
        self.placing.require_everywhere(roles & self.found)
        for end in ends:
            if not any(_ends(path, (end,)) for path in named):
                self._note(f"target_modules names {end!r}, which no tensor of the file belongs to")

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


def _ends(path: str, names: tuple[str, ...]) -> bool:
    """Whether a module's path is one of these names or ends with one."""
    return f".{path}".endswith(tuple(f".{name}" for name in names))
