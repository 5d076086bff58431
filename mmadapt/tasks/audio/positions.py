"""Spectrogram transformers for clips of another length."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any, Literal

from mmadapt.core.backbone import Backbone, unwrap_model
from mmadapt.errors import BackboneError, DataError
from mmadapt.tasks.audio.spectrum import SpectrumFeatures


def fit_positions(
    m: Any, frames: int, how: Literal["interpolate", "crop"] = "interpolate"
) -> tuple[int, int]:
    """Let an AST take spectrograms of `frames` frames; returns the bands and columns it has then.

    Its grid of position embeddings is interpolated along time (bilinear), or with "crop" its middle is
    kept; those of the two special tokens stay. Changes the backbone, so it comes before `attach`, and
    before an adapter file is loaded. Loading a shorter model with mismatched sizes ignored would leave
    zeros in their place. The `preprocess` of a `Backbone` follows.
    """
    import torch
    from torch import nn
    from torch.nn import functional as F

    from mmadapt.core.bank import bank_of

    root = unwrap_model(m)
    model: Any = getattr(root, "audio_spectrogram_transformer", root)
    config = model.config
    if config.model_type != "audio-spectrogram-transformer":
        raise BackboneError(f"{type(root).__name__} has no grid of positions along time")
    if bank_of(root) is not None:
        raise DataError(
            "adapters are attached, and this changes the backbone they stand in",
            "mmadapt.detach(model) first, or call it before attach",
        )
    if frames < config.patch_size:
        raise DataError(f"{frames} frames are fewer than one patch, which has {config.patch_size}")
    bands = (config.num_mel_bins - config.patch_size) // config.frequency_stride + 1
    columns = (frames - config.patch_size) // config.time_stride + 1
    old = model.embeddings.position_embeddings
    special, patches = old.detach()[:, :2], old.detach()[:, 2:].float()
    grid = patches.unflatten(1, (bands, -1)).permute(0, 3, 1, 2)  # (1, C, bands, columns)
    if how == "interpolate":
        grid = F.interpolate(grid, size=(bands, columns), mode="bilinear", align_corners=False)
    else:
        spare = grid.shape[-1] - columns
        if spare < 0:
            raise DataError(f"{columns} columns cannot be cropped from {grid.shape[-1]}")
        grid = grid[..., spare // 2 : spare // 2 + columns]
    patches = grid.permute(0, 2, 3, 1).flatten(1, 2).to(old.dtype)
    model.embeddings.position_embeddings = nn.Parameter(
        torch.cat([special, patches], 1), requires_grad=old.requires_grad
    )
    own = copy.deepcopy(config)  # other models may have been built from the same one
    own.max_length = frames
    for module in root.modules():
        if getattr(module, "config", None) is config:
            module.config = own
    if isinstance(m, Backbone) and isinstance(m.preprocess, SpectrumFeatures):
        m.preprocess = dataclasses.replace(m.preprocess, frames=frames)
    return bands, columns
