"""Three-dimensional networks in windows: over a whole volume, or around clicks."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy
import torch
from torch import Tensor

from mmadapt.errors import DataError, MissingDependencyError
from mmadapt.tasks.volume.blend import Blend
from mmadapt.tasks.volume.prompts import Box, check_box, check_points, moved_box, moved_points
from mmadapt.tasks.volume.volume import Volume

#: how much longer one side of a voxel may be than another for a three-dimensional network
MOST_UNEVEN = 8.0


def predict_whole(
    volume: Volume,
    network: Callable[[Tensor], Tensor],
    window: Sequence[int],
    overlap: float = 0.5,
    batch_size: int = 1,
    out: Any = None,
) -> Any:
    """Logits (K, D, H, W) of a network that takes (B, C, d, h, w), over windows (d, h, w).

    Windows overlap and count more near their middle, as MONAI's sliding windows in "gaussian" mode;
    a volume smaller than a window is widened by repeating its edge. Only as many planes as a window
    is deep are kept in memory beside `out`: an array float (K, D, H, W) for logits, or whole numbers
    (D, H, W) for labels (the largest of several channels, or 1 where the only one is above 0), for
    example `create_mask(path, volume)`. Without it logits are returned as float32.
    """
    size = check_window(volume, window)
    if not 0 <= overlap < 1:
        raise DataError(f"overlap is {overlap!r}, expected a share from 0 to below 1")
    monai = _monai()
    padded = [max(n, w) for n, w in zip(volume.size, size, strict=True)]
    # so that the last window ends where the volume does, as MONAI counts
    steps = [
        w if w == n else max(1, int(w * (1 - overlap))) for n, w in zip(padded, size, strict=True)
    ]
    places = monai.dense_patch_slices(padded, size, steps)
    starts = sorted(tuple(int(axis.start) for axis in place) for place in places)

    blend = None
    for first in range(0, len(starts), batch_size):
        own = starts[first : first + batch_size]
        cut = numpy.stack([_cut(volume, start, size) for start in own])
        blend = _take_in(blend, volume, own, _run(network, torch.from_numpy(cut)), out)
    return blend.finish()  # type: ignore[union-attr]


def predict_at(
    volume: Volume,
    network: Callable[..., Tensor],
    window: Sequence[int],
    points: Any = None,
    labels: Any = None,
    out: Any = None,
    box: Any = None,
    mask: Any = None,
) -> Any:
    """Logits (K, D, H, W) of a network that is prompted, in windows around what is prompted.

    Points (N, 3) are (z, y, x) in the original image, labels 1 on the object and 0 beside it; a window
    stands around each click on the object that does not lie in the inner half of an earlier one, and
    windows cover the box (z1, y1, x1, z2, y2, x2), where one is given. The network takes a window
    (1, C, d, h, w), the clicks within it (1, N, 3) as (z, y, x) in voxels of the window, and their
    labels (1, N). A box and a mask (D, H, W), logits on the grid of `volume` such as an earlier answer,
    reach networks that have the keywords `box` (1, 6), cut off at the window, and `mask`
    (1, 1, d, h, w). Voxels outside of all windows get the logit `OUTSIDE`. To refine an answer call
    again with more points; `next_click` finds one where a truth is known.
    """
    size = check_window(volume, window)
    if points is None and box is None:
        raise DataError("there is no prompt", "give points with labels, or a box")
    for name, given in (("box", box), ("mask", mask)):
        if given is not None and not _takes(network, name):
            raise DataError(
                f"a {name} was given, and this network takes clicks alone",
                f"leave it out; one that takes it has the keyword {name}",
            )
    at, kinds = _clicks(volume, points, labels, box)
    around = None if box is None else _box(volume, box)
    before_box = [] if around is None else _over(volume, around, size)
    starts = before_box + _around(volume, at[kinds == 1], size, before_box)
    earlier = None if mask is None else _as_volume(mask, volume)
    before = _before(volume, size)

    blend = None
    for start in sorted(starts):
        own = at - start + before
        inside = ((own > -0.5) & (own < numpy.array(size) - 0.5)).all(1)
        given = torch.from_numpy(own[inside])[None].float(), torch.from_numpy(kinds[inside])[None]
        more = {}
        if around is not None:
            more["box"] = torch.from_numpy(_within(around, start - before, size))[None].float()
        if earlier is not None:
            more["mask"] = torch.from_numpy(_cut(earlier, start, size))[None]
        cut = torch.from_numpy(_cut(volume, start, size))[None]
        blend = _take_in(blend, volume, [start], _run(network, cut, *given, **more), out)
    return blend.finish()  # type: ignore[union-attr]


def check_window(volume: Volume, window: Sequence[int]) -> tuple[int, int, int]:
    """The window (d, h, w), if volumes like this one can be cut by it, or a `DataError`."""
    size = tuple(int(n) for n in window)
    if len(size) != 3 or min(size) < 1:
        raise DataError(f"the window is {window!r}, expected (d, h, w) in voxels")
    thin = [i for i in range(3) if 2 * volume.size[i] < size[i]]
    if thin:
        axis = thin[0]
        raise DataError(
            f"{volume.name} is {volume.size[axis]} voxels thick along {'zyx'[axis]}, the window "
            f"{size[axis]}: most of it would be made up",
            f"at least {(size[axis] + 1) // 2} voxels are needed: take a smaller window, or segment "
            "slice by slice (SliceSegmenter)",
        )
    uneven = max(volume.spacing) / min(volume.spacing)
    if uneven > MOST_UNEVEN:
        middle = sorted(volume.spacing)[1]
        raise DataError(
            f"voxels of {volume.name} are {uneven:.1f} times as long as wide (spacing "
            f"{tuple(round(s, 3) for s in volume.spacing)} mm), at most {MOST_UNEVEN:g} times are "
            "expected",
            f"volume.resample({middle:.3g}), or segment slice by slice (SliceSegmenter)",
        )
    return size  # type: ignore[return-value]


def _clicks(
    volume: Volume, points: Any, labels: Any, box: Any
) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Clicks in voxels of the volume as it is now, and their labels; one is on the object, or a box is."""
    if points is None:
        return numpy.zeros((0, 3)), numpy.zeros(0, numpy.int64)
    at, kinds = check_points(points, labels, volume.original)
    at = moved_points(at, volume.original, volume.grid)
    beyond = [p for p in at if ((p < -0.5) | (p > numpy.array(volume.size) - 0.5)).any()]
    if beyond:
        raise DataError(
            f"a click lies outside of the part that was kept: {beyond[0].round(1).tolist()} of "
            f"{volume.size} voxels",
            "crop less, or leave the click out",
        )
    if box is None and not (kinds == 1).any():
        raise DataError("no click is on the object", "give at least one point labelled 1")
    return at, kinds


