"""DICOM series: headers read and checked first, then slices stacked along their normal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy

from mmadapt.errors import DataError
from mmadapt.tasks.volume.pixels import check_content, pixels_of, pydicom
from mmadapt.tasks.volume.volume import Volume


@dataclass(frozen=True, eq=False)
class Slice:
    """One file's header and place: position and the directions of its rows and columns, in LPS mm."""

    file: Path
    header: Any
    position: numpy.ndarray
    along_row: numpy.ndarray
    along_column: numpy.ndarray

    @property
    def normal(self) -> numpy.ndarray:
        """The direction through the slices."""
        return numpy.cross(self.along_row, self.along_column)

    @property
    def height(self) -> float:
        """Millimetres along the normal."""
        return float(self.normal @ self.position)


def read_dicom(
    source: Any,
    series: str | None = None,
    frame: int | None = None,
    channel: int | None = None,
    spacing: Sequence[float] | None = None,
) -> Volume:
    """A series as a `Volume` (1, D, H, W): a folder, a list of files, or one file.

    Values are the scanner's own after slope and intercept (Hounsfield units for CT). Slices are put
    in the order of their positions; z leads along the normal of the images, and the affine to RAS+.
    Refused with what was found: several series (choose by `series`, the UID), slices of different
    size, spacing or orientation, positions given twice, gaps, tilted stacks, several frames
    (choose by `frame`), colours (choose by `channel`), no place in the body (give `spacing`, (z, y,
    x) in millimetres, for one image), broken or undecodable pixels.
    """
    slices = _one_series(_headers(_files(source)), series)
    for file, header in slices:
        check_content(file, header, frame, channel)
    if spacing is not None and len(slices) == 1:
        placed = [_with_spacing(*slices[0], frame, spacing)]
    else:
        placed = [_place(file, header) for file, header in slices]
    _check_alike(placed)
    placed.sort(key=lambda one: one.height)
    step = _step(placed)
    first = placed[0]
    affine = numpy.eye(4)
    between = [float(v) for v in first.header.PixelSpacing]  # of rows, then of columns
    affine[:3, 0] = first.along_row * between[1]
    affine[:3, 1] = first.along_column * between[0]
    affine[:3, 2] = step
    affine[:3, 3] = first.position
    affine[:2] *= -1  # left and posterior to right and anterior
    values = [pixels_of(one.file, frame, channel) for one in placed]
    return Volume(numpy.stack(values)[None], affine, name=_name(first.file, len(placed)))


def _files(source: Any) -> list[Path]:
    if isinstance(source, (list, tuple)):
        files = [Path(file) for file in source]
    elif Path(source).is_dir():
        files = sorted(file for file in Path(source).rglob("*") if file.is_file())
        files = [file for file in files if file.name != "DICOMDIR" and file.name[0] != "."]
    else:
        files = [Path(source)]
    missing = [str(file) for file in files if not file.is_file()]
    if missing or not files:
        raise DataError(f"there is no file {missing[0]}" if missing else f"{source} holds no files")
    return files


def _headers(files: list[Path]) -> list[tuple[Path, Any]]:
    library = pydicom()
    found, others = [], []
    for file in files:
        try:
            found.append((file, library.dcmread(file, stop_before_pixels=True)))
        except library.errors.InvalidDicomError:
            others.append(file.name)
    if others and (not found or len(files) == len(others)):
        raise DataError(
            f"{', '.join(others[:4])}: no DICOM header was found (no 'DICM' after 128 bytes)",
            "a NIfTI file is read by read_nifti; repair a file without its header by "
            "pydicom.dcmread(file, force=True) and save it again",
        )
    if others:
        raise DataError(
            f"{len(others)} of {len(files)} files are no DICOM: {', '.join(others[:4])}",
            "give the list of files to read, or move the others elsewhere",
        )
    return found


def _one_series(headers: list[tuple[Path, Any]], series: str | None) -> list[tuple[Path, Any]]:
    groups: dict[str, list[tuple[Path, Any]]] = {}
    for file, header in headers:
        groups.setdefault(str(header.get("SeriesInstanceUID", "no UID")), []).append((file, header))
    if series is None and len(groups) == 1:
        return headers
    if series in groups:
        return groups[series]
    listed = "".join(
        f"\n  {uid}: {len(own)} files, {own[0][1].get('Modality', '?')} "
        f"{own[0][1].get('SeriesDescription', '')}".rstrip()
        for uid, own in groups.items()
    )
    raise DataError(
        (f"{len(groups)} series are mixed:" if series is None else f"no series {series!r} among:")
        + listed,
        f'series="{next(iter(groups))}" takes one',
    )


