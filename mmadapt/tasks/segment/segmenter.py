"""Encode an image once, prompt it many times."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.nn import functional as F

from mmadapt.errors import DataError
from mmadapt.tasks.segment.images import check_image, check_stack
from mmadapt.tasks.segment.inputs import input_of
from mmadapt.tasks.segment.intensity import window
from mmadapt.tasks.segment.model import decode, embed, sam_kind, sides, stretches
from mmadapt.tasks.segment.prompts import check_prompts, per_slice

#: of the RGB images SAM was trained on
MEAN, DEVIATION = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


@dataclass(frozen=True, eq=False)
class Encoded:
    """An image after the encoder: embedding (1, C, h, w), its own size and that in the square.

    A stack of D slices has the embedding (D, C, h, w), and `stacked` is true.
    """

    embedding: Tensor
    size: tuple[int, int]
    resized: tuple[int, int]
    stacked: bool = False


@dataclass(frozen=True, eq=False)
class Masks:
    """One answer: logits (K, H, W) in the image's own pixels, the overlap the model expects of each.

    `masks` are logits above zero; `low` (K, s, s) are the decoder's own, for a next prompt. Of a stack
    of D slices K is D: one mask a slice, all of one object.
    """

    logits: Tensor
    overlaps: Tensor
    low: Tensor
    stacked: bool = False

    @property
    def masks(self) -> Tensor:
        """bool (K, H, W)."""
        return self.logits > 0

    @property
    def best(self) -> Tensor:
        """bool (H, W), the mask with the largest expected overlap; of a stack all, (D, H, W)."""
        return self.masks if self.stacked else self.masks[int(self.overlaps.argmax())]


class Segmenter:
    """Images in, masks out, for transformers' `SamModel`, `Sam2Model` and segment_anything's `Sam`.

    An image is resized so that its longer side fills the model's square, and padded at the right and
    at the bottom; for SAM 2 it is stretched to the square. Prompts are in the image's own pixels.

        sam = segment.Segmenter(model)
        image = sam.encode(pixels)
        masks = sam.predict(image, points=[(120, 80), (30, 40)], labels=[1, 0])

    The slices of a volume go through together, and attached layers that look along the depth are
    told how many there are:

        stack = sam.encode_stack(slices)
        volume = sam.predict(stack, points=[(120, 80)], labels=[1]).masks

    Where the adapters that act say how their images were made (`set_input`), the same is done here:
    grey values of any type are brought to their window, pixels normalised and clicks given as they were
    in training; bytes are taken as windowed already.
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
        wanted = input_of(self.model)
        if wanted.image_side not in (None, self.side):
            raise DataError(
                f"the active adapter was trained on images {wanted.image_side} pixels a side, this SAM "
                f"takes {self.side}",
                "give the SAM that side first: mmadapt.interop.sam.resize_positions",
            )
        array = check_image(self._windowed(image, grey), grey)
        pixels = torch.from_numpy(numpy.ascontiguousarray(array)).permute(2, 0, 1)[None].float()
        height, width = self.resized(array.shape[:2])  # type: ignore[arg-type]
        pixels = F.interpolate(
            pixels, (height, width), mode="bilinear", align_corners=False, antialias=True
        )
        mean, deviation = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, DEVIATION))
        pixels = pixels / 255 if wanted.normalise == "0-1" else (pixels - mean) / deviation
        return F.pad(pixels, (0, self.side - width, 0, self.side - height))[0]

    @torch.no_grad()
    def encode(self, image: Any, grey: bool = False) -> Encoded:
        """Run the encoder on one image, uint8 (H, W, 3); with `grey` also (H, W)."""
        image = self._windowed(image, grey)
        size = check_image(image, grey).shape[:2]
        pixels = self.prepare(image, grey).to(next(self.model.parameters()))
        return Encoded(embed(self.model, pixels[None]), size, self.resized(size))  # type: ignore[arg-type]

    @torch.no_grad()
    def encode_stack(self, slices: Any, grey: bool = False) -> Encoded:
        """Run the encoder on the slices of one volume, uint8 (D, H, W, 3); with `grey` (D, H, W)."""
        array = check_stack(self._windowed(slices, grey), grey)
        pixels = torch.stack([self.prepare(own, grey) for own in array])
        size = (array.shape[1], array.shape[2])
        embedding = embed(self.model, pixels.to(next(self.model.parameters())), len(array))
        return Encoded(embedding, size, self.resized(size), stacked=True)

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
        earlier answer, (s, s) or (1, s, s). Of a stack there is one mask a slice; each kind of prompt
        is given once for all slices, or with a first axis D for each of them. Raises `DataError` for
        prompts without a meaning.
        """
        given = self._prompts(image, points, labels, box, mask)
        if image.stacked and several:
            raise DataError(
                "several answers are asked for in a stack, whose slices would choose apart",
                "leave out several=True, or encode the slice on its own",
            )
        low, overlaps = decode(self.model, image.embedding, *given, several)
        height, width = image.resized
        square = F.interpolate(low, (self.side,) * 2, mode="bilinear", align_corners=False)
        own = F.interpolate(
            square[..., :height, :width], image.size, mode="bilinear", align_corners=False
        )
        if image.stacked:
            return Masks(own[:, 0], overlaps[:, 0], low[:, 0], stacked=True)
        return Masks(own[0], overlaps[0], low[0])

    def _windowed(self, values: Any, grey: bool) -> Any:
        """Grey values brought to the window of the active adapters, where they name one."""
        array, wanted = numpy.asarray(values), input_of(self.model).window
        if (
            not grey
            or wanted is None
            or array.dtype.kind not in "iuf"
            or array.dtype == numpy.uint8
        ):
            return values
        return window(array, wanted) if isinstance(wanted, str) else window(array, *wanted)

    def _prompts(
        self, image: Encoded, points: Any, labels: Any, box: Any, mask: Any
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Points, labels, boxes and masks as `decode` takes them, a row for each embedding."""
        if isinstance(mask, Tensor):
            mask = mask.detach().float().cpu().numpy()
        if not image.stacked and numpy.ndim(mask) == 3 and len(mask) == 1:
            mask = mask[0]
        like, rows = image.embedding, len(image.embedding)
        of_slices = zip(
            per_slice("points", points, 2, image.stacked, rows),
            per_slice("labels", labels, 1, image.stacked, rows),
            per_slice("box", box, 1, image.stacked, rows),
            per_slice("mask", mask, 2, image.stacked, rows),
            strict=True,
        )
        low_size = (self.mask_side, self.mask_side)
        given = [check_prompts(image.size, *own, low_size) for own in of_slices]
        scale = numpy.array([image.resized[1] / image.size[1], image.resized[0] / image.size[0]])

        def together(values: list[Any]) -> Tensor | None:
            return None if values[0] is None else torch.from_numpy(numpy.stack(values)).to(like)

        def square(xy: numpy.ndarray | None) -> Any:
            return None if xy is None else (xy.reshape(-1, 2) * scale).reshape(xy.shape)

        # a click as its adapter was trained to read it; boxes are (x1, y1, x2, y2) in any case
        order = [1, 0] if input_of(self.model).click_order == "row_col" else [0, 1]
        points = [None if own.points is None else square(own.points)[:, order] for own in given]
        kinds = together([own.labels for own in given])
        masks = together([own.mask for own in given])
        return (
            together(points),
            None if kinds is None else kinds.long(),
            together([square(own.box) for own in given]),
            None if masks is None else masks[:, None],
        )
