"""LLaMA-Adapter in the files of its authors, of PEFT and of LitGPT.

Five layouts, told apart by their keys. "peft": a folder with `adapter_config.json` and
`adapter_model.safetensors`, one gate a layer, no tanh. "official": a `.pth` with `adapter_query.weight`
(tokens of all layers, one below the other) and `layers.{i}.attention.gate` of every layer; whether a
tanh belongs to the gates it does not say. "official_v2": a `.pth` with norms, biases and scales on the
input of every linear, as the chat models of V2 were released. "official_v2_images": a `.pth` of V2's
models for images, read only. "litgpt": a `.pth.adapter` with tokens and gates of every layer, no tanh.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmadapt.core.backbone import unwrap
from mmadapt.errors import AdapterFileError, did_you_mean
from mmadapt.interop.foreign import (
    ForeignFile,
    attention_of,
    depth_of,
    load_pickle,
    load_tensors,
    refuse_keys,
    some,
)
from mmadapt.interop.litgpt import is_litgpt, read_litgpt, write_litgpt
from mmadapt.interop.llama_adapter_images import read_images
from mmadapt.interop.llama_adapter_v2 import read_chat, write_chat
from mmadapt.interop.peft_config import CONFIG, WEIGHTS, read_json, weights_at
from mmadapt.interop.tokens import attach_tokens, attached_tokens, check_depth

if TYPE_CHECKING:
    from torch import Tensor

LAYOUTS = ("peft", "official", "official_v2", "litgpt")
_PEFT_KEY = re.compile(r"(?:.*\.)?layers\.(\d+)\.self_attn\.adaption_(prompt|gate)(?:\.default)?\Z")


def read_llama_adapter(
    m: Any,
    path: str | Path,
    name: str = "default",
    activation: str | None = None,
    length: int | None = None,
    replace: bool = False,
) -> ForeignFile:
    """Attach what a file of the authors or a folder of PEFT holds; strict about every key.

    `activation` says what stands before the gates of an "official" file: "tanh" for files that the
    released training code wrote, "identity" to compute as the released inference script does. PEFT's
    and LitGPT's gates have none. Nor does such a file say how many tokens a layer has: `length`; without it
    the layers are those from the first open gate on, and a note says so. Of V2's models for images the
    report's `encoder` makes of CLIP's tokens what `mm.context(m, visual=…)` wants. Raises
    `AdapterFileError`, naming the keys, before anything is changed.

        mm.interop.read_llama_adapter(llama, "./alpaca", name="alpaca")
    """
    path = Path(path).expanduser()
    if path.is_dir():
        return _read_peft(m, path, name, activation, replace)
    tensors = load_pickle(path)
    if is_litgpt(tensors):
        return read_litgpt(m, tensors, name, activation, replace)
    if "visual_query.weight" in tensors:
        return read_images(m, tensors, name, activation, replace)
    if "adapter_query.weight" in tensors:
        return _read_official(m, tensors, name, activation, length, replace)
    if any(key.endswith(("_scale", "_bias")) for key in tensors):
        return read_chat(m, tensors, name, replace)
    raise AdapterFileError(
        f"{path} is no LLaMA-Adapter file: it holds {some(tensors)}",
        "expected adapter_query.weight, or layers.0.attention.wq_scale and others alike",
    )


def write_llama_adapter(
    m: Any,
    path: str | Path,
    layout: str,
    name: str | None = None,
    activation: str | None = None,
) -> ForeignFile:
    """Write an attachment to a folder for PEFT, or to a file as the authors' code reads it.

    "official" needs `activation`, what the reading code puts before the gates. Raises
    `AdapterFileError` where the layout cannot say what is attached: gates that differ between heads
    for PEFT, tokens that are not those of the top layers, features of images.
    """
    if layout not in LAYOUTS:
        raise AdapterFileError(f"unknown layout {layout!r}", did_you_mean(str(layout), LAYOUTS))
    path = Path(path).expanduser()
    if layout == "official_v2":
        return write_chat(m, path, name)
    return _write_tokens(m, path, layout, name, activation)


# -- tokens and gates ---------------------------------------------------------------------------------


def _read_peft(
    m: Any, folder: Path, name: str, activation: str | None, replace: bool
) -> ForeignFile:
    config: dict[str, Any] = read_json(folder / CONFIG)
    if config.get("peft_type") != "ADAPTION_PROMPT":
        raise AdapterFileError(
            f"{folder} holds PEFT's {config.get('peft_type')!r}, expected 'ADAPTION_PROMPT'"
        )
    if activation not in (None, "identity"):
        raise AdapterFileError(
            f"activation is {activation!r}, and PEFT's gates have none", "leave it out"
        )
    stored = load_tensors(weights_at(folder, WEIGHTS))
    matches = {key: _PEFT_KEY.fullmatch(key) for key in stored}
    found = {(int(k[1]), k[2]): stored[key] for key, k in matches.items() if k is not None}
    unexpected = [key for key, match in matches.items() if match is None]
    length: Any = config.get("adapter_len")
    count: Any = config.get("adapter_layers")
    depth = depth_of(m)
    check_depth(count, depth)
    wanted = {(i, part) for i in range(depth - count, depth) for part in ("prompt", "gate")}
    refuse_keys(
        [f"layers.{i}.self_attn.adaption_{part}" for i, part in sorted(wanted - found.keys())],
        unexpected + [f"layers.{i} ({part})" for i, part in sorted(found.keys() - wanted)],
    )
    tensors = {}
    for i in range(depth - count, depth):
        tensors[i] = (
            found[i, "prompt"].reshape(-1, found[i, "prompt"].shape[-1]),
            found[i, "gate"],
        )
    doubled = "PEFT adds the output projection's bias a second time, which this does not"
    return attach_tokens(
        m, name, length, tensors, "layer", "identity", "peft", (),
        notes=(doubled,) if _output_bias(m) else (), replace=replace,
    )  # fmt: skip


def _read_official(
    m: Any,
    stored: dict[str, Tensor],
    name: str,
    activation: str | None,
    length: int | None,
    replace: bool,
) -> ForeignFile:
    if activation not in ("tanh", "identity"):
        raise AdapterFileError(
            f"activation is {activation!r}, and the file does not say what stands before its gates",
            'pass activation="tanh" for files of the released training code, "identity" to compute '
            "as the released inference script does",
        )
    depth = depth_of(m)
    gates = {f"layers.{i}.attention.gate": i for i in range(depth)}
    rows = stored["adapter_query.weight"]
    here = sorted(gates[key] for key in stored.keys() & gates.keys())
    unexpected = sorted(stored.keys() - gates.keys() - {"adapter_query.weight"})
    notes: tuple[str, ...] = ()
    if length is not None:
        if type(length) is not int or length < 1 or rows.shape[0] % length:
            raise AdapterFileError(
                f"length is {length!r}, and adapter_query.weight has {rows.shape[0]} rows",
                "give the tokens of a layer, a divisor of the rows",
            )
        count = rows.shape[0] // length
    else:
        opened = [i for i in here if bool(stored[f"layers.{i}.attention.gate"].any())]
        count = depth - min(opened, default=0)
        if rows.shape[0] % count:
            raise AdapterFileError(
                f"{count} layers from the first open gate on cannot share the {rows.shape[0]} rows "
                "of adapter_query.weight",
                "pass length=, the tokens of a layer",
            )
        notes = (f"{rows.shape[0] // count} tokens in {count} layers, as their open gates say",)
    check_depth(count, depth)
    top = range(depth - count, depth)
    refuse_keys([f"layers.{i}.attention.gate" for i in top if i not in here], unexpected)
    blocks = rows.chunk(count)
    tensors = {
        i: (block, stored[f"layers.{i}.attention.gate"].flatten())
        for i, block in zip(top, blocks, strict=True)
    }
    ignored = tuple(f"layers.{i}.attention.gate" for i in here if i not in top)
    gate = "layer" if all(len(g) == 1 for _, g in tensors.values()) else "head"
    return attach_tokens(
        m, name, len(blocks[0]), tensors, gate, activation, "official", ignored, notes, replace
    )


def _write_tokens(
    m: Any, path: Path, layout: str, name: str | None, activation: str | None
) -> ForeignFile:
    import torch

    convention = activation if layout == "official" else "identity"
    prompts, gates, depth = attached_tokens(m, layout, name, convention)
    if layout == "peft":
        return _write_peft(path, prompts, gates, depth)
    heads = attention_of(m).heads
    if layout == "litgpt":
        return write_litgpt(path, prompts, [gate.expand(heads) for gate in gates], depth)
    whole = [torch.zeros(1, heads, 1, 1)] * (depth - len(prompts))
    whole += [gate.expand(heads).reshape(1, heads, 1, 1).clone() for gate in gates]
    stored = {f"layers.{i}.attention.gate": gate for i, gate in enumerate(whole)}
    torch.save({"adapter_query.weight": torch.cat(prompts), **stored}, path)
    return ForeignFile(layout, 1 + len(whole))


def _write_peft(
    folder: Path, prompts: list[Tensor], gates: list[Tensor], depth: int
) -> ForeignFile:
    from safetensors.torch import save_file

    stored: dict[str, Tensor] = {}
    for place, (prompt, gate) in enumerate(zip(prompts, gates, strict=True)):
        i = depth - len(prompts) + place
        if not bool((gate == gate[0]).all()):
            raise AdapterFileError(
                f"the gates of layer {i} differ between heads, and PEFT has one a layer",
                'train with gate="layer", or write layout="official"',
            )
        key = f"base_model.model.model.layers.{i}.self_attn"
        stored[f"{key}.adaption_prompt"] = prompt[None].contiguous()
        stored[f"{key}.adaption_gate"] = gate[:1].clone()
    config = {
        "peft_type": "ADAPTION_PROMPT",
        "task_type": "CAUSAL_LM",
        "adapter_len": len(prompts[0]),
        "adapter_layers": len(prompts),
        "target_modules": "self_attn",
        "inference_mode": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    save_file(stored, folder / WEIGHTS[0], {"format": "pt"})
    return ForeignFile("peft", len(stored))


def _output_bias(m: Any) -> bool:
    model, anatomy, _ = unwrap(m)
    return "text.layers[0].attn.o.bias" in anatomy.roles(model)
