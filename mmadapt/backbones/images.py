"""Images as people have them, checked, and turned into the pixels a backbone wants."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmadapt.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor


class OpenClipPreprocess:
    """One image or a sequence of images to float pixels (N, 3, S, S), by open_clip's own transform.

    Images are PIL images or uint8 arrays (H, W, 3) with values 0–255.
    """

    def __init__(self, size: int, config: dict[str, Any]) -> None:
        self.size = size
        self.config = dict(config)
        self._transform: Any = None

    def __call__(self, images: Any) -> Tensor:
        import torch

        if self._transform is None:
            from open_clip.transform import PreprocessCfg, image_transform_v2

            settings = PreprocessCfg(**{"size": self.size, **self.config})
            self._transform = image_transform_v2(settings, is_train=False)
        return torch.stack([self._transform(image) for image in as_images(images)])

    def __repr__(self) -> str:
        settings = ", ".join(f"{key}={value}" for key, value in sorted(self.config.items()))
        return f"OpenClipPreprocess(size={self.size}, {settings})"


class ProcessorPreprocess:
    """One image or a sequence of images to float pixels (N, 3, H, W), by transformers' processor of a folder."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder = folder
        self.settings = dict(settings)
        self._processor: Any = None

    def __call__(self, images: Any) -> Tensor:
        if self._processor is None:
            from transformers import AutoImageProcessor

            self._processor = AutoImageProcessor.from_pretrained(self.folder, local_files_only=True)
        return self._processor(as_images(images), return_tensors="pt")["pixel_values"]

    def __repr__(self) -> str:
        settings = ", ".join(f"{key}={value}" for key, value in sorted(self.settings.items()))
        return f"ProcessorPreprocess({settings})"


class TimmPreprocess:
    """One image or a sequence of images to float pixels (N, 3, S, S), by timm's transform for the weights."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = dict(settings)
        self._transform: Any = None

    def __call__(self, images: Any) -> Tensor:
        import torch

        if self._transform is None:
            from timm.data.transforms_factory import create_transform

            self._transform = create_transform(**self.settings, is_training=False)
        return torch.stack([self._transform(image) for image in as_images(images)])

    def __repr__(self) -> str:
        settings = ", ".join(f"{key}={value}" for key, value in sorted(self.settings.items()))
        return f"TimmPreprocess({settings})"


def as_images(images: Any) -> list[Image]:
    """A list of RGB images from one image or many.

    Raises `DataError` that says which image has the wrong type, channels, dtype or range.
    """
    if hasattr(images, "convert") or (hasattr(images, "ndim") and images.ndim == 3):
        images = [images]
    if hasattr(images, "ndim") and images.ndim != 4:
        raise DataError(
            f"images have shape {tuple(images.shape)}, expected (N, H, W, 3) or (H, W, 3)"
        )
    if not isinstance(images, Sequence) and not hasattr(images, "ndim"):
        raise DataError(f"expected images, got {type(images).__name__}")
    if len(images) == 0:
        raise DataError("no image was given")
    return [_as_image(image, index) for index, image in enumerate(images)]


def _as_image(image: Any, index: int) -> Image:
    import numpy
    from PIL import Image

    if isinstance(image, Image.Image):
        if image.mode in ("I", "I;16", "F"):
            raise DataError(
                f"image {index} has mode {image.mode!r}, more than 8 bits a channel",
                "scale it to 0–255 and convert to uint8 first",
            )
        return image.convert("RGB")
    if not isinstance(image, numpy.ndarray):
        raise DataError(
            f"image {index} is a {type(image).__name__}, expected a PIL image or a uint8 array "
            "(H, W, 3)",
            "tensors: image.permute(1, 2, 0).mul(255).byte().numpy()",
        )
    if image.ndim != 3 or image.shape[2] != 3:
        raise DataError(
            f"image {index} has shape {image.shape}, expected (H, W, 3)", _channel_hint(image)
        )
    if image.dtype != numpy.uint8:
        low, high = (image.min(), image.max()) if image.size else (0, 0)
        raise DataError(
            f"image {index} is {image.dtype} with values {low:.4g} to {high:.4g}, expected uint8 "
            "from 0 to 255",
            "(image * 255).round().astype('uint8')" if high <= 1 else "image.astype('uint8')",
        )
    if 0 in image.shape:
        raise DataError(f"image {index} is empty: shape {image.shape}")
    return Image.fromarray(image)


def _channel_hint(image: Any) -> str:
    if image.ndim == 2 or image.shape[-1] == 1:
        return "grey images: numpy.repeat(image.reshape(h, w, 1), 3, axis=2)"
    if image.shape[-1] == 4:
        return "drop the alpha channel: image[..., :3]"
    if image.shape[0] == 3:
        return "channels come last: image.transpose(1, 2, 0)"
    return "choose the three channels to show, as red, green and blue"
