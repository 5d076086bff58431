"""NIfTI files and DICOM series: what is read, what is refused and why, what is written back."""

from __future__ import annotations

import gzip
import sys
from pathlib import Path
from typing import Any

import nibabel
import numpy
import pydicom
import pytest
from volumes import ball, dicom, nifti, series

import mmadapt as mm
from mmadapt.tasks import volume as volumes

Refused = mm.errors.DataError
Missing = mm.errors.MissingDependencyError


def refused(call: Any, *arguments: Any, **options: Any) -> str:
    """What a refusal says, hint and all."""
    with pytest.raises(Refused) as caught:
        call(*arguments, **options)
    return str(caught.value)


def written(path: Path, values: numpy.ndarray, affine: Any = None) -> Path:
    """A NIfTI file of values (D, H, W)."""
    affine = numpy.eye(4) if affine is None else affine
    nibabel.Nifti1Image(values.T, affine).to_filename(str(path))
    return path


# -- NIfTI read ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "t"),
    [
        ("anatomical.nii", None),  # big-endian
        ("reoriented_anat_moved.nii", None),
        ("standard.nii.gz", None),
        ("example4d.nii.gz", 0),
        ("example4d.nii.gz", 1),
        ("example_nifti2.nii.gz", 1),
        ("functional.nii", 19),  # scaled
    ],
)
def test_values_and_affine_are_nibabels(name: str, t: int | None) -> None:
    volume = volumes.read_nifti(nifti(name), t)
    image = nibabel.load(str(nifti(name)))
    expected = image.get_fdata(dtype=numpy.float32)
    expected = expected if t is None else expected[..., t]
    assert numpy.array_equal(volume.array[0].T, expected)
    assert volume.array.dtype == numpy.dtype("=f4")
    assert numpy.array_equal(volume.affine, image.affine)
    assert volume.spacing == pytest.approx(image.header.get_zooms()[2::-1], abs=1e-4)
    assert volume.orientation == "".join(nibabel.aff2axcodes(image.affine))


def test_a_series_over_time_is_never_made_of_channels() -> None:
    for name, times in (("functional.nii", 20), ("example4d.nii.gz", 2), ("test.mgz", 2)):
        text = refused(volumes.read_nifti, nifti(name))
        assert "(x, y, z, time), expected one volume" in text
        assert f"t=0 … t={times - 1} takes one time" in text
    assert "t is 20" in refused(volumes.read_nifti, nifti("functional.nii"), t=20)
    assert "t is 0" in refused(volumes.read_nifti, nifti("anatomical.nii"), t=0)


def test_voxels_that_are_no_numbers_are_counted() -> None:
    path = nifti("resampled_anat_moved.nii")
    text = refused(volumes.read_nifti, path)
    assert "153 of 1071 values are not numbers, the first at (0, 0, 0, 0)" in text
    assert "nan=0.0" in text
    volume = volumes.read_nifti(path, nan=-1.0)
    image = nibabel.load(str(path)).get_fdata()
    assert int((volume.array == -1).sum()) == int(numpy.isnan(image).sum()) == 153


def test_an_infinite_value_is_not_taken_for_nan(tmp_path: Path) -> None:
    values = numpy.zeros((2, 3, 4), numpy.float32)
    values[1, 2, 3] = numpy.inf
    path = written(tmp_path / "a.nii", values)
    assert "1 of 24 values are not finite" in refused(volumes.read_nifti, path, nan=0.0)


def test_a_sheared_affine_is_refused() -> None:
    assert "the affine is sheared" in refused(volumes.read_nifti, nifti("test.mgz"), t=0)


