"""One DICOM file's pixels as numbers, and why others have none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy

from mmadapt.errors import DataError, MissingDependencyError

#: which package decodes what, by the end of the transfer syntax's UID
DECODERS = {
    "4.50": "pylibjpeg[libjpeg]",
    "4.51": "pylibjpeg[libjpeg]",
    "4.57": "pylibjpeg[libjpeg]",
    "4.70": "pylibjpeg[libjpeg]",
    "4.80": "pyjpegls",
    "4.81": "pyjpegls",
    "4.90": "pylibjpeg[openjpeg]",
    "4.91": "pylibjpeg[openjpeg]",
}


def pixels_of(file: Path, frame: int | None = None, channel: int | None = None) -> numpy.ndarray:
    """The values (H, W) of one file after slope and intercept, float32.

    Raises `DataError` where pixels are damaged, and `MissingDependencyError` where nothing installed
    decodes them.
    """
    header = pydicom().dcmread(file)
    values = _decode(file, header)
    if int(header.get("NumberOfFrames") or 1) > 1:
        values = values[frame]
    if channel is not None:
        values = values[..., channel]
    from pydicom.pixels.processing import apply_rescale

    return numpy.asarray(apply_rescale(values, header), dtype=numpy.float32)


def check_content(file: Path, header: Any, frame: int | None, channel: int | None) -> None:
    """A `DataError` for a file without one grey image in it, by its header alone."""
    what = f"{file.name} ({header.get('Modality', '?')})"
    if header.get("Rows") is None or header.get("Columns") is None:
        raise DataError(
            f"{what} holds no pixels",
            "reports and plans lie beside images: give the list of image files",
        )
    _check_colours(what, header, channel)
    count = int(header.get("NumberOfFrames") or 1)
    if (count > 1 and frame is None) or (frame is not None and not 0 <= frame < count):
        raise DataError(
            f"{what} holds {count} frames, expected one image; frame is {frame}",
            f"frame=0 … frame={count - 1} takes one; all of them are no volume unless their places "
            "are known (dcm2niix converts such files)",
        )


def _check_colours(what: str, header: Any, channel: int | None) -> None:
    kind = str(header.get("PhotometricInterpretation", ""))
    colours = int(header.get("SamplesPerPixel") or 1)
    if kind == "PALETTE COLOR":
        raise DataError(
            f"{what} holds indices into a palette of colours, which are no intensities",
            "pydicom.pixels.apply_color_lut makes a picture of it, for segment.Segmenter",
        )
    if colours > 1 and (channel is None or not 0 <= channel < colours):
        raise DataError(
            f"{what} is coloured: {colours} channels, {kind}; channel is {channel}",
            f"channel=0 … channel={colours - 1} takes one; a colour picture goes to segment.Segmenter",
        )
    if colours == 1 and channel is not None:
        raise DataError(f"{what} is not coloured, so that channel={channel} takes nothing")


def _decode(file: Path, header: Any) -> numpy.ndarray:
    if not any(name in header for name in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        raise DataError(
            f"{file.name} holds no pixels", "its header alone was stored: copy it again"
        )
    syntax = header.file_meta.get("TransferSyntaxUID")
    try:
        return header.pixel_array
    except (NotImplementedError, RuntimeError) as error:
        package = DECODERS.get(str(syntax).removeprefix("1.2.840.10008.1.2."))
        if package is None:
            raise DataError(f"{file.name} cannot be decoded: {error}") from error
        raise MissingDependencyError(
            f"{file.name} is compressed ({syntax.name}) and nothing installed decodes it: {error}",
            f"pip install '{package}'",
        ) from error
    except (AttributeError, ValueError) as error:
        raise DataError(
            f"the pixels of {file.name} are damaged: {error}",
            "copy the file again; leaving it out would make a gap in its series",
        ) from error


def pydicom() -> Any:
    """The library, or the line that installs it."""
    try:
        import pydicom
        import pydicom.errors
    except ImportError as error:
        raise MissingDependencyError(
            f"DICOM files need pydicom, which cannot be imported: {error}",
            "pip install 'mmadapt[medical]'",
        ) from error
    return pydicom
