"""What 3DSAM-adapter's model is called with, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmadapt.core.layer import Layer
from mmadapt.errors import DataError

if TYPE_CHECKING:
    from mmadapt.adapter import ThreeDSAM
    from mmadapt.core.context import Context
    from mmadapt.core.site import SiteView

_ARGUMENTS = ("pixel_values", "input_points", "input_labels")


class EntryLayer(Layer):
    """The model's own call, which takes a volume and clicks. No parameters."""

    additive = False
    why_not_merge = "it takes other inputs than the backbone"

    def __init__(self, adapter: ThreeDSAM, site: SiteView, generator: torch.Generator) -> None:
        super().__init__()
        self.prompts = adapter.prompts

    def around(
        self,
        call: Callable[..., Any],
        args: tuple,
        kwargs: dict[str, Any],
        context: Context,
        site: SiteView,
    ) -> Tensor:
        unknown = [name for name in kwargs if name not in _ARGUMENTS and kwargs[name] is not None]
        if unknown or len(args) > len(_ARGUMENTS):
            raise DataError(
                f"a SAM for volumes was given {', '.join(unknown) or f'{len(args)} arguments'}; it "
                f"takes {', '.join(_ARGUMENTS)}",
                "for images take the bare SAM: with mmadapt.disabled(model): …",
            )
        given = dict(zip(_ARGUMENTS, args, strict=False)) | kwargs
        volume, points, labels = (given.get(name) for name in _ARGUMENTS)
        if not isinstance(volume, Tensor):
            raise DataError("there is no volume", "pass pixel_values=, (B, 1 or 3, D, H, W)")
        parts: Any = site.span.parts(site.module)  # type: ignore[misc]
        if self.prompts:
            check_clicks(points, labels, volume)
            features = parts.encoder(volume)
            seen = parts.prompts(features[-1], points, labels, volume.shape[2:])
            return parts.decoder([*features[:-1], seen], volume)
        if points is not None or labels is not None:
            raise DataError(
                "there are clicks, and this adapter was made without prompts",
                "leave them out, or attach one with prompts=True",
            )
        return parts.decoder(parts.encoder(volume), volume)


def check_volume(volume: Tensor, channels: int, unit: int, side: int) -> None:
    """Refuse what is no batch of volumes that the tokens divide; with a `side`, other cubes too."""
    shape = tuple(volume.shape)
    expected = f"(B, 1 or {channels}, D, H, W)"
    if volume.ndim != 5 or not volume.is_floating_point():
        what = "an image" if volume.ndim == 4 and shape[1] == channels else "no batch of volumes"
        raise DataError(
            f"pixel_values are {volume.dtype} {shape}: {what}, expected floating-point {expected}",
            "volume[None, None] adds the batch and channel axes; for images there is the bare SAM: "
            "with mmadapt.disabled(model): …",
        )
    if shape[1] not in (1, channels):
        last = shape[-1] in (1, channels)
        raise DataError(
            f"pixel_values {shape} have {shape[1]} channels, expected {expected}",
            "the axes look like (B, D, H, W, C): volume.movedim(-1, 1)"
            if last
            else "stack one volume a row: (D, H, W) each, and one channel",
        )
    # values cannot be looked at while compiling
    if not torch.compiler.is_compiling() and not bool(torch.isfinite(volume.detach().sum())):
        wrong = ~torch.isfinite(volume.detach())
        if bool(wrong.any()):  # a sum may overflow without one
            first = tuple(wrong.nonzero()[0].tolist())
            raise DataError(
                f"{int(wrong.sum())} of {volume.numel()} voxels are not finite numbers, the first at "
                f"{first}: {volume[first].item():g}",
                "one of them would spread over the whole mask: read the file with nan=0.0, or replace "
                "them (torch.nan_to_num)",
            )
    if side and set(shape[2:]) != {side}:
        raise DataError(
            f"a volume of {shape[2:]} voxels does not fit the released layout, whose crops are cubes",
            f"with this zoom the side is {side}; the authors' valid ones are 64, 128, 256 and 512",
        )
    wrong = [length for length in shape[2:] if length % unit or length < unit]
    if wrong:
        near = [max(unit, round(length / unit) * unit) for length in shape[2:]]
        raise DataError(
            f"a volume of {shape[2:]} voxels (depth, height, width) does not divide into tokens of "
            f"{unit} voxels a side",
            f"pad or crop every axis to a multiple of {unit}, such as {tuple(near)}",
        )


def check_clicks(points: Any, labels: Any, volume: Tensor) -> None:
    """Refuse clicks that are missing, mis-shaped, outside of the volume, or of unknown labels."""
    rows, size = len(volume), volume.shape[2:]
    if len(size) != 3:  # what is wrong with it, the encoder says
        return
    if not isinstance(points, Tensor) or not isinstance(labels, Tensor):
        missing = "input_labels" if isinstance(points, Tensor) else "input_points"
        raise DataError(
            f"a volume was given without {missing}",
            "give clicks (B, N, 3), each (z, y, x) in voxels, and labels (B, N), 1 for the object and "
            "0 beside it; or attach one with prompts=False",
        )
    if points.ndim != 3 or points.shape[::2] != (rows, 3) or labels.shape != points.shape[:2]:
        raise DataError(
            f"the clicks are {tuple(points.shape)} and the labels {tuple(labels.shape)}, expected "
            f"({rows}, N, 3) and ({rows}, N)",
            "a row for every volume; pad with clicks of the label -1",
        )
    if torch.compiler.is_compiling():  # values cannot be looked at
        return
    if bool(((labels < -1) | (labels > 1)).any()):
        value = labels[(labels < -1) | (labels > 1)].flatten()[0].item()
        raise DataError(f"label {value} means nothing", "1 is the object, 0 beside it, -1 no click")
    ends = points.new_tensor(list(size)) - 1
    inside = ((points >= 0) & (points <= ends)).all(-1) | (labels < 0)  # a NaN fails too
    if not bool(inside.all()):
        row, place = (~inside).nonzero()[0].tolist()
        raise DataError(
            f"click {place} of volume {row} has (z, y, x) = "
            f"{tuple(round(v, 3) for v in points[row, place].tolist())}, outside of {tuple(size)} voxels",
            "voxels count from 0, in the order (z, y, x) of the axes (D, H, W)",
        )
