"""Checkpoints of SAMs that were adapted by their authors' code: Med-SA and SAM-Med2D.

Such a file is a whole model under segment_anything's names, frozen tensors and all. What was trained
is attached, as the change from this backbone where it is a tensor of SAM; the rest is compared with
the backbone and left out.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from math import nextafter
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from mmadapt.core.backbone import unwrap
from mmadapt.errors import AdapterFileError, BackboneError
from mmadapt.interop.foreign import (
    ForeignFile,
    install_tensors,
    load_checkpoint,
    refuse_keys,
    some,
)
from mmadapt.interop.sam import to_transformers

if TYPE_CHECKING:
    from torch import Tensor

    from mmadapt.core.site import Span

_BLOCK = re.compile(r"image_encoder\.blocks\.(\d+)\.(.+)\Z")
_BOTTLENECK = {
    "D_fc1.weight": "down",
    "D_fc1.bias": "down_bias",
    "D_fc2.weight": "up",
    "D_fc2.bias": "up_bias",
}
_SAM_MED2D = {
    "channel.0.weight": "squeeze",
    "channel.2.weight": "expand",
    "spatial.0.weight": "narrow",
    "spatial.2.weight": "widen",
    "norm.weight": "norm_weight",
    "norm.bias": "norm_bias",
}


def read_med_sa(
    m: Any,
    path: str | Path,
    depth: bool | None = None,
    name: str = "default",
    replace: bool = False,
) -> ForeignFile:
    """Attach a checkpoint of the released Med-SA code to a SAM of its size, in either library.

    Adapters of the encoder and the trained mask decoder are loaded as `MedSA(variant="released")`.
    Files hold adapters for the depth of volumes whether they were trained or not: `depth=True`
    loads them, `depth=False` leaves them out, as the code does for single images. Later files were
    trained without SAM's relative positions, whose tables are zero there; a warning says so and the
    backbone's own are taken out. Such models saw pixels from 0 to 1, without SAM's mean and
    deviation, and clicks as (row, column): both are written into the attachment's metadata, "input".

    Two habits of the released code are not repeated: it pads windows before the norm, and within
    windows its sequences through the depth mix positions; volumes are read with
    `depth_layout="grid"`, right in the blocks without windows. Raises `AdapterFileError` before
    anything is changed, for a missing or unused key of an adapter too.

        report = mm.interop.read_med_sa(sam, "best_dice_checkpoint.pth", depth=False)
    """
    from mmadapt.adapter import MedSA

    file = _open(m, path, r"(?:Space|MLP|Depth)_Adapter\.", "Med-SA")
    branches = {"Space_Adapter": "attn:out", "MLP_Adapter": "mlp:out"}
    has_depth = any("Depth_Adapter" in key for key in file.adapters)
    if has_depth and depth is None:
        raise AdapterFileError(
            f"{path} holds adapters for the depth of volumes, trained or not",
            "pass depth=True for a model of volumes, depth=False for one of single images",
        )
    if depth:
        branches["Depth_Adapter"] = "attn:out"
    places = {
        f"image_encoder.blocks.{i}.{branch}.{theirs}": (
            f"0/vision.layers[{i}].{site}/"
            + (f"{branch[:5].lower()}_" if depth and site == "attn:out" else "")
            + ours
        )
        for i in range(file.layers)
        for branch, site in branches.items()
        for theirs, ours in _BOTTLENECK.items()
    }
    left = {key for key in file.adapters if "Depth_Adapter" in key} if not depth else set()
    file.require(places, left)
    zero = file.zero_positions()
    adapter = MedSA(
        "released",
        depth=bool(depth),
        depth_layout="grid",
        ratio=_ratio(file.adapters["image_encoder.blocks.0.MLP_Adapter.D_fc1.weight"]),
        decoder="trained" if file.part("mask_decoder.") else "frozen",
        relative_positions="zero" if zero else "kept",
    )
    if zero:
        warnings.warn(
            f"{file.path} was trained without SAM's relative positions, so they are taken out of this "
            "backbone too while its adapters act",
            stacklevel=2,
        )
    report = file.attach(
        m, adapter, name, "med_sa", places, ("decoder.",), tuple(sorted(left)), replace
    )
    assert report.attachment is not None
    report.attachment.metadata["input"] = {"click_order": "row_col", "normalise": "0-1"}
    return report


def read_sam_med2d(
    m: Any, path: str | Path, name: str = "default", replace: bool = False
) -> ForeignFile:
    """Attach a checkpoint of SAM-Med2D to a SAM of its size, in either library.

    Its adapters are loaded as `SAMMed2D`, its prompt encoder and mask decoder, where the file has
    both, as changes from the backbone's. The image side it was made for is written into the
    attachment's metadata, "input"; `mmadapt.interop.sam.resize_positions` makes a SAM of that side.
    Raises `AdapterFileError` before anything is changed, for a
    missing or unused key of an adapter too.

        report = mm.interop.read_sam_med2d(sam, "sam-med2d_b.pth")
    """
    from mmadapt.adapter import SAMMed2D

    file = _open(m, path, r"Adapter\.(?:channel|spatial|norm)\.", "SAM-Med2D")
    places = {
        f"image_encoder.blocks.{i}.Adapter.{theirs}": f"0/vision.layers[{i}].mlp:out/{ours}"
        for i in range(file.layers)
        for theirs, ours in _SAM_MED2D.items()
    }
    file.require(places, set())
    squeeze = file.adapters["image_encoder.blocks.0.Adapter.channel.0.weight"]
    whole = bool(file.part("mask_decoder.") and file.part("prompt_encoder."))
    adapter = SAMMed2D(ratio=_ratio(squeeze), decoder="trained" if whole else "frozen")
    report = file.attach(
        m, adapter, name, "sam_med2d", places, ("decoder.", "prompt."), (), replace
    )
    side = file.image_side()
    if side:
        assert report.attachment is not None
        report.attachment.metadata["input"] = {"image_side": side}
    return report


# -- a file and the backbone it goes to ---------------------------------------------------------------


@dataclass(frozen=True)
class _File:
    """Tensors of a file by segment_anything's names, beside the backbone they go to."""

    path: Path
    model: Any
    spans: Mapping[str, Span]
    adapters: dict[str, Tensor]
    #: tensors of SAM itself
    own: dict[str, Tensor]
    dropped: list[str]

    @property
    def layers(self) -> int:
        """Blocks of the backbone's encoder."""
        return sum(bool(re.fullmatch(r"vision\.layers\[\d+\]", role)) for role in self.spans)

    def part(self, prefix: str) -> dict[str, Tensor]:
        return {key: value for key, value in self.own.items() if key.startswith(prefix)}

    def require(self, places: Mapping[str, str], left: set[str]) -> None:
        """Raise where adapters in the file are not those of this backbone."""
        unused = self.adapters.keys() - places.keys() - left
        refuse_keys(sorted(places.keys() - self.adapters.keys()), sorted(unused))

    def zero_positions(self) -> bool:
        """Whether there are tables of relative positions, and nothing but zeros in them."""
        tables = [value for key, value in self.own.items() if ".attn.rel_pos_" in key]
        return bool(tables) and not any(bool(table.any()) for table in tables)

    def image_side(self) -> int | None:
        """The side of the images whose positions the file holds."""
        positions = self.own.get("image_encoder.pos_embed")
        patch = self.own.get("image_encoder.patch_embed.proj.weight")
        return None if positions is None or patch is None else positions.shape[1] * patch.shape[-1]

    def attach(
        self,
        m: Any,
        adapter: Any,
        name: str,
        layout: str,
        places: Mapping[str, str],
        trained: tuple[str, ...],
        left: tuple[str, ...] = (),
        replace: bool = False,
    ) -> ForeignFile:
        """Attach with the adapters' tensors, and those of SAM whose roles begin with `trained`."""
        here = self._here()
        values = {place: self.adapters[key] for key, place in places.items()}
        changed = self._changes(here, trained, values) if adapter.decoder == "trained" else set()
        state = self.model.state_dict()
        frozen = {where: key for where, key in here.items() if key not in changed}
        differing = sorted(
            {k for where, k in frozen.items() if not _same(self.own[k], state[where])}
        )
        if getattr(adapter, "relative_positions", "kept") == "zero":  # the backbone's are not used
            differing = [key for key in differing if ".attn.rel_pos_" not in key]
        notes = []
        if differing:
            notes.append(
                f"{len(differing)} frozen tensors of the file are not this backbone's, such as "
                f"{some(differing)}: were the adapters trained on another SAM, or another image size?"
            )
        if adapter.decoder != "trained":
            notes.append("the file has no mask decoder to attach; the backbone's own stays")
        attachment = install_tensors(m, (adapter,), name, values, replace)
        return ForeignFile(
            layout,
            len(values),
            ignored=(*left, *sorted(self.own.keys() - changed)),
            notes=tuple(notes),
            attachment=attachment,
            converted=tuple(sorted(changed)),
            missing=tuple(key for key in state if key not in here and "_mmadapt." not in key),
            dropped=tuple(self.dropped),
        )

    def _changes(
        self, here: Mapping[str, str], trained: tuple[str, ...], values: dict[str, Tensor]
    ) -> set[str]:
        """Put the changes from the backbone's tensors into `values`; the keys of all of them."""
        missing, changed = [], set()
        for role, span in self.spans.items():
            if not role.startswith(trained) or not span.weight:
                continue
            if span.weight not in here:
                missing.append(span.weight)
                continue
            key = here[span.weight]
            own = self.model.get_parameter(span.weight).detach()
            if own.shape != self.own[key].shape:
                raise AdapterFileError(
                    f"{key} is {tuple(self.own[key].shape)} in {self.path}, and {role} of this "
                    f"backbone {tuple(own.shape)}",
                    "take a SAM of the size that was adapted",
                )
            values[f"0/{role}:weight/change"] = self.own[key].to(own.device, own.dtype) - own
            changed.add(key)
        refuse_keys(missing, [])
        return changed

    def _here(self) -> dict[str, str]:
        """The backbone's own name of a tensor -> its key in the file, for all that it has."""
        names: dict[str, Any] = dict(zip(self.own, self.own, strict=True))
        if not hasattr(self.model, "image_encoder"):
            names = {key: key for key in names if _is_sams(key)}
            names = to_transformers(names)
        state = self.model.state_dict()
        return {where: key for where, key in names.items() if where in state}