def test_a_header_without_spacing_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "flat.nii"
    header = nibabel.Nifti1Header()
    header.set_data_shape((4, 3, 2))
    header["srow_x"][0] = header["srow_y"][1] = 1  # and none along z
    header["sform_code"] = 1
    header["vox_offset"], header["magic"] = 352, b"n+1"
    with open(path, "wb") as file:
        header.write_to(file)
        file.write(bytes(4 + 24 * 4))
    assert "singular: spacing (x, y, z) of 1, 1, 0 mm" in refused(volumes.read_nifti, path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    text = refused(volumes.read_nifti, dicom("CT_small.dcm"))
    assert "is no image that nibabel reads" in text and "read_dicom" in text
    assert "there is no file" in refused(volumes.read_nifti, tmp_path / "none.nii")
    assert "expected NIfTI or MGH" in refused(volumes.read_nifti, nifti("tiny.mnc"))
    assert "expected one number for each voxel" in refused(
        volumes.read_nifti, written(tmp_path / "2d.nii", numpy.zeros((3, 4), numpy.float32))
    )
    colours = numpy.zeros((2, 3, 4), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    text = refused(volumes.read_nifti, written(tmp_path / "rgb.nii", colours))
    assert "of colours take one channel" in text
    waves = written(tmp_path / "waves.nii", numpy.zeros((2, 3, 4), numpy.complex64))
    assert "complex64" in refused(volumes.read_nifti, waves)


def test_a_file_that_was_cut_off_is_refused(tmp_path: Path) -> None:
    whole = nifti("anatomical.nii").read_bytes()
    (tmp_path / "short.nii").write_bytes(whole[:9000])
    (tmp_path / "short.nii.gz").write_bytes(gzip.compress(whole)[:9000])
    for name in ("short.nii", "short.nii.gz"):
        assert "cut off or damaged" in refused(volumes.read_nifti, tmp_path / name)


def test_other_units_are_refused(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(numpy.zeros((4, 3, 2), numpy.float32), numpy.eye(4))
    image.header.set_xyzt_units("micron")
    image.to_filename(str(tmp_path / "fine.nii"))
    assert "measured in micron, expected mm" in refused(volumes.read_nifti, tmp_path / "fine.nii")


# -- masks -----------------------------------------------------------------------------------------


def test_in_and_out_again_on_the_original_grid(tmp_path: Path) -> None:
    """NIfTI in → oriented, resampled → a mask → saved on the original grid and affine."""
    for name, t in (("anatomical.nii", None), ("example4d.nii.gz", 0), ("standard.nii.gz", None)):
        volume = volumes.read_nifti(nifti(name), t)
        work = volume.oriented("RAS").resample(1.0)
        mask = ball(work.size, [n / 2 for n in work.size], [n / 3 for n in work.size])
        path = volumes.save_mask(tmp_path / "mask.nii.gz", mask, work)
        saved, original = nibabel.load(str(path)), nibabel.load(str(nifti(name)))
        assert saved.shape == original.shape[:3]
        assert saved.get_data_dtype() == numpy.uint8
        assert numpy.allclose(saved.affine, original.affine, atol=1e-4)
        assert numpy.allclose(saved.get_qform(), saved.get_sform(), atol=1e-4)
        assert saved.header.get_xyzt_units()[0] == "mm"
        again = volumes.read_mask(path, like=volume)
        # the same millimetres, whatever the grid: a ball's volume and its middle
        inside = [numpy.argwhere(again), numpy.argwhere(mask)]
        sizes = [
            len(i) * numpy.prod(v.spacing) for i, v in zip(inside, (volume, work), strict=True)
        ]
        assert sizes[0] == pytest.approx(sizes[1], rel=0.1 if volume.array.size > 1000 else 0.5)
        middles = [v.grid.to_mm(i).mean(0) for i, v in zip(inside, (volume, work), strict=True)]
        # middles of old voxels lie between two new ones, of which the later is taken
        assert numpy.abs(middles[0] - middles[1]).max() <= max(volume.spacing) / 4 + 1e-6
        if name == "anatomical.nii":  # at a half of the spacing nothing is lost
            assert numpy.array_equal(again, work.back(work.forth(again)))


def test_a_mask_on_another_grid_is_refused(tmp_path: Path) -> None:
    volume = volumes.read_nifti(nifti("anatomical.nii"))
    text = refused(volumes.read_mask, nifti("functional.nii"), like=volume, t=0)
    assert "(3, 21, 17) and (25, 41, 33) voxels" in text or "that are no labels" in text
    mask = numpy.zeros(volume.size, numpy.uint8)
    for shift, fine in ((0.0009, True), (0.01, False)):
        affine = volume.affine.copy()
        affine[1, 3] += shift
        path = written(tmp_path / "mask.nii", mask, affine)
        if fine:
            assert volumes.read_mask(path, volume).shape == volume.size
            continue
        text = refused(volumes.read_mask, path, like=volume)
        assert "mask.nii does not lie on anatomical.nii: corners up to 0.01 mm apart" in text
        assert "-39.99" in text and "-40.0" in text  # both affines
    shape = written(tmp_path / "other.nii", mask[1:], volume.affine)
    assert "(24, 41, 33) and (25, 41, 33) voxels" in refused(volumes.read_mask, shape, volume)


def test_fractions_are_no_labels(tmp_path: Path) -> None:
    """Labels resampled between voxels, which nothing else would notice."""
    mask = ball((9, 9, 9), (4, 4, 4), (3, 3, 3)) * numpy.float32(2)
    from scipy.ndimage import zoom

    path = written(tmp_path / "mask.nii", zoom(mask, 1.5, order=1))
    text = refused(volumes.read_mask, path)
    assert "values that are no labels: 0." in text and "the nearest value" in text
    fine = volumes.read_mask(written(tmp_path / "mask.nii", mask))
    assert fine.dtype == numpy.uint8 and set(numpy.unique(fine)) == {0, 2}
    minus = written(tmp_path / "minus.nii", mask.astype(numpy.int16) - 1)
    assert "labels from -1 to 1" in refused(volumes.read_mask, minus)


def test_large_labels_keep_their_number(tmp_path: Path) -> None:
    volume = volumes.read_nifti(nifti("standard.nii.gz"))
    labels = numpy.zeros(volume.size, numpy.int64)
    labels[2, 3, 1] = 1035
    path = volumes.save_mask(tmp_path / "labels.nii", labels, volume)
    assert nibabel.load(str(path)).get_data_dtype() == numpy.int32
    assert numpy.array_equal(volumes.read_mask(path, volume), labels)


def test_what_is_no_mask_is_not_saved(tmp_path: Path) -> None:
    volume = volumes.read_nifti(nifti("standard.nii.gz"))
    chances = numpy.full(volume.size, 0.5)
    assert "logits > 0" in refused(volumes.save_mask, tmp_path / "a.nii", chances, volume)
    minus = numpy.full(volume.size, -1)
    assert "labels from -1" in refused(volumes.save_mask, tmp_path / "a.nii", minus, volume)
    mask = numpy.zeros(volume.size, bool)
    assert "is no NIfTI name" in refused(volumes.save_mask, tmp_path / "a.png", mask, volume)
    assert "this volume has" in refused(volumes.save_mask, tmp_path / "a.nii", mask[1:], volume)


# -- files that stay on the disk -------------------------------------------------------------------


def test_a_volume_in_its_file_reads_what_is_sliced(tmp_path: Path) -> None:
    whole = volumes.read_nifti(nifti("anatomical.nii"))
    stored = volumes.open_nifti(nifti("anatomical.nii"))
    assert stored.size == whole.size and stored.spacing == whole.spacing
    assert numpy.array_equal(stored.array[:, 2:9, 3:5, ::2], whole.array[:, 2:9, 3:5, ::2])
    assert numpy.array_equal(stored.array[0, 7], whole.array[0, 7])
    part = stored.crop((1, 2, 3, 9, 8, 7))
    assert numpy.array_equal(part.array, whole.crop((1, 2, 3, 9, 8, 7)).array)
    windowed = stored.window(0, 20000)
    assert numpy.abs(windowed.array[:, 3] - whole.window(0, 20000).array[:, 3]).max() < 1e-6
    assert "made of percentiles" in refused(stored.window, "mr")
    assert "windowed already" in refused(windowed.window, 0, 1)
    assert "stays in its file" in refused(stored.resample, 1.0)
    assert "in its file" in repr(stored)


def test_a_stored_volume_is_checked_as_it_is_read() -> None:
    stored = volumes.open_nifti(nifti("resampled_anat_moved.nii"))
    assert "are not numbers" in refused(stored.array.__getitem__, (0, 0))


def test_what_cannot_be_read_in_parts_is_refused() -> None:
    assert "gunzip" in refused(volumes.open_nifti, nifti("standard.nii.gz"))
    assert "expected one volume" in refused(volumes.open_nifti, nifti("functional.nii"))


def test_a_mask_is_filled_within_its_file(tmp_path: Path) -> None:
    volume = volumes.read_nifti(nifti("anatomical.nii"))
    voxels = volumes.create_mask(tmp_path / "mask.nii", volume)
    assert voxels.shape == volume.size and not voxels.any()
    mask = ball(volume.size, (8, 12, 20), (3, 4, 5))
    voxels[:] = mask
    voxels.flush()
    assert numpy.array_equal(volumes.read_mask(tmp_path / "mask.nii", volume), mask)
    assert "ends in .nii" in refused(volumes.create_mask, tmp_path / "mask.nii.gz", volume)
    changed = volume.resample(1.0)
    assert "not on its original grid" in refused(volumes.create_mask, tmp_path / "a.nii", changed)


# -- DICOM -----------------------------------------------------------------------------------------


def test_a_series_is_stacked_along_its_normal(tmp_path: Path) -> None:
    volume = volumes.read_dicom(series(tmp_path / "ct"))
    z, y, x = numpy.indices((6, 12, 10))
    assert numpy.array_equal(volume.array[0], 100 * z + y - x)  # slope 1, intercept −1024
    assert volume.spacing == pytest.approx((2.5, 0.5, 0.8))
    assert volume.orientation == "LPS"
    assert numpy.allclose(
        volume.grid.to_mm((2, 3, 4)), [(-10 - 4 * 0.8, 20 - 3 * 0.5, 5 + 2 * 2.5)]
    )
    assert repr(volume).startswith("Volume(ct (6 slices): 1×6×12×10 voxels")


@pytest.mark.parametrize(
    "orientation",
    [
        (1, 0, 0, 0, 1, 0),
        (-1, 0, 0, 0, 1, 0),
        (0, 1, 0, 0, 0, -1),
        (1, 0, 0, 0, 0, -1),
        (0.8, 0.6, 0, 0, 0, -1),
        (1, 0, 0, 0, 0.9272, -0.3746),
    ],
)
def test_the_affine_is_nibabels(tmp_path: Path, orientation: tuple[float, ...]) -> None:
    """Of each slice, by nibabel's own reading of its header."""
    from nibabel.nicom.dicomwrappers import wrapper_from_file

    rows, columns = numpy.array(orientation).reshape(2, 3)
    step = tuple(2.5 * numpy.cross(rows, columns))
    folder = series(tmp_path / "ct", step=step, orientation=orientation)
    volume = volumes.read_dicom(folder)
    for file in sorted(folder.iterdir()):
        wrapper = wrapper_from_file(str(file))
        z = wrapper.dcm_data.InstanceNumber - 1
        # theirs takes (row, column, slice) to LPS
        for y, x in ((0, 0), (11, 0), (0, 9), (5, 7)):
            lps = nibabel.affines.apply_affine(wrapper.affine, (y, x, 0))
            assert numpy.allclose(volume.grid.to_mm((z, y, x))[0], lps * (-1, -1, 1), atol=2e-3)
        assert numpy.array_equal(volume.array[0, z] + 1024, wrapper.dcm_data.pixel_array)


def test_a_series_goes_the_same_way_by_nifti(tmp_path: Path) -> None:
    volume = volumes.read_dicom(series(tmp_path / "ct"))
    path = written(tmp_path / "ct.nii", volume.array[0], volume.affine)
    again = volumes.read_nifti(path)
    assert numpy.array_equal(again.array, volume.array)
    assert again.grid.difference(volume.grid) == ""
    mask = ball(volume.size, (3, 6, 5), (2, 4, 3))
    saved = volumes.save_mask(tmp_path / "mask.nii", mask, volume)
    assert numpy.array_equal(volumes.read_mask(saved, volume), mask)


def test_values_are_hounsfield_units() -> None:
    volume = volumes.read_dicom(dicom("CT_small.dcm"))
    assert (volume.array.min(), volume.array.max()) == (-896, 1167)
    raw = pydicom.dcmread(dicom("CT_small.dcm")).pixel_array
    assert numpy.array_equal(volume.array[0, 0], raw.astype(int) - 1024)
    assert volume.spacing == pytest.approx((5, 0.661468, 0.661468))


def test_byte_orders_and_compressions_give_the_same_values() -> None:
    plain = volumes.read_dicom(dicom("MR_small.dcm"))
    for name in ("MR_small_bigendian.dcm", "MR_small_implicit.dcm", "MR_small_RLE.dcm"):
        other = volumes.read_dicom(dicom(name))
        assert numpy.array_equal(other.array, plain.array)
        assert other.grid.difference(plain.grid) == ""


def test_an_oblique_slice_keeps_its_angle() -> None:
    volume = volumes.read_dicom(dicom("J2K_pixelrep_mismatch.dcm"))
    assert (volume.array.min(), volume.array.max()) == (-2000, 1896)
    normal = volume.affine[:3, 2] / numpy.linalg.norm(volume.affine[:3, 2])
    assert numpy.allclose(normal, (0, -0.3746, 0.9272), atol=1e-4)


def test_a_real_series_of_five_slices() -> None:
    volume = volumes.read_dicom(dicom("dicomdirtests/98892001/CT5N"))
    assert volume.size == (5, 16, 16)
    assert volume.spacing == pytest.approx((2.5, 0.488281, 0.488281), abs=1e-4)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("dicomdirtests/77654033/CT2", ["gaps of 202.5, 1.25, 1.25 mm", "from 17106 to 17136"]),
        ("dicomdirtests/98892003/MR700", ["turned against each other", "32.7°"]),
        ("dicomdirtests/98892001/CT2N", ["turned against each other", "90.0°"]),
        (
            "dicomdirtests/98892003/MR2",
            ["3 series are mixed", "3 files, MR T/S/C RF FAST", "series="],
        ),
        ("examples_rgb_color.dcm", ["(US) is coloured: 3 channels, RGB", "channel=0 … channel=2"]),
        ("SC_ybr_full_422_uncompressed.dcm", ["is coloured: 3 channels, YBR_FULL_422"]),
        ("SC_rgb_small_odd.dcm", ["is coloured"]),
        ("SC_rgb_rle_2frame.dcm", ["is coloured"]),
        ("examples_palette.dcm", ["indices into a palette"]),
        ("rtdose.dcm", ["(RTDOSE) holds 15 frames, expected one image", "frame=0 … frame=14"]),
        ("liver_1frame.dcm", ["(SEG) does not say where it lies", "dcm2niix"]),
        ("JPGExtended.dcm", ["(NM) does not say where it lies: no ImagePositionPatient"]),
        ("rtplan.dcm", ["(RTPLAN) holds no pixels"]),
        ("no_meta.dcm", ["no DICOM header was found", "force=True"]),
        ("MR_truncated.dcm", ["are damaged", "8130 vs 8192 bytes"]),
    ],
)
def test_real_files_that_are_no_volume_are_refused(name: str, words: list[str]) -> None:
    text = refused(volumes.read_dicom, dicom(name))
    for word in words:
        assert word in text, text


def test_one_frame_one_channel_and_a_spacing_can_be_chosen() -> None:
    path = dicom("examples_rgb_color.dcm")
    assert "no ImagePositionPatient" in refused(volumes.read_dicom, path, channel=1)
    green = volumes.read_dicom(path, channel=1, spacing=(1, 0.3, 0.2))
    assert numpy.array_equal(green.array[0, 0], pydicom.dcmread(path).pixel_array[..., 1])
    assert green.spacing == pytest.approx((1, 0.3, 0.2))
    assert "channel is 3" in refused(volumes.read_dicom, path, channel=3)
    assert "is not coloured" in refused(volumes.read_dicom, dicom("CT_small.dcm"), channel=0)
    dose = pydicom.dcmread(dicom("rtdose.dcm"))
    third = volumes.read_dicom(dicom("rtdose.dcm"), frame=3, spacing=(10, 10, 10))
    assert numpy.allclose(third.array[0, 0], dose.pixel_array[3])
    assert "frame is 15" in refused(volumes.read_dicom, dicom("rtdose.dcm"), frame=15)


def test_a_compression_nothing_decodes_names_the_package() -> None:
    with pytest.raises(Missing, match=r"JPGExtended\.dcm is compressed \(JPEG Extended") as caught:
        volumes.read_dicom(dicom("JPGExtended.dcm"), spacing=(1, 1, 1))
    assert caught.value.hint == "pip install 'pylibjpeg[libjpeg]'"


def test_one_of_several_series_can_be_chosen() -> None:
    folder = dicom("dicomdirtests/98892003/MR2")
    single = next(
        str(header.SeriesInstanceUID)
        for header in map(pydicom.dcmread, sorted(folder.iterdir()))
        if header.SeriesDescription == "FAST LOCALIZER"
    )
    assert volumes.read_dicom(folder, series=single).size[0] == 1
    assert "no series '1.2' among:" in refused(volumes.read_dicom, folder, series="1.2")


def drop(folder: Path, *numbers: int) -> Path:
    for number in numbers:
        (folder / f"{number:03d}.dcm").unlink()
    return folder


def test_a_missing_slice_is_noticed(tmp_path: Path) -> None:
    text = refused(volumes.read_dicom, drop(series(tmp_path / "ct"), 3))
    assert "5 slices are not evenly spaced: gaps of 2.5, 2.5, 5, 2.5 mm" in text
    assert "slices are missing" in text


def test_positions_may_be_rounded_but_do_not_drift(tmp_path: Path) -> None:
    def at(z: int) -> list[float]:
        return [0.0, 0.0, round(1.25 * z, 1)]

    volume = volumes.read_dicom(series(tmp_path / "ct", 9, ImagePositionPatient=at))
    assert volume.spacing[0] == pytest.approx(1.25)

    def drifting(z: int) -> list[float]:
        return [0.0, 0.0, 5.0 * z + 0.09 * max(0, z - 75)]

    text = refused(
        volumes.read_dicom, series(tmp_path / "drift", 150, ImagePositionPatient=drifting)
    )
    assert "150 slices are not evenly spaced" in text


def test_a_position_given_twice_is_noticed(tmp_path: Path) -> None:
    folder = series(tmp_path / "ct")
    (folder / "copy.dcm").write_bytes((folder / "004.dcm").read_bytes())
    text = refused(volumes.read_dicom, folder)
    assert "1 positions are given twice, the first at 10.00 mm: 004.dcm and copy.dcm" in text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"SeriesInstanceUID": lambda z: f"1.2.{z // 3}"},
            ["2 series are mixed", "1.2.0: 3 files"],
        ),
        (
            {"ImageOrientationPatient": lambda z: [0.995, 0.0999 * (z == 2), 0, 0, 1, 0]},
            ["no right-angled orientation"],
        ),
        (
            {"ImageOrientationPatient": lambda z: [1, 0, 0, 0, 1, 0] if z else [0, 1, 0, -1, 0, 0]},
            ["turned against each other"],
        ),
        (
            {"PixelSpacing": lambda z: [0.5, 0.8 + 0.1 * (z == 4)]},
            ["slices differ in PixelSpacing"],
        ),
        (
            {"ImagePositionPatient": lambda z: [0, z * 0.5, z * 2.5]},
            ["tilted", "0.5 mm aside", "11.3°"],
        ),
        ({"ImagePositionPatient": None}, ["does not say where it lies"]),
        ({"PixelData": None}, ["holds no pixels"]),
        ({"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB"}, ["is coloured"]),
    ],
)
def test_a_series_that_is_none_is_refused(tmp_path: Path, changes: Any, words: list[str]) -> None:
    text = refused(volumes.read_dicom, series(tmp_path / "ct", **changes))
    for word in words:
        assert word in text, text


