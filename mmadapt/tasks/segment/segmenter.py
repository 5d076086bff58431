"""Encode an image once, prompt it many times."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.nn import functional as F

from mmadapt.tasks.segment.images import check_image
from mmadapt.tasks.segment.model import decode, embed, sam_kind, sides, stretches
from mmadapt.tasks.segment.prompts import check_prompts

#: of the RGB images SAM was trained on
MEAN, DEVIATION = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


@dataclass(frozen=True, eq=False)
class Encoded:
    """An image after the encoder: embedding (1, C, h, w), its own size and that in the square."""

    embedding: Tensor
    size: tuple[int, int]
    resized: tuple[int, int]


@dataclass(frozen=True, eq=False)
class Masks:
    """One answer: logits (K, H, W) in the image's own pixels, the overlap the model expects of each.

    `masks` are logits above zero; `low` (K, s, s) are the decoder's own, for a next prompt.
    """

    logits: Tensor
    overlaps: Tensor
    low: Tensor

    @property
    def masks(self) -> Tensor:
        """bool (K, H, W)."""
        return self.logits > 0

    @property
    def best(self) -> Tensor:
        """bool (H, W), the mask with the largest expected overlap."""
        return self.masks[int(self.overlaps.argmax())]


class Segmenter:
    """Images in, masks out, for transformers' `SamModel`, `Sam2Model` and segment_anything's `Sam`.

    An image is resized so that its longer side fills the model's square, and padded at the right and
    at the bottom; for SAM 2 it is stretched to the square. Prompts are in the image's own pixels.

        sam = segment.Segmenter(model)
        image = sam.encode(pixels)
        masks = sam.predict(image, points=[(120, 80), (30, 40)], labels=[1, 0])
    """

    def __init__(self, model: Any) -> None:
        self.model, _ = sam_kind(model)
        self.side, self.mask_side = sides(self.model)

    def resized(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width in the square of an image (height, width)."""
        if stretches(self.model):
            return self.side, self.side
        scale = self.side / max(size)
        return int(size[0] * scale + 0.5), int(size[1] * scale + 0.5)

    def prepare(self, image: Any, grey: bool = False) -> Tensor:
        """An image uint8 (H, W, 3) as the encoder takes it, float (3, side, side)."""
        array = check_image(image, grey)
        pixels = torch.from_numpy(numpy.ascontiguousarray(array)).permute(2, 0, 1)[None].float()
        height, width = self.resized(array.shape[:2])  # type: ignore[arg-type]
        pixels = F.interpolate(
            pixels, (height, width), mode="bilinear", align_corners=False, antialias=True
        )
        mean, deviation = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, DEVIATION))
        pixels = (pixels - mean) / deviation
        return F.pad(pixels, (0, self.side - width, 0, self.side - height))[0]

    @torch.no_grad()
    def encode(self, image: Any, grey: bool = False) -> Encoded:
        """Run the encoder on one image, uint8 (H, W, 3); with `grey` also (H, W)."""
        size = check_image(image, grey).shape[:2]
        pixels = self.prepare(image, grey).to(next(self.model.parameters()))
        return Encoded(embed(self.model, pixels[None]), size, self.resized(size))  # type: ignore[arg-type]

    @torch.no_grad()
    def predict(
        self,
        image: Encoded,
        points: Any = None,
        labels: Any = None,
        box: Any = None,
        mask: Any = None,
        several: bool = False,
    ) -> Masks:
        """Masks of the object that the prompts mean: one, or three with `several`.

        Points are (x, y) in the image's pixels, a box is (x1, y1, x2, y2), a mask the `low` of an
        earlier answer, (s, s) or (1, s, s). Raises `DataError` for prompts without a meaning.
        """
        if isinstance(mask, Tensor):
            mask = mask.detach().float().cpu().numpy()
        if mask is not None and numpy.ndim(mask) == 3 and len(mask) == 1:
            mask = mask[0]
        low_size = (self.mask_side, self.mask_side)
        given = check_prompts(image.size, points, labels, box, mask, low_size)
        like = image.embedding
        low, overlaps = decode(
            self.model,
            like,
            self._square(given.points, image, like),
            None if given.labels is None else torch.from_numpy(given.labels).to(like.device)[None],
            self._square(given.box, image, like),
            None if given.mask is None else torch.from_numpy(given.mask).to(like)[None, None],
            several,
        )
        height, width = image.resized
        square = F.interpolate(low, (self.side,) * 2, mode="bilinear", align_corners=False)
        own = F.interpolate(
            square[..., :height, :width], image.size, mode="bilinear", align_corners=False
        )
        return Masks(own[0], overlaps[0], low[0])

    def _square(self, xy: numpy.ndarray | None, image: Encoded, like: Tensor) -> Tensor | None:
        """Coordinates (…, 2) or boxes of the image in the model's square, with a batch axis."""
        if xy is None:
            return None
        scale = numpy.array([image.resized[1] / image.size[1], image.resized[0] / image.size[0]])
        scaled = (xy.reshape(-1, 2) * scale).reshape(xy.shape)
        return torch.from_numpy(scaled).to(like)[None]