def _is_sams(key: str) -> bool:
    try:
        to_transformers({key: cast("Any", None)})
    except BackboneError:
        return False
    return True


def _open(m: Any, path: str | Path, wanted: str, what: str) -> _File:
    """Read a file; refuse a backbone that is no SAM and a file without the adapters `wanted`."""
    model, anatomy, _ = unwrap(m)
    if anatomy.family != "sam":
        raise AdapterFileError(
            f"{what} files fit SAM, and this is a {type(model).__name__} (family "
            f"{anatomy.family!r})",
            "take transformers' SamModel or segment_anything's Sam",
        )
    path = Path(path).expanduser()
    stored, dropped = load_checkpoint(path, ("state_dict", "model"))
    tensors = {key.removeprefix("module."): value for key, value in stored.items()}
    if len(tensors) < len(stored):
        raise AdapterFileError(f"{path} holds tensors both with and without 'module.' in front")
    adapters = {key: value for key, value in tensors.items() if re.search(r"Adapter\b", key)}
    if not any(re.search(wanted, key) for key in adapters):
        bare = any(_BLOCK.match(key) for key in tensors) and not adapters
        raise AdapterFileError(
            f"{path} is no {what} file: it holds {some(adapters or tensors)}",
            "it is a bare SAM: load it into the model itself"
            if bare
            else "expected image_encoder.blocks.0 with adapters below it",
        )
    own = {
        key.replace(".attn.rel_h", ".attn.rel_pos_h").replace(
            ".attn.rel_w", ".attn.rel_pos_w"
        ): value
        for key, value in tensors.items()
        if key not in adapters
    }
    return _File(path, model, anatomy.roles(model), adapters, own, dropped)


def _ratio(down: Tensor) -> float:
    """The share of the channels that a projection (width, channels) keeps, as adapters state it."""
    width, channels = down.shape
    if width == max(1, channels // 4):
        return 0.25
    ratio = width / channels
    return ratio if int(ratio * channels) == width else nextafter(ratio, 2.0)


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal, up to the rounding of half precision and of resized positions."""
    one = one.to(other.device, other.dtype)
    return one.shape == other.shape and one.allclose(other, rtol=1e-3, atol=1e-4)
