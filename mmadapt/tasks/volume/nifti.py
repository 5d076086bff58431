"""NIfTI files (and what else nibabel reads): images, masks, and masks written back."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy

from mmadapt.errors import DataError, MissingDependencyError
from mmadapt.tasks.volume.grid import Grid
from mmadapt.tasks.volume.stored import Stored
from mmadapt.tasks.volume.volume import Volume


def read_nifti(path: Any, t: int | None = None, nan: float | None = None) -> Volume:
    """An image file as a `Volume` (1, D, H, W) with the file's own affine and order of voxels.

    Of a series over time take one, `t`. `nan` is what stands for values that are no number, which
    are refused otherwise. Spacing is that of the affine.
    """
    image = _open(path)
    values = _one_time(image, path, t).astype(numpy.float32)
    if nan is not None:
        values = numpy.nan_to_num(values, nan=nan, posinf=numpy.inf, neginf=-numpy.inf)
    return Volume(values.T, image.affine, name=Path(path).name)


def open_nifti(path: Any) -> Volume:
    """A volume larger than memory: values stay in the file and are read window by window.

    The file must not be compressed, since reading a window of it would mean reading all before it.
    """
    image = _open(path)
    if Path(path).suffix in (".gz", ".bz2", ".mgz", ".zst"):
        raise DataError(
            f"{Path(path).name} is compressed, so that no window of it can be read alone",
            "unpack it (gunzip), or read it whole: read_nifti(path)",
        )
    _check_times(image.shape, path, None)
    return Volume(Stored(image.dataobj), image.affine, name=Path(path).name)


def read_mask(path: Any, like: Volume | Grid | None = None, t: int | None = None) -> numpy.ndarray:
    """A file of labels as whole numbers (D, H, W): uint8, or int32 where they are larger.

    With `like`, the image they belong to, its original grid must be theirs within 1e-3 mm. Fractions
    and negative labels are refused.
    """
    image = _open(path)
    values = _one_time(image, path, t).T
    name = Path(path).name
    if values.dtype.kind not in "bui":
        wrong = values != numpy.rint(values)  # a NaN is one
        if wrong.any():
            shown = ", ".join(f"{value:g}" for value in numpy.unique(values[wrong])[:4])
            raise DataError(
                f"{name} holds {int(wrong.sum())} values that are no labels: {shown} …",
                "labels were resampled between voxels; make them again with the nearest value",
            )
    if values.min() < 0 or values.max() > 2**31 - 1:
        raise DataError(f"{name} holds labels from {values.min():g} to {values.max():g}")
    if like is not None:
        grid = Grid(values.shape, image.affine)  # type: ignore[arg-type]
        other = like.original if isinstance(like, Volume) else like
        apart = grid.difference(other)
        if apart:
            source = like.name if isinstance(like, Volume) else "the image"
            raise DataError(
                f"{name} does not lie on {source}: {apart}\n  {name}: {grid}, affine "
                f"{_rows(grid.affine)}\n  {source}: {other}, affine {_rows(other.affine)}",
                "give the labels drawn on this image; regrid(mask, grid, other, linear=False) moves "
                "them where the affines are right",
            )
    kind = numpy.uint8 if values.max() < 256 else numpy.int32
    return numpy.ascontiguousarray(values, dtype=kind)


def save_mask(path: Any, mask: Any, volume: Volume) -> Path:
    """Write labels (D, H, W), on the volume's grid, as NIfTI on its original grid and affine.

    uint8, or int32 where labels are larger. Booleans and whole numbers only: `logits > 0` first.
    """
    labels = numpy.asarray(mask.detach().cpu() if hasattr(mask, "detach") else mask)
    if labels.dtype.kind not in "bui" or labels.ndim != 3:
        raise DataError(
            f"the mask is {labels.dtype} {labels.shape}, expected whole numbers (D, H, W)",
            "logits > 0 is one, probabilities.argmax(0) another",
        )
    if labels.min() < 0:
        raise DataError(f"the mask holds labels from {labels.min()} on, expected 0 and above")
    back = volume.back(labels)
    kind = numpy.uint8 if back.max() < 256 else numpy.int32
    image = _header(back.shape, kind, volume.original, path)
    nibabel().Nifti1Image(back.astype(kind).T, volume.original.affine, image).to_filename(str(path))
    return Path(path)


def create_mask(path: Any, volume: Volume) -> numpy.memmap:
    """A NIfTI file of zeros on the volume's original grid, and its voxels as uint8 (D, H, W).

    What is written into them goes to the file (call `flush` at the end), so that a mask larger than
    memory can be filled window by window.
    """
    if Path(path).suffix != ".nii":
        raise DataError(f"{path} cannot be filled in place, expected a name that ends in .nii")
    if volume.grid.difference(volume.original):
        raise DataError(
            f"{volume.name} is not on its original grid ({volume.grid})",
            "predict into memory and save_mask(path, mask, volume)",
        )
    header = _header(volume.size, numpy.uint8, volume.original, path)
    header["vox_offset"] = 352
    header["magic"] = b"n+1"
    with open(path, "wb") as file:
        header.write_to(file)
        file.write(bytes(352 - file.tell()))
    # x runs fastest in NIfTI, as it does in [z, y, x]
    return numpy.memmap(path, numpy.uint8, "r+", 352, volume.size)


def _header(size: tuple[int, ...], kind: Any, grid: Grid, path: Any) -> Any:
    if not str(path).endswith((".nii", ".nii.gz")):
        raise DataError(f"{path} is no NIfTI name", "end it in .nii or .nii.gz")
    header = nibabel().Nifti1Header()
    header.set_data_dtype(kind)
    header.set_data_shape(size[::-1])
    header.set_xyzt_units("mm")
    header.set_qform(grid.affine, 1)
    header.set_sform(grid.affine, 1)
    return header


def _one_time(image: Any, path: Any, t: int | None) -> numpy.ndarray:
    t = _check_times(image.shape, path, t)
    try:
        return numpy.asarray(image.dataobj if t is None else image.dataobj[..., t])
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(
            f"the voxels of {Path(path).name} cannot be read: {error}",
            "the file is cut off or damaged: copy it again",
        ) from error


def _check_times(shape: tuple[int, ...], path: Any, t: int | None) -> int | None:
    if len(shape) == 3 and t is None:
        return None
    if len(shape) == 4 and shape[3] == 1 and t is None:
        return 0
    if len(shape) == 4 and t is not None and 0 <= t < shape[3]:
        return t
    axes = ", ".join(["x", "y", "z", "time", "more"][: len(shape)])
    raise DataError(
        f"{Path(path).name} is {tuple(map(int, shape))}, ({axes}), expected one volume"
        + ("" if t is None else f"; t is {t}"),
        f"t=0 … t={shape[3] - 1} takes one time" if len(shape) == 4 else "take a 3-D image",
    )


def _open(path: Any) -> Any:
    library = nibabel()
    if not Path(path).is_file():
        raise DataError(f"there is no file {path}")
    name = Path(path).name
    try:
        image = library.load(str(path))
    except ImportError as error:
        raise MissingDependencyError(f"{name} needs another library: {error}") from error
    except library.filebasedimages.ImageFileError as error:
        raise DataError(
            f"{name} is no image that nibabel reads: {error}",
            "a DICOM series is read by read_dicom(folder)",
        ) from error
    if not isinstance(image, (library.Nifti1Pair, library.MGHImage)):
        raise DataError(
            f"{name} is a {type(image).__name__}, expected NIfTI or MGH",
            "other formats say less of their axes: convert it to NIfTI where they are known",
        )
    kind = image.get_data_dtype()
    if kind.kind not in "buif" or len(image.shape) < 3:
        raise DataError(
            f"{name} holds {kind} {image.shape}, expected one number for each voxel (x, y, z)",
            "of colours take one channel, of complex numbers their size",
        )
    unit = image.header.get_xyzt_units()[0] if hasattr(image.header, "get_xyzt_units") else "mm"
    if unit not in ("mm", "unknown"):
        raise DataError(
            f"{name} is measured in {unit}, expected mm", "scale its affine and its header to mm"
        )
    return image


def _rows(affine: numpy.ndarray) -> str:
    return str(numpy.round(affine[:3], 4).tolist())


def nibabel() -> Any:
    """The library, or the line that installs it."""
    try:
        import nibabel
    except ImportError as error:
        raise MissingDependencyError(
            f"volumes in NIfTI files need nibabel, which cannot be imported: {error}",
            "pip install 'mmadapt[medical]'",
        ) from error
    return nibabel
