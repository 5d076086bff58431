"""Real volumes that other libraries ship, and DICOM series built of one slice."""

from __future__ import annotations

import importlib.resources
from pathlib import Path
from typing import Any

import numpy
from pydicom.data import get_testdata_file

SEED = numpy.random.RandomState(0)


def nifti(name: str) -> Path:
    """A file that nibabel ships."""
    return Path(str(importlib.resources.files("nibabel"))) / "tests" / "data" / name


def dicom(name: str) -> Path:
    """A file, or a folder of files, that pydicom ships; nothing is fetched."""
    if "/" in name:
        return Path(str(get_testdata_file("CT_small.dcm", download=False))).parent / name
    found = get_testdata_file(name, download=False)
    assert found is not None, name
    return Path(str(found))


def ball(
    size: tuple[int, ...], centre: tuple[float, ...], radii: tuple[float, ...]
) -> numpy.ndarray:
    """bool (D, H, W), true within an ellipsoid."""
    at = numpy.indices(size).astype(float)
    middle, half = (numpy.array(v, float).reshape(3, 1, 1, 1) for v in (centre, radii))
    return (((at - middle) / half) ** 2).sum(0) < 1


def series(
    folder: Path,
    count: int = 6,
    step: tuple[float, float, float] = (0.0, 0.0, 2.5),
    orientation: tuple[float, ...] = (1, 0, 0, 0, 1, 0),
    **changes: Any,
) -> Path:
    """A CT series of `count` slices, files named against their order; values tell the place.

    Stored value 1024 + 100·z + y − x stands at [z, y, x], 12 rows of 10 voxels, 0.5 mm between rows
    and 0.8 mm between columns. `changes` are tags by keyword, a function of z each or a value.
    """
    import pydicom

    folder.mkdir(parents=True, exist_ok=True)
    y, x = numpy.indices((12, 10))
    for z in range(count):
        slice_ = pydicom.dcmread(dicom("CT_small.dcm"))
        slice_.Rows, slice_.Columns = 12, 10
        slice_.PixelSpacing = [0.5, 0.8]
        slice_.ImageOrientationPatient = list(orientation)
        slice_.ImagePositionPatient = [10.0 + z * step[0], -20.0 + z * step[1], 5.0 + z * step[2]]
        slice_.SliceThickness = 2.5
        slice_.InstanceNumber = z + 1
        slice_.SOPInstanceUID = f"1.2.3.{z}"
        slice_.PixelData = (1024 + 100 * z + y - x).astype("<i2").tobytes()
        for name, value in changes.items():
            value = value(z) if callable(value) else value
            if value is None:
                delattr(slice_, name)
            else:
                setattr(slice_, name, value)
        slice_.save_as(folder / f"{count - z:03d}.dcm")
    return folder
