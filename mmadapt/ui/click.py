"""Segmenting by clicks, on an image or in the three planes of a volume."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmadapt.ui.segment_view import SegmentView


def segment(
    model: Any, picture: Any = None, window: str | tuple[float, float] | None = None
) -> SegmentView:
    """Click an object in an image or a volume and see its mask.

    A click is on the object; with shift, or the right button, beside it; a drag is a box; the wheel
    scrolls the slices of a volume. The model is a SAM, a `segment.Segmenter`, or for an image any
    function `predict(points, labels, box)` (`segment.ImageSegmenter`). A study, as
    `segment.ImageSegmenter` or `volume.VolumeSegmenter`, is shown as it is, without a picture.

    The picture is an image, (H, W) or (H, W, 3) of any type of numbers, a tensor or a PIL image; a
    `volume.Volume`, or its voxels (D, H, W). `window` says which values become black and white for the
    model, unless its adapters say what they were trained with; the sliders change what is seen alone.

    What is shown is plain data, which may be assigned as well, here or in a later cell: `points`,
    `labels`, `boxes`, `mask`, `candidate`, `window`, `adapted`, of a volume `at`. `score` and `scores`
    are the overlaps the model expects. Raises `DataError` for a picture that is none.

        w = mm.ui.segment(mm.load("tiny/sam"), image)
        w                                                     # click
        w.points, w.labels, w.mask, w.score
        w.points = [(30, 22)]                                 # the same as a click there
    """
    from mmadapt.ui.scene import scene_of
    from mmadapt.ui.segment_view import SegmentView

    return SegmentView(scene_of(model, picture, window))
