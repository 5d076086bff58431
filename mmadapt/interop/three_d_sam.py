"""3DSAM-adapter in the files of its authors.

A `.pth.tar` holds `encoder_dict` (the whole image encoder with what was added to it), `feature_dict`
(four prompt encoders, of which the last is used), `decoder_dict`, and what training needed. Their axes
are (height, width, depth), ours (depth, height, width), so kernels are turned. What the backbone has
already must equal it; shift masks, prompt encoders that are not used and attentions that are never
called are left out.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmadapt.core.backbone import unwrap
from mmadapt.errors import AdapterFileError
from mmadapt.interop.foreign import ForeignFile, install_tensors, refuse_keys, some, unpickled
from mmadapt.interop.sam import to_segment_anything

if TYPE_CHECKING:
    from torch import Tensor

_PARTS = ("encoder_dict", "decoder_dict")
_LEVELS, _LAYERS = 4, 2


def read_three_d_sam(
    m: Any,
    path: str | Path,
    crop: int = 128,
    heads: int = 8,
    name: str = "default",
    replace: bool = False,
) -> ForeignFile:
    """Attach what a checkpoint of the authors holds, to compute as their code does.

    `crop` is the side in voxels of the cubes it was trained on, `heads` those of its prompt encoder;
    the file does not say. A file without prompt encoders gives an adapter without prompts. Every key
    is used, left out for a reason that the report names, or an error; so is a tensor of the encoder
    that differs from the backbone's. Raises `AdapterFileError` before anything is changed.

        mm.interop.read_three_d_sam(sam, "best.pth.tar", crop=128)
    """
    stored = load_checkpoint(Path(path).expanduser())
    encoder = _Keys("encoder_dict", stored["encoder_dict"])
    decoder = _Keys("decoder_dict", stored["decoder_dict"])
    clicks = _clicks_of(stored)
    base = _base(m)
    values = {
        **_encoder(encoder, base),
        **_decoder(decoder),
        **(_clicks(clicks) if clicks else {}),
    }
    mask = encoder.drop(r"blocks\.\d+\.attn\.attn_mask")
    dead = clicks.drop(r"(.*\.)?layers\.\d+\.cross_attn_token_to_image\..*") if clicks else {}
    unused = clicks.drop(r"(.*\.)?(pe_layer|positional)\S*") if clicks else {}
    same = _same_as_backbone(encoder, base)
    parts = [part for part in (encoder, decoder, clicks) if part is not None]
    refuse_keys(
        [key for part in parts for key in part.missing],
        [key for part in parts for key in part.left()],
    )
    adapter = _adapter(values, mask, crop, heads)
    attachment = install_tensors(m, (adapter,), name, values, replace)
    skipped = tuple(sorted(key for part in parts for key in part.dropped))
    converted = sum(len(part.used) for part in parts)
    notes = (
        f"{converted} tensors converted, {len(skipped)} left out",
        f"{len(same)} equal the backbone's, {len(mask)} are shift masks, {len(dead)} belong to "
        f"attentions that are never called, {len(unused)} are never read",
    )
    return ForeignFile("3dsam-adapter", converted, skipped, notes, attachment)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The checkpoint with its parts."""
    stored = unpickled(path)
    if not isinstance(stored, dict) or any(part not in stored for part in _PARTS):
        held = some(stored) if isinstance(stored, dict) else type(stored).__name__
        raise AdapterFileError(
            f"{path} is no checkpoint of 3DSAM-adapter: it holds {held}",
            f"expected {', '.join(_PARTS)} and, with prompts, feature_dict",
        )
    return stored


class _Keys:
    """Tensors by name; which were taken, and which were looked for in vain."""

    def __init__(self, part: str, tensors: dict[str, Tensor]) -> None:
        self.part = part
        self.tensors = {key.removeprefix("module."): value for key, value in tensors.items()}
        self.used: set[str] = set()
        self.dropped: set[str] = set()
        self.missing: list[str] = []

    def take(self, key: str) -> Tensor | None:
        """The tensor of this name."""
        return self._taken([key] if key in self.tensors else [], key)

    def find(self, pattern: str, ndim: int, what: str) -> Tensor | None:
        """The only tensor whose name fits `pattern` and that has so many axes longer than 1."""
        fitting = [
            key
            for key, value in self.tensors.items()
            if re.fullmatch(pattern, key) and value.squeeze().ndim == ndim
        ]
        return self._taken(fitting, what)

    def _taken(self, found: list[str], what: str) -> Tensor | None:
        if len(found) != 1:
            self.missing.append(f"{self.part}: {what}")
            return None
        self.used.add(found[0])
        return self.tensors[found[0]]

    def drop(self, pattern: str) -> dict[str, Tensor]:
        """Leave out what fits."""
        found = {
            k: v
            for k, v in self.tensors.items()
            if re.fullmatch(pattern, k) and k not in self.used | self.dropped
        }
        self.dropped |= found.keys()
        return found

    def left(self) -> list[str]:
        """Names that were neither taken nor left out."""
        return [f"{self.part}: {k}" for k in self.tensors if k not in self.used | self.dropped]


