"""A study in three dimensions: click a volume, correct by more clicks, save."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy
import torch

from mmadapt.core.backbone import unwrap
from mmadapt.errors import DataError
from mmadapt.tasks.volume.clicked import ClickedVolumes, normalised, three_d_sam_of
from mmadapt.tasks.volume.trained import as_trained
from mmadapt.tasks.volume.volume import Volume
from mmadapt.tasks.volume.windows import check_window, predict_at, predict_whole


class VolumeSegmenter:
    """One object of a volume, for a SAM that `ThreeDSAM` made one of volumes.

        ct = read_nifti("ct.nii.gz").window("ct abdomen").resample(1.0)
        study = VolumeSegmenter(sam, ct, window=(64, 64, 64))
        study.click((40, 120, 96))              # (z, y, x) in the original image
        study.click((44, 130, 90), label=0)     # beside it
        save_mask("tumour.nii.gz", study.mask, study.volume)

    Windows (d, h, w), of voxels that tokens divide, stand around the clicks on the object, and each is
    encoded once. A click that lies well inside of a window opens no other. Outside of all windows is
    background, so choose one that holds the object. An adapter made with `prompts=False` takes no
    clicks and segments all of the volume: `whole`.

    The volume has one channel of 0 to 1, as `Volume.window` gives, or the scanner's values where the
    adapter says what window it was trained with (`segment.set_input`).
    """

    def __init__(self, model: Any, volume: Volume, window: Sequence[int]) -> None:
        self.model, _, _ = unwrap(model)
        three_d_sam_of(self.model)
        self.volume = as_trained(self.model, volume)
        if len(volume.array) != 1:
            raise DataError(f"{volume.name} has {len(volume.array)} channels, expected one")
        self.window = check_window(self.volume, window)
        self.points: list[tuple[float, float, float]] = []
        self.labels: list[int] = []
        self.mask: numpy.ndarray = numpy.zeros(volume.size, bool)
        self._steps: list[tuple[list[Any], list[int]]] = []
        self._clicked: ClickedVolumes | None = None

    def click(self, point: Any, label: int = 1) -> numpy.ndarray:
        """A click (z, y, x) in the original image, 1 on the object, 0 beside it; the mask, bool.

        The model gets all clicks so far. One that is refused is not kept.
        """
        return self.ask([*self.points, tuple(point)], [*self.labels, label])

    def ask(self, points: Sequence[Any] = (), labels: Sequence[int] | None = None) -> numpy.ndarray:
        """Put these clicks in the place of all others; the mask. Labels are 1 where none are given."""
        at = [tuple(point) for point in points]
        kinds = [1] * len(at) if labels is None else list(labels)
        mask = numpy.zeros(self.volume.size, bool)
        if at or kinds:
            if self._clicked is None:
                self._clicked = ClickedVolumes(self.model)
            mask = predict_at(self.volume, self._clicked, self.window, at, kinds)[0] > 0
        self._steps.append((self.points, self.labels))
        self.points, self.labels, self.mask = at, kinds, mask
        return mask

    def undo(self) -> None:
        """Take back the last click, and answer the others anew; nothing where there was none."""
        if self._steps:
            self.ask(*self._steps[-1])
            del self._steps[-2:]

    def box(self, box: Any) -> None:
        """Refused: this method was published with clicks alone."""
        raise DataError(
            f"a box {tuple(box)} was given, and 3DSAM-adapter's prompt encoder takes clicks alone",
            "click its middle, or draw several clicks from a mask: volume.from_mask(mask, 3); "
            "SliceSegmenter takes boxes",
        )

    def whole(self, overlap: float = 0.5, batch_size: int = 1) -> numpy.ndarray:
        """All of the volume in overlapping windows, without clicks; the mask, or labels (D, H, W)."""
        if three_d_sam_of(self.model).prompts:
            raise DataError(
                "this adapter was made with prompts, and a window without a click has no meaning to it",
                "click((z, y, x)), or attach one with prompts=False",
            )

        def network(window: torch.Tensor) -> torch.Tensor:
            return self.model(normalised(self.model, window))

        network.parameters = self.model.parameters  # type: ignore[attr-defined]
        logits = predict_whole(self.volume, network, self.window, overlap, batch_size)
        classes = logits.argmax(0) if len(logits) > 1 else logits[0] > 0
        self.mask = classes > 0 if len(logits) <= 2 else classes.astype(numpy.uint8)
        return self.mask

    def on_original(self) -> numpy.ndarray:
        """The mask on the original grid."""
        return self.volume.back(self.mask)

    def forget(self) -> None:
        """Take back every click; encoded windows stay."""
        self.points, self.labels = [], []
        self._steps.clear()
        self.mask = numpy.zeros(self.volume.size, bool)
