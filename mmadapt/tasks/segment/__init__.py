"""Promptable segmentation with SAM: an image is encoded once and prompted many times.

from mmadapt.tasks import segment

sam = segment.Segmenter(model)
image = sam.encode(pixels)                                # uint8 (H, W, 3)
masks = sam.predict(image, points=[(120, 80)], labels=[1])
history = mm.fit(model, (images, targets), loss=segment.PromptedLoss(), batch_size=2)
print(segment.summary([segment.dice(p, t) for p, t in zip(predictions, truths)], miss=0.0))
"""

from mmadapt.tasks.segment.clicks import click_on_error, first_clicks
from mmadapt.tasks.segment.figure import before_after, overlay, slices
from mmadapt.tasks.segment.images import WINDOWS, check_image, window
from mmadapt.tasks.segment.loss import PromptedLoss, dice_cross_entropy
from mmadapt.tasks.segment.metrics import (
    Summary,
    dice,
    hausdorff,
    summary,
    surface_dice,
)
from mmadapt.tasks.segment.model import decoder_sites
from mmadapt.tasks.segment.prompts import Prompts, check_prompts
from mmadapt.tasks.segment.segmenter import Encoded, Masks, Segmenter

__all__ = [
    "WINDOWS",
    "Encoded",
    "Masks",
    "PromptedLoss",
    "Prompts",
    "Segmenter",
    "Summary",
    "before_after",
    "check_image",
    "check_prompts",
    "click_on_error",
    "decoder_sites",
    "dice",
    "dice_cross_entropy",
    "first_clicks",
    "hausdorff",
    "overlay",
    "slices",
    "summary",
    "surface_dice",
    "window",
]