def _clicks_of(stored: dict[str, Any]) -> _Keys | None:
    encoders = stored.get("feature_dict")
    if not encoders:
        return None
    if not isinstance(encoders, (list, tuple)) or len(encoders) != _LEVELS:
        raise AdapterFileError(
            f"feature_dict is a {type(encoders).__name__} of {len(encoders)}, expected a list of 4"
        )
    return _Keys("feature_dict[3]", encoders[-1])


def _base(m: Any) -> dict[str, Tensor]:
    """The backbone's image encoder, by segment_anything's names."""
    model, _, _ = unwrap(m)
    own = {k: v for k, v in model.state_dict().items() if not k.startswith("_mmadapt.")}
    if any(key.startswith("vision_encoder.") for key in own):
        own = to_segment_anything(own)
    prefix = "image_encoder."
    return {k.removeprefix(prefix): v for k, v in own.items() if k.startswith(prefix)}


def _turned(kernel: Tensor | None) -> Tensor | None:
    """A kernel (O, I, h, w, d) as (O, I, d, h, w)."""
    return None if kernel is None else kernel.permute(0, 1, 4, 2, 3).contiguous()


def _stacked(tensors: list[Tensor | None]) -> Tensor | None:
    import torch

    found = [tensor for tensor in tensors if tensor is not None]
    return torch.stack(found) if len(found) == len(tensors) else None


def _named(site: str, tensors: dict[str, Tensor | None]) -> dict[str, Any]:
    return {f"0/{site}/{name}": t for name, t in tensors.items() if t is not None}


def _encoder(keys: _Keys, base: dict[str, Tensor]) -> dict[str, Any]:
    blocks = sorted({int(k.split(".")[1]) for k in base if k.startswith("blocks.")})
    slices, along = keys.take("slice_embed.weight"), keys.take("depth_embed")
    necks = range(_LEVELS)
    values = _named(
        "vision:around",
        {
            "slices": None if slices is None else slices.flatten(1),
            "slices_bias": keys.take("slice_embed.bias"),
            "planes": None if along is None else along.reshape(-1, along.shape[-1]),
            "reduce": _stacked(
                [
                    None if w is None else w.flatten(1)
                    for w in (keys.take(f"neck_3d.{k}.0.weight") for k in necks)
                ]
            ),
            "mix": _stacked([_turned(keys.take(f"neck_3d.{k}.2.weight")) for k in necks]),
            **{
                f"norm{n + 1}_{word}": _stacked(
                    [keys.take(f"neck_3d.{k}.{2 * n + 1}.{word}") for k in necks]
                )
                for n in range(2)
                for word in ("weight", "bias")
            },
        },
    )
    for i in blocks:
        role, block = f"vision.layers[{i}]", f"blocks.{i}"
        values |= _bottleneck(keys, i, base[f"{block}.norm1.weight"].shape[0])
        if f"{block}.attn.rel_pos_h" in base:
            depth = keys.take(f"{block}.attn.rel_pos_d")
            values |= _named(f"{role}.attn:around", {"depth": depth})
        for norm in ("norm1", "norm2"):
            for word, end in (("weight", ""), ("bias", ".bias")):
                trained = keys.take(f"{block}.{norm}.{word}")
                own = base[f"{block}.{norm}.{word}"]
                if trained is not None:
                    change = trained.to(own) - own if trained.shape == own.shape else trained
                    values |= _named(f"{role}.{norm}{end}:weight", {"change": change})
        _check_factor(keys, block)
    return values


def _bottleneck(keys: _Keys, block: int, channels: int) -> dict[str, Any]:
    """Its convolution has a known name; the two projections are told apart by their shapes."""
    group = f"blocks.{block}.adapter."
    kernel = keys.take(f"{group}conv.weight")
    tensors = {"kernel": _turned(kernel), "kernel_bias": keys.take(f"{group}conv.bias")}
    outputs = {"down": None if kernel is None else kernel.shape[0], "up": channels}
    for word, size in outputs.items():
        weights = [
            key
            for key, value in keys.tensors.items()
            if key.startswith(group) and value.ndim == 2 and key not in keys.used
            and value.shape[0] == size
        ]  # fmt: skip
        if not weights:
            keys.missing.append(f"{keys.part}: {group}… of {word} (weight of {size} rows)")
            continue
        tensors[word] = keys.take(weights[0])
        tensors[f"{word}_bias"] = keys.take(f"{weights[0].removesuffix('weight')}bias")
    return _named(f"vision.layers[{block}]:in", tensors)


