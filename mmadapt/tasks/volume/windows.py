"""Three-dimensional networks in windows: over a whole volume, or around clicks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy
import torch
from torch import Tensor

from mmadapt.errors import DataError, MissingDependencyError
from mmadapt.tasks.volume.blend import Blend
from mmadapt.tasks.volume.prompts import check_points, moved_points
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
    network: Callable[[Tensor, Tensor, Tensor], Tensor],
    window: Sequence[int],
    points: Any,
    labels: Any,
    out: Any = None,
) -> Any:
    """Logits (K, D, H, W) of a network that is clicked, in windows around the clicks on the object.

    Points (N, 3) are (z, y, x) in the original image, labels 1 on the object and 0 beside it. The
    network takes a window (1, C, d, h, w), the clicks within it (1, N, 3) as (z, y, x) in voxels of
    the window, and their labels (1, N). Voxels outside of all windows get the logit `OUTSIDE`. To
    refine an answer call again with more points; `next_click` finds one where a truth is known.
    """
    size = check_window(volume, window)
    at, kinds = check_points(points, labels, volume.original)
    at = moved_points(at, volume.original, volume.grid)
    beyond = [p for p in at if ((p < -0.5) | (p > numpy.array(volume.size) - 0.5)).any()]
    if beyond:
        raise DataError(
            f"a click lies outside of the part that was kept: {beyond[0].round(1).tolist()} of "
            f"{volume.size} voxels",
            "crop less, or leave the click out",
        )
    centres = at[kinds == 1]
    if not len(centres):
        raise DataError("no click is on the object", "give at least one point labelled 1")
    room = numpy.maximum(numpy.array(volume.size) - size, 0)
    low = (numpy.rint(centres).astype(int) - numpy.array(size) // 2).clip(0, room)
    starts = sorted({tuple(map(int, start)) for start in low})
    before = _before(volume, size)

    blend = None
    for start in starts:
        own = at - start + before
        inside = ((own > -0.5) & (own < numpy.array(size) - 0.5)).all(1)
        given = torch.from_numpy(own[inside])[None].float(), torch.from_numpy(kinds[inside])[None]
        cut = torch.from_numpy(_cut(volume, start, size))[None]
        blend = _take_in(blend, volume, [start], _run(network, cut, *given), out)
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
def _run(network: Callable[..., Tensor], cut: Tensor, *prompts: Tensor) -> Tensor:
    like = next(iter(getattr(network, "parameters", lambda: [])()), cut)
    found = network(cut.to(like), *(prompt.to(like.device) for prompt in prompts)).float().cpu()
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