def _around(
    volume: Volume, centres: numpy.ndarray, size: tuple[int, ...], known: list[tuple[int, ...]]
) -> list[tuple[int, ...]]:
    """Where windows around clicks begin, those left out that lie well inside of one before."""
    room = numpy.maximum(numpy.array(volume.size) - size, 0)
    found: list[tuple[int, ...]] = []
    for centre in centres:
        start = (numpy.rint(centre).astype(int) - numpy.array(size) // 2).clip(0, room)
        near = [numpy.abs(start - other) <= numpy.array(size) // 4 for other in [*known, *found]]
        if not any(own.all() for own in near):
            found.append(tuple(map(int, start)))
    return found


def _over(volume: Volume, box: Box, size: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Where windows begin that cover a box, its middle in the middle of the only one if it fits."""
    axes = []
    for low, high, n, w in zip(box[:3], box[3:], volume.size, size, strict=True):
        count = max(1, int(numpy.ceil((high - low) / w)))
        middles = low + (high - low) * (numpy.arange(count) + 0.5) / count
        axes.append((numpy.rint(middles).astype(int) - w // 2).clip(0, max(n - w, 0)))
    return sorted({tuple(map(int, start)) for start in itertools.product(*axes)})


def _box(volume: Volume, box: Any) -> Box:
    """A box of the original image in the volume as it is now."""
    own = moved_box(check_box(box, volume.original), volume.original, volume.grid)
    if not all(low < high for low, high in zip(own[:3], own[3:], strict=True)):
        raise DataError("the box lies outside of the part that was kept", "crop less")
    return own


def _within(box: Box, first: numpy.ndarray, size: tuple[int, ...]) -> numpy.ndarray:
    """A box in the voxels of a window, cut off at its edges."""
    low, high = numpy.array(box[:3]) - first, numpy.array(box[3:]) - first
    return numpy.concatenate([low.clip(0, size), high.clip(0, size)])


def _as_volume(mask: Any, volume: Volume) -> Volume:
    """Logits of an earlier answer, (D, H, W) or with an axis before, to be cut as the volume is."""
    array = numpy.asarray(mask.detach().cpu() if hasattr(mask, "detach") else mask)
    array = array[0] if array.ndim == 4 and len(array) == 1 else array
    if array.shape != volume.size or array.dtype.kind != "f":
        raise DataError(
            f"the mask is {array.dtype} {array.shape}, expected logits, floats of {volume.size}",
            "pass on the answer of an earlier call",
        )
    return Volume(array, volume.affine, name="the mask")


def _takes(network: Any, name: str) -> bool:
    """Whether a network has a keyword."""
    try:
        told = inspect.signature(getattr(network, "forward", network)).parameters
    except (TypeError, ValueError):
        return False
    return name in told or any(one.kind is one.VAR_KEYWORD for one in told.values())


def _before(volume: Volume, size: tuple[int, ...]) -> numpy.ndarray:
    """How many voxels a window sticks out before the first one."""
    return numpy.array([max(w - n, 0) // 2 for n, w in zip(volume.size, size, strict=True)])


def _cut(volume: Volume, start: Sequence[int], size: tuple[int, ...]) -> numpy.ndarray:
    before = _before(volume, size)
    first = numpy.array(start) - before
    last = numpy.minimum(first + size, volume.size)
    (z1, y1, x1), (z2, y2, x2) = first.clip(0), last
    values = numpy.asarray(volume.array[:, z1:z2, y1:y2, x1:x2])
    wide = [(max(0, -f), f + w - e) for f, w, e in zip(first, size, last, strict=True)]
    return numpy.pad(values, [(0, 0), *wide], mode="edge") if numpy.any(wide) else values


@torch.no_grad()
def _run(network: Callable[..., Tensor], cut: Tensor, *prompts: Tensor, **more: Tensor) -> Tensor:
    like = next(iter(getattr(network, "parameters", lambda: [])()), cut)
    there = {name: value.to(like.device) for name, value in more.items()}
    found = network(cut.to(like), *(prompt.to(like.device) for prompt in prompts), **there)
    found = found.float().cpu()
    if found.ndim != 5 or len(found) != len(cut) or found.shape[2:] != cut.shape[2:]:
        raise DataError(
            f"the network answered {tuple(cut.shape)} with {tuple(found.shape)}, expected logits "
            f"({len(cut)}, K, {', '.join(map(str, cut.shape[2:]))})"
        )
    return found


def _take_in(
    blend: Blend | None, volume: Volume, starts: list[tuple[int, ...]], logits: Tensor, out: Any
) -> Blend:
    """The answers of some windows blended in; the first of them says how many channels there are."""
    size = tuple(logits.shape[2:])
    if blend is None:
        weight = _monai().compute_importance_map(size, mode="gaussian")
        blend = Blend(volume.size, weight, logits.shape[1], out)
    for start, own in zip(starts, logits, strict=True):
        blend.add(numpy.array(start) - _before(volume, size), own)
    return blend


def _monai() -> Any:
    try:
        from monai.data import utils
    except ImportError as error:
        raise MissingDependencyError(
            f"sliding windows need MONAI, which cannot be imported: {error}",
            "pip install 'mmadapt[medical]'",
        ) from error
    return utils
