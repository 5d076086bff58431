"""A small network that guesses a mask from the image alone."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from mmadapt.errors import DataError, MissingDependencyError
from mmadapt.tasks.segment.loss import dice_cross_entropy


class CoarseMask(nn.Module):
    """Features of an image classifier at all its scales, and a decoder that adds them up to a mask.

    `backbone` is a name of timm's; `width` channels in the decoder. Without `pretrained` weights,
    which timm downloads, all is drawn at random. Takes pixels (B, 3, H, W), as `Segmenter.prepare`
    gives them, of any size from 32 on; returns logits (B, H, W).

        coarse = segment.CoarseMask()
        mm.fit(coarse, (pixels, masks), loss=segment.coarse_loss, batch_size=4)
    """

    def __init__(
        self, backbone: str = "efficientnet_b1", width: int = 64, pretrained: bool = False
    ) -> None:
        super().__init__()
        timm = _timm()
        self.features = timm.create_model(backbone, features_only=True, pretrained=pretrained)
        channels: list[int] = self.features.feature_info.channels()
        self.narrow = nn.ModuleList(nn.Conv2d(count, width, 1) for count in channels)
        self.mix = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 1, 1)
        )

    def forward(self, pixels: Tensor) -> Tensor:
        maps = [
            narrow(features)
            for narrow, features in zip(self.narrow, self.features(pixels), strict=True)
        ]
        total = maps.pop()
        for finer in reversed(maps):
            total = finer + F.interpolate(total, finer.shape[-2:], mode="bilinear")
        return F.interpolate(self.mix(total), pixels.shape[-2:], mode="bilinear")[:, 0]


def coarse_loss(model: Any, batch: Any) -> Tensor:
    """A loss for `mmadapt.fit` of a `CoarseMask`: Dice plus cross-entropy of (pixels, masks).

    Pixels (B, 3, H, W), masks (B, H, W) of 0 and 1.
    """
    pixels, masks = batch
    if pixels.ndim != 4 or masks.shape != (len(pixels), *pixels.shape[2:]):
        raise DataError(
            f"pixels are {tuple(pixels.shape)} and masks {tuple(masks.shape)}, expected (B, 3, H, W) "
            "and (B, H, W)"
        )
    return dice_cross_entropy(model(pixels), masks)


def _timm() -> Any:
    try:
        import timm
    except ImportError as error:
        raise MissingDependencyError(
            f"CoarseMask takes its features from timm, which cannot be imported: {error}",
            "pip install timm",
        ) from error
    return timm