def _check_factor(keys: _Keys, block: str) -> None:
    """A frozen factor on relative positions, which is one."""
    for key, factor in keys.drop(re.escape(f"{block}.attn.lr")).items():
        if factor.numel() != 1 or float(factor) != 1.0:
            raise AdapterFileError(
                f"{key} is {factor.flatten().tolist()[:4]}, expected 1: a factor on the relative "
                "positions, which the published method keeps at its start"
            )


def _clicks(keys: _Keys) -> dict[str, Any]:
    layer = r"(?:.*\.)?layers\.{}\."
    tensors: dict[str, list[Tensor | None]] = {}

    def put(name: str, tensor: Tensor | None) -> None:
        tensors.setdefault(name, []).append(tensor)

    for i in range(_LAYERS):
        here = layer.format(i)
        own = keys.find(f"{here}(?!.*(norm|attn|mlp)).*", 2, f"layers.{i}: learned queries")
        put("queries", None if own is None else own.squeeze(0))
        for ours, theirs in (("self", "self_attn"), ("image", "cross_attn_image_to_token")):
            for word, end in (("weight", ""), ("bias", "_bias")):
                axes, module = 2 if word == "weight" else 1, f"{here}{theirs}"
                three = [
                    keys.find(rf"{module}\.{w}_proj\.{word}", axes, f"layers.{i}.{theirs}.{w}_proj")
                    for w in "qkv"
                ]
                put(f"{ours}_qkv{end}", _stacked(three))
                out = keys.find(
                    rf"{module}\.out_proj\.{word}", axes, f"layers.{i}.{theirs}.out_proj"
                )
                put(f"{ours}_o{end}", out)
        for word, end, axes in (("weight", "", 2), ("bias", "_bias", 1)):
            for ours, theirs in (("up", "lin1"), ("down", "lin2")):
                found = keys.find(rf"{here}mlp\.{theirs}\.{word}", axes, f"layers.{i}.mlp.{theirs}")
                put(f"{ours}{end}", found)
            for n in range(1, 5):
                found = keys.find(rf"{here}norm{n}\.{word}", 1, f"layers.{i}.norm{n}.{word}")
                put(f"norm{n}_{word}", found)
    return _named("prompt:around", {name: _stacked(several) for name, several in tensors.items()})


def _decoder(keys: _Keys) -> dict[str, Any]:
    heads = [f"mlahead.head{level + 2}" for level in range(_LEVELS)]
    return _named(
        "decoder:around",
        {
            "first": _stacked([_turned(keys.take(f"{head}.0.weight")) for head in heads]),
            "second": _stacked([_turned(keys.take(f"{head}.3.weight")) for head in heads]),
            "join": _turned(keys.take("cls.0.weight")),
            "last": _turned(keys.take("cls.3.weight")),
        },
    )


def _same_as_backbone(keys: _Keys, base: dict[str, Tensor]) -> dict[str, Tensor]:
    import torch

    same = {}
    for key, own in base.items():
        if key in keys.used or key not in keys.tensors:
            continue
        theirs = keys.tensors[key]
        if theirs.shape != own.shape or not torch.equal(theirs.to(own), own):
            raise AdapterFileError(
                f"{key} in encoder_dict differs from the backbone's",
                "load the SAM that the checkpoint was trained on, sam_vit_b_01ec64 for published ones",
            )
        same |= keys.drop(re.escape(key))
    return same


def _adapter(values: dict[str, Any], masks: dict[str, Tensor], crop: int, heads: int) -> Any:
    from mmadapt.adapter import ThreeDSAM

    slices, along = values["0/vision:around/slices"], values["0/vision:around/planes"]
    planes, patch = along.shape[0], slices.shape[1]
    side = planes * patch
    valid = [c for c in range(2 * planes, side + 1, 2 * planes) if side % c == 0]
    if crop not in valid:
        raise AdapterFileError(
            f"crop is {crop!r}, and the file's {planes} planes of {patch} slices fit the sides "
            f"{', '.join(map(str, valid))}"
        )
    tokens = next(iter(masks.values())).shape[-1] if masks else 8**3
    down = values["0/vision.layers[0]:in/down"]
    queries = values.get("0/prompt:around/queries")
    return ThreeDSAM(
        "released",
        ratio=down.shape[0] / down.shape[1],
        zoom=side // crop,
        window=round(tokens ** (1 / 3)),
        planes=planes,
        classes=values["0/decoder:around/last"].shape[0],
        prompts=queries is not None,
        queries=10 if queries is None else queries.shape[1],
        heads=heads,
    )