def test_slices_of_another_size_are_refused(tmp_path: Path) -> None:
    folder = series(tmp_path / "ct")
    other = pydicom.dcmread(folder / "002.dcm")
    other.Rows, other.Columns = 10, 12
    other.save_as(folder / "002.dcm")
    assert "slices differ in Rows" in refused(volumes.read_dicom, folder)


def test_one_slice_without_thickness_is_refused(tmp_path: Path) -> None:
    folder = series(tmp_path / "ct", 1, SliceThickness=None, SpacingBetweenSlices=None)
    text = refused(volumes.read_dicom, folder)
    assert "does not say how thick it is" in text and "spacing=(z, y, x)" in text
    volume = volumes.read_dicom(folder, spacing=(3, 0.5, 0.8))
    assert volume.spacing == pytest.approx((3, 0.5, 0.8))
    assert numpy.allclose(volume.grid.to_mm((0, 0, 0)), [(-10, 20, 5)])  # its own place


def test_other_files_in_the_folder_are_named(tmp_path: Path) -> None:
    folder = series(tmp_path / "ct")
    (folder / "notes.txt").write_text("seen")
    assert "1 of 7 files are no DICOM: notes.txt" in refused(volumes.read_dicom, folder)
    (folder / "notes.txt").unlink()
    (folder / "DICOMDIR").write_bytes(b"")  # an index belongs there
    assert volumes.read_dicom(folder).size == (6, 12, 10)
    files = sorted(folder.glob("00[1-3].dcm"))
    assert volumes.read_dicom(files).size == (3, 12, 10)
    (tmp_path / "empty").mkdir()
    assert "holds no files" in refused(volumes.read_dicom, tmp_path / "empty")


# -- without the libraries -------------------------------------------------------------------------


def test_the_line_that_installs_the_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, call, path in (
        ("nibabel", volumes.read_nifti, nifti("anatomical.nii")),
        ("pydicom", volumes.read_dicom, dicom("CT_small.dcm")),
    ):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(Missing) as caught:
            call(path)
        assert caught.value.hint == "pip install 'mmadapt[medical]'"
