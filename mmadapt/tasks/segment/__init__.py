"""Promptable segmentation with SAM: an image is encoded once and prompted many times.

from mmadapt.tasks import segment

sam = segment.Segmenter(model)
image = sam.encode(pixels)                                # uint8 (H, W, 3)
masks = sam.predict(image, points=[(120, 80)], labels=[1])
history = mm.fit(model, (images, targets), loss=segment.PromptedLoss(), batch_size=2)

study = segment.ImageSegmenter(model, pixels)             # mm.ui.segment(model, pixels) shows it
study.click((120, 80))

stack = sam.encode_stack(slices)                          # uint8 (D, H, W, 3), one click for all slices
volume = sam.predict(stack, points=[(120, 80)], labels=[1]).masks
print(segment.summary([segment.dice(p, t) for p, t in zip(predictions, truths)], miss=0.0))
"""

from mmadapt.tasks.segment.automatic import AutoPrompted, dense_points
from mmadapt.tasks.segment.clicks import boxes_around, click_on_error, first_clicks, shared_clicks
from mmadapt.tasks.segment.coarse import CoarseMask, coarse_loss
from mmadapt.tasks.segment.figure import before_after, overlay, slices
from mmadapt.tasks.segment.images import check_image, check_stack
from mmadapt.tasks.segment.inputs import Input, input_of, set_input
from mmadapt.tasks.segment.intensity import PERCENTILES, WINDOWS, intensity_range, window
from mmadapt.tasks.segment.loss import PromptedLoss, dice_cross_entropy
from mmadapt.tasks.segment.metrics import (
    Summary,
    dice,
    hausdorff,
    summary,
    surface_dice,
)
from mmadapt.tasks.segment.model import decode, decoder_sites, embed
from mmadapt.tasks.segment.numbers import Numbers, numbers_of
from mmadapt.tasks.segment.prompts import Prompts, check_prompts
from mmadapt.tasks.segment.segmenter import Encoded, Masks, Segmenter
from mmadapt.tasks.segment.study import ImageSegmenter

__all__ = [
    "PERCENTILES",
    "WINDOWS",
    "AutoPrompted",
    "CoarseMask",
    "Encoded",
    "ImageSegmenter",
    "Input",
    "Masks",
    "Numbers",
    "PromptedLoss",
    "Prompts",
    "Segmenter",
    "Summary",
    "before_after",
    "boxes_around",
    "check_image",
    "check_prompts",
    "check_stack",
    "click_on_error",
    "coarse_loss",
    "decode",
    "decoder_sites",
    "dense_points",
    "dice",
    "dice_cross_entropy",
    "embed",
    "first_clicks",
    "hausdorff",
    "input_of",
    "intensity_range",
    "numbers_of",
    "overlay",
    "set_input",
    "shared_clicks",
    "slices",
    "summary",
    "surface_dice",
    "window",
]
