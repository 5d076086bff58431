"""What can be clicked: a scene of a model and a picture, whatever they are."""

from __future__ import annotations

from typing import Any

import numpy

from mmadapt.adapter import ThreeDSAM
from mmadapt.core.bank import bank_of
from mmadapt.errors import DataError
from mmadapt.tasks.segment import ImageSegmenter, Segmenter, intensity_range
from mmadapt.tasks.segment.inputs import acting, input_of
from mmadapt.tasks.volume import SliceSegmenter, Volume, VolumeSegmenter
from mmadapt.ui.image_scene import ImageScene
from mmadapt.ui.volume_scene import VolumeScene, usual_limits

#: an array without an affine is shown as it is indexed: x to the right, y down
AS_INDEXED = numpy.diag([-1.0, -1.0, 1.0, 1.0])


def scene_of(
    model: Any, picture: Any, window: str | tuple[float, float] | None
) -> ImageScene | VolumeScene:
    """The scene of a study, or of a study that is made for the model and the picture."""
    if isinstance(model, (ImageSegmenter, SliceSegmenter, VolumeSegmenter)):
        if picture is not None or window is not None:
            raise DataError(
                f"a {type(model).__name__} has its picture already, and another was given",
                "mm.ui.segment(study), or mm.ui.segment(model, picture)",
            )
        if isinstance(model, ImageSegmenter):
            return ImageScene(model)
        return VolumeScene(model, model.volume, usual_limits(model.volume))
    if picture is None:
        raise DataError("there is no picture to click", "mm.ui.segment(model, image)")
    if isinstance(picture, Volume):
        return _of_volume(model, picture, window, lettered=True)
    if _is_volume(picture):
        return _of_volume(model, Volume(picture, AS_INDEXED, name="array"), window, lettered=False)
    return ImageScene(ImageSegmenter(model, picture, window))


def _is_volume(picture: Any) -> bool:
    """Whether an array's axes are (D, H, W): three, of which neither end is 1, 3 or 4 channels."""
    shape = tuple(getattr(picture, "shape", ()))
    return len(shape) == 3 and not {shape[0], shape[2]} & {1, 3, 4}


def _of_volume(model: Any, volume: Volume, window: Any, lettered: bool) -> VolumeScene:
    """Slice by slice, in the window that the caller, the adapters or the middle planes name."""
    segmenter = model if isinstance(model, Segmenter) else Segmenter(model)
    if any(isinstance(adapter, ThreeDSAM) for adapter in _acting_adapters(segmenter.model)):
        raise DataError(
            "a ThreeDSAM acts in this SAM, so that it takes windows of a volume and no slices",
            "mm.ui.segment(volume.VolumeSegmenter(model, scan, window=(64, 64, 64)))",
        )
    limits = usual_limits(volume)
    if window is None and not _windowed(volume):
        window = input_of(segmenter.model).window or (None if limits == (0.0, 1.0) else limits)
    seen = volume
    if window is not None:
        low, high = (window, None) if isinstance(window, str) else window
        seen = volume.window(low, high)
        limits = intensity_range(volume.array, low, high)
    return VolumeScene(SliceSegmenter(segmenter, seen), volume, limits, lettered)


def _acting_adapters(model: Any) -> list[Any]:
    bank = bank_of(model)
    records = [] if bank is None else [bank.records[name] for name in acting(model)]
    return [adapter for record in records for adapter in record.adapters]


def _windowed(volume: Volume) -> bool:
    return any(step.window is not None for step in volume.history)
