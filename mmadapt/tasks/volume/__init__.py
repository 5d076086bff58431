"""Volumes of the body: read, checked, prompted, segmented and saved where they came from.

from mmadapt.tasks import volume

ct = volume.read_nifti("ct.nii.gz").window("ct abdomen")  # or read_dicom("folder")
study = volume.SliceSegmenter(model, ct)
study.click((40, 120, 96))                                # (z, y, x) in the original image
study.propagate()
volume.planes_figure(ct, mask=study.mask)
volume.save_mask("liver.nii.gz", study.mask, ct)          # on the original grid and affine
"""

from mmadapt.tasks.volume.blend import OUTSIDE
from mmadapt.tasks.volume.dicom import read_dicom
from mmadapt.tasks.volume.figure import planes_figure
from mmadapt.tasks.volume.grid import Grid, regrid
from mmadapt.tasks.volume.loss import VolumeLoss
from mmadapt.tasks.volume.nifti import (
    create_mask,
    open_nifti,
    read_mask,
    read_nifti,
    save_mask,
)
from mmadapt.tasks.volume.prompts import Box, Point, box_of, from_mask, next_click
from mmadapt.tasks.volume.segmenter import VolumeSegmenter
from mmadapt.tasks.volume.slices import SliceSegmenter
from mmadapt.tasks.volume.structures import Score, score_structures, score_table
from mmadapt.tasks.volume.volume import Step, Volume
from mmadapt.tasks.volume.windows import predict_at, predict_whole

__all__ = [
    "OUTSIDE",
    "Box",
    "Grid",
    "Point",
    "Score",
    "SliceSegmenter",
    "Step",
    "Volume",
    "VolumeLoss",
    "VolumeSegmenter",
    "box_of",
    "create_mask",
    "from_mask",
    "next_click",
    "open_nifti",
    "planes_figure",
    "predict_at",
    "predict_whole",
    "read_dicom",
    "read_mask",
    "read_nifti",
    "regrid",
    "save_mask",
    "score_structures",
    "score_table",
]