def _place(file: Path, header: Any) -> Slice:
    wanted = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "Rows", "Columns")
    missing = [name for name in wanted if header.get(name) is None]
    if missing:
        many = "PerFrameFunctionalGroupsSequence" in header or header.get("NumberOfFrames")
        raise DataError(
            f"{file.name} ({header.get('Modality', '?')}) does not say where it lies: no "
            + ", ".join(missing),
            "files with a place for each frame are split or converted first (dcm2niix)"
            if many
            else "spacing=(z, y, x) in millimetres, where distances are known; else it is a picture: "
            "segment.Segmenter",
        )
    six = numpy.array([float(v) for v in header.ImageOrientationPatient])
    rows, columns = six[:3], six[3:]
    lengths = numpy.linalg.norm(rows), numpy.linalg.norm(columns)
    if abs(lengths[0] - 1) > 1e-3 or abs(lengths[1] - 1) > 1e-3 or abs(rows @ columns) > 1e-3:
        raise DataError(f"{file.name} has no right-angled orientation: {six.tolist()}")
    position = numpy.array([float(v) for v in header.ImagePositionPatient])
    return Slice(file, header, position, rows / lengths[0], columns / lengths[1])


def _check_alike(slices: list[Slice]) -> None:
    first = slices[0]
    for one in slices[1:]:
        if float(one.normal @ first.normal) < 1 - 1e-4 or float(one.along_row @ first.along_row) < (
            1 - 1e-4
        ):
            angle = numpy.degrees(numpy.arccos(min(1.0, float(one.normal @ first.normal))))
            raise DataError(
                f"slices are turned against each other: {one.file.name} stands at {angle:.1f}° to "
                f"{first.file.name}",
                "such planes are no volume (projections, or planes of a localiser); give one of "
                "them, or those that are parallel",
            )
        for name in ("Rows", "Columns", "PixelSpacing", "SamplesPerPixel", "NumberOfFrames"):
            mine, other = (s.header.get(name) for s in (one, first))
            if mine != other:
                raise DataError(
                    f"slices differ in {name}: {mine} in {one.file.name}, {other} in "
                    f"{first.file.name}",
                    "give the files of one acquisition",
                )


def _step(slices: list[Slice]) -> numpy.ndarray:
    """The way from one slice to the next, in LPS mm; slices are sorted."""
    first, last = slices[0], slices[-1]
    if len(slices) == 1:
        thick = first.header.get("SpacingBetweenSlices") or first.header.get("SliceThickness")
        if not thick or float(thick) <= 0:
            raise DataError(
                f"{first.file.name} alone does not say how thick it is: SliceThickness is {thick}",
                "spacing=(z, y, x) in millimetres",
            )
        return first.normal * float(thick)
    heights = numpy.array([one.height for one in slices])
    gaps = numpy.diff(heights)
    usual = float(numpy.median(gaps))
    twice = [i for i, gap in enumerate(gaps) if gap < 0.01]
    if twice:
        raise DataError(
            f"{len(twice)} positions are given twice, the first at {heights[twice[0]]:.2f} mm: "
            f"{slices[twice[0]].file.name} and {slices[twice[0] + 1].file.name}",
            "times, echoes or copies are mixed: give the list of files of one of them",
        )
    # scanners round positions, some of them to a tenth of a millimetre
    fine = max(0.02 * usual, min(0.11, 0.25 * usual))
    even = numpy.linspace(heights[0], heights[-1], len(heights))
    if numpy.abs(gaps - usual).max() > fine or numpy.abs(heights - even).max() > usual / 2:
        shown = ", ".join(f"{gap:.4g}" for gap in gaps[:12]) + (" …" if len(gaps) > 12 else "")
        at = int(numpy.abs(gaps - usual).argmax())
        raise DataError(
            f"{len(slices)} slices are not evenly spaced: gaps of {shown} mm; the oddest is "
            f"{gaps[at]:.4g} mm from {slices[at].file.name} to {slices[at + 1].file.name}",
            "slices are missing, or several stacks are mixed: give the list of files that belong "
            "together",
        )
    step = (last.position - first.position) / (len(slices) - 1)
    aside = float(numpy.linalg.norm(step - first.normal * (first.normal @ step)))
    if aside > 1e-2 * usual:
        angle = numpy.degrees(numpy.arctan2(aside, usual))
        raise DataError(
            f"the stack is tilted: slices move {aside:.3g} mm aside from one to the next ({angle:.1f}°)",
            "correct the gantry's tilt first (dcm2niix does), since a sheared grid has no right angles",
        )
    return step


def _with_spacing(file: Path, header: Any, frame: int | None, spacing: Sequence[float]) -> Slice:
    """One image with spacing from the caller; without a place, as if the patient lay on the back."""
    header.SliceThickness, *header.PixelSpacing = (float(length) for length in spacing)
    header.SpacingBetweenSlices = header.SliceThickness
    if header.get("ImagePositionPatient") is None or frame is not None:
        header.ImagePositionPatient = [0.0, 0.0, 0.0]
        header.ImageOrientationPatient = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]
    return _place(file, header)


def _name(file: Path, count: int) -> str:
    return file.name if count == 1 else f"{file.parent.name} ({count} slices)"
