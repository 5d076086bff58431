"""LoRA written as PEFT reads it: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmadapt.core.attached import require_bank, require_name
from mmadapt.core.store import replace_file
from mmadapt.errors import AdapterFileError
from mmadapt.interop.foreign import ForeignFile
from mmadapt.interop.module_paths import Places
from mmadapt.interop.peft import LAYOUT, PREFIX
from mmadapt.interop.peft_config import CONFIG, LAST_TWICE, WEIGHTS

if TYPE_CHECKING:
    from torch import Tensor

_PACKED = "in_proj_weight"


def write_peft(m: Any, folder: str | Path, name: str | None = None) -> ForeignFile:
    """Write an attachment to a folder that `peft.PeftModel.from_pretrained` reads with this model.

    It has to be made of `LoRA`, `Unlock` and a plain `Head` at `logits`; the last two become PEFT's
    `modules_to_save`. Changes of q, k and v of one packed projection become one of the sum of their
    ranks. Raises `AdapterFileError` for what PEFT has no place for, before a file is touched.

        mm.interop.write_peft(vit, "./lora", name="pets")
    """
    from safetensors.torch import save as to_bytes

    file = _collect(m, name)
    stored = {**file.pairs(), **file.wholes()}
    config = file.config()
    target = Path(folder).expanduser()
    if target.exists() and not target.is_dir():
        raise AdapterFileError(f"{target} is a file", "PEFT's adapters are folders")
    target.mkdir(parents=True, exist_ok=True)
    plain = {key: value.detach().cpu().contiguous() for key, value in stored.items()}
    replace_file(target / WEIGHTS[0], to_bytes(plain, {"format": "pt"}))
    replace_file(target / CONFIG, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
    return ForeignFile(LAYOUT, len(stored), notes=tuple(file.notes))


@dataclass(frozen=True)
class _Change:
    """A LoRA at one role: A (R, inputs …), B (outputs, R) and the factor on their product."""

    adapter: Any
    a: Tensor
    b: Tensor
    scale: float


@dataclass(eq=False)
class _File:
    """What is to be written, by the paths of modules."""

    places: Places
    #: module -> the changes of its weight by the place of their rows; of its output projection by "o"
    changes: dict[str, dict[int | str, _Change]] = field(default_factory=dict)
    #: module -> its own tensors as they are after training, and the names of those that changed
    whole: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    trained: dict[str, set[str]] = field(default_factory=dict)
    #: module -> (rank, alpha) as PEFT scales them
    scaled: dict[str, tuple[int, float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    # -- collecting

    def lora(self, adapter: Any, role: str, layer: Any) -> None:
        path, part = self._module(role)
        change = _Change(adapter, layer.a.detach().cpu(), layer.b.detach().cpu(), layer.scale)
        if self.changes.setdefault(path, {}).setdefault(part, change) is not change:
            raise AdapterFileError(f"two LoRAs of the attachment change {role}", "save one of them")

    def _module(self, role: str) -> tuple[str, int | str]:
        """The module that PEFT wraps, and which part of it the role is."""
        span = self.places.spans[role]
        path, _, parameter = span.weight.rpartition(".")
        if parameter == _PACKED:
            return path, span.block[0]
        if parameter != "weight" or not path:
            raise AdapterFileError(
                f"{role} is the tensor {span.weight!r}, and PEFT changes weights of modules",
                "save it with mmadapt.save",
            )
        around = path.rpartition(".")[0]
        if hasattr(self.places.model.get_submodule(around), _PACKED):
            return around, "o"
        return path, span.block[0]

    def unlock(self, role: str, layer: Any) -> None:
        span = self.places.spans[role]
        path, _, parameter = span.weight.rpartition(".")
        module: Any = self.places.model.get_submodule(path)
        if list(module.children()) or not path:
            raise AdapterFileError(
                f"{role} is the tensor {span.weight!r}, whose module holds others, and PEFT trains "
                "modules whole",
                "save it with mmadapt.save",
            )
        tensors = self.whole.setdefault(
            path, {key: value.detach().clone() for key, value in module.state_dict().items()}
        )
        self.trained.setdefault(path, set()).add(parameter)
        rows = slice(*self.places.view(role, ("weight",)).rows)
        tensors[parameter][rows] += layer.change.detach().to(tensors[parameter])

    def head(self, adapter: Any, role: str, layer: Any) -> None:
        span = self.places.spans[role]
        module: Any = self.places.model.get_submodule(span.module)
        if role != "logits" or adapter.norm or not span.weight:
            raise AdapterFileError(
                f"{adapter!r} at {role} is no plain output layer in the place of the model's own",
                "a Head without a norm at 'logits' is one, where the output is not tied",
            )
        tensors = {"weight": layer.matrix.detach(), "bias": layer.bias.detach()}
        if module.bias is None:
            if bool(tensors.pop("bias").any()):
                raise AdapterFileError(f"the Head has a bias, and {span.module!r} has none")
        self.whole[span.module] = tensors
        self.trained[span.module] = set(tensors)
        if len(module.weight) != adapter.classes:
            self.notes.append(
                f"PEFT reads it with a model of {adapter.classes} classes, and this one has "
                f"{len(module.weight)}"
            )

    # -- writing

    @property
    def biases(self) -> set[str]:
        """Modules of which the bias alone was trained."""
        return {path for path, words in self.trained.items() if words == {"bias"}}

    @property
    def modules_to_save(self) -> set[str]:
        """Modules that PEFT keeps whole."""
        return self.whole.keys() - self.biases

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def pairs(self) -> dict[str, Tensor]:
        """The tensors of every LoRA, by their keys."""
        from mmadapt.interop.packed import pack

        found: dict[str, Tensor] = {}
        for path, parts in self.changes.items():
            if path in self.modules_to_save:
                raise AdapterFileError(
                    f"{path!r} is changed by a LoRA and trained itself, and PEFT does either",
                    "save it with mmadapt.save",
                )
            scale = next((change.scale for change in parts.values() if change.scale), 1.0)
            of_rows = {
                place: (change.a, change.b * (change.scale / scale))
                for place, change in parts.items()
                if isinstance(place, int)
            }
            module: Any = self.places.model.get_submodule(path)
            if hasattr(module, _PACKED):
                ends = self._attention(path, module, of_rows, parts.get("o"), scale)
            else:
                blocks = len(self.places.weights[f"{path}.weight"])
                (a, b) = of_rows[0] if blocks == 1 else pack(of_rows, blocks)
                ends = {"": (a, b.reshape(*b.shape, *(1,) * (a.ndim - 2)))}
            for end, (a, b) in ends.items():
                found[f"{PREFIX}{path}{end}.lora_A.weight"] = a
                found[f"{PREFIX}{path}{end}.lora_B.weight"] = b
            self.scaled[path] = (len(ends[""][0]), scale)
        return found

    def _attention(
        self,
        path: str,
        module: Any,
        of_rows: Mapping[int, tuple[Tensor, Tensor]],
        output: _Change | None,
        scale: float,
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """PEFT wraps both projections of a `nn.MultiheadAttention`, with one rank and one scale."""
        from mmadapt.interop.packed import pack, widen

        width = module.embed_dim
        empty = module.in_proj_weight.detach().cpu().new_zeros(0, width)
        rows = pack(of_rows, 3) if of_rows else (empty, empty.new_zeros(3 * width, 0))
        out = (empty, empty.new_zeros(width, 0))
        if output is not None:
            out = (output.a, output.b * (output.scale / scale / 2))  # PEFT adds it twice
            self._note("written for PEFT up to 0.21, which adds changes of packed outputs twice")
        rank = max(len(rows[0]), len(out[0]))
        return {"": widen(*rows, rank), ".base_layer.out_proj": widen(*out, rank)}

    def wholes(self) -> dict[str, Tensor]:
        """The tensors of modules that were trained whole, by their keys."""
        names = [name for name, _ in self.places.model.named_modules()]
        for path in sorted(self.modules_to_save):
            if self._wrapped(path) != path:
                raise AdapterFileError(
                    f"{path!r} is trained itself inside an attention that a LoRA changes, and PEFT does "
                    "either",
                    "save it with mmadapt.save",
                )
            others = [name for name in names if name.endswith(path) and name != path]
            if others:
                raise AdapterFileError(
                    f"PEFT finds modules to save by the end of their path, and {path!r} ends "
                    f"{others[0]!r} too",
                    "save it with mmadapt.save",
                )
        return {
            f"{PREFIX}{self._wrapped(path)}.{word}": tensor
            for path, tensors in self.whole.items()
            for word, tensor in tensors.items()
            if path in self.modules_to_save or word == "bias"
        }

    def _wrapped(self, path: str) -> str:
        """Where a module stands once PEFT has wrapped those that LoRAs change."""
        if path in self.changes:
            return f"{path}.base_layer"
        around, _, own = path.rpartition(".")
        return f"{around}.base_layer.{own}.base_layer" if around in self.changes else path

    def config(self) -> dict[str, Any]:
        """What `adapter_config.json` says."""
        adapters = [one.adapter for parts in self.changes.values() for one in parts.values()]
        if not adapters:
            raise AdapterFileError(
                "the attachment has no LoRA, and PEFT trains whole modules beside one only",
                "save it with mmadapt.save",
            )
        stabilized = all(adapter.rank_stabilized for adapter in adapters)
        alphas = {
            path: scale * (rank**0.5 if stabilized else rank)
            for path, (rank, scale) in self.scaled.items()
        }
        (rank, alpha), _ = Counter(
            (rank, alphas[path]) for path, (rank, _) in self.scaled.items()
        ).most_common(1)[0]
        dropouts = {adapter.dropout for adapter in adapters}
        if len(dropouts) > 1:
            self.notes.append(f"PEFT has one dropout for all: {max(dropouts):g}")
        model: Any = self.places.model
        return {
            "peft_type": "LORA",
            "task_type": None,
            "auto_mapping": {
                "base_model_class": type(model).__name__,
                "parent_library": type(model).__module__,
            },
            "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", ""),
            "inference_mode": True,
            "target_modules": self._targets(),
            "r": rank,
            "lora_alpha": _number(alpha),
            "lora_dropout": max(dropouts),
            "rank_pattern": {f"^{p}": r for p, (r, _) in self.scaled.items() if r != rank},
            "alpha_pattern": {f"^{p}": _number(a) for p, a in alphas.items() if a != alpha},
            "use_rslora": stabilized,
            "bias": "all"
            if self.biases - self.changes.keys()
            else "lora_only"
            if self.biases
            else "none",
            "fan_in_fan_out": False,
            "modules_to_save": sorted(self.modules_to_save) or None,
            "peft_version": ".".join(map(str, LAST_TWICE)),
        }

    def _targets(self) -> list[str] | str:
        """Whole paths; a pattern where PEFT, which matches ends too, would find more."""
        names = [name for name, _ in self.places.model.named_modules()]
        ends = any(
            name.endswith(f".{path}") and name not in self.changes
            for path in self.changes
            for name in names
        )
        return "|".join(map(re.escape, self.changes)) if ends else list(self.changes)


def _number(value: float) -> float | int:
    value = round(value, 9)
    return int(value) if value == int(value) else value


def _collect(m: Any, name: str | None) -> _File:
    """The layers of an attachment by the modules they change."""
    _, bank = require_bank(m)
    name = require_name(bank, name, "write_peft")
    record, layers = bank.records[name], dict(bank.layers_of(name))
    file = _File(Places.of(m))
    for index, (adapter, sites) in enumerate(zip(record.adapters, record.sites, strict=True)):
        for site in sites:
            role, layer = site.rpartition(":")[0], layers[f"{index}/{site}"]
            if adapter.method == "lora":
                file.lora(adapter, role, layer)
            elif adapter.method == "unlock":
                file.unlock(role, layer)
            elif adapter.method == "head":
                file.head(adapter, role, layer)
            else:
                raise AdapterFileError(
                    f"PEFT's LoRA files have no place for {adapter!r}",
                    "write what is made of LoRA, Unlock and Head, or save it with mmadapt.save",
                )
    return file
