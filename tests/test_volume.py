"""Volumes and their grids: where voxels lie, and the way back to the original."""

from __future__ import annotations

import itertools
import math
import re

import nibabel
import numpy
import pytest
from volumes import ball, dicom, nifti, series

import mmadapt as mm
from mmadapt.tasks import volume as volumes
from mmadapt.tasks.volume import Grid, Volume

Refused = mm.errors.DataError
ORIENTATIONS = [
    "".join(letters)
    for axes in itertools.permutations(("LR", "PA", "IS"))
    for letters in itertools.product(*axes)
]


def anatomical() -> Volume:
    return volumes.read_nifti(nifti("anatomical.nii"))


def small(size: tuple[int, int, int] = (4, 5, 6), spacing: tuple[float, ...] = (2, 3, 1)) -> Volume:
    values = numpy.random.RandomState(0).rand(*size)
    return Volume(values, numpy.diag([*spacing, 1.0]))


# -- the value -------------------------------------------------------------------------------------


def test_a_volume_is_native_float32_with_a_channel() -> None:
    values = numpy.arange(24, dtype=">i2").reshape(2, 3, 4)
    volume = Volume(values, numpy.eye(4))
    assert volume.array.shape == (1, 2, 3, 4)
    assert volume.array.dtype == numpy.dtype("=f4")
    assert numpy.array_equal(volume.array[0], values)
    assert volume.size == (2, 3, 4)


def test_spacing_is_in_the_order_of_the_array() -> None:
    volume = small(spacing=(1, 3, 2))  # of x, y and z
    assert volume.spacing == (2, 3, 1)
    assert volume.grid.diagonal == pytest.approx(math.hypot(4 * 2, 5 * 3, 6 * 1))


def test_it_says_what_it_is() -> None:
    volume = anatomical().window("mr").resample(4)
    assert repr(volume) == (
        "Volume(anatomical.nii: 1×12×20×16 voxels (z, y, x) of 4×4×4 mm, LAS, 0.0178503 to 0.984621, "
        "window mr, resample 4×4×4 mm)"
    )


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (numpy.zeros((3, 4)), r"\(3, 4\), expected \(C, D, H, W\)"),
        (numpy.zeros((2, 3, 4, 5, 6)), r"expected \(C, D, H, W\)"),
        (numpy.zeros((0, 3, 4)), r"expected \(C, D, H, W\)"),
        (numpy.zeros((2, 3, 4), complex), "type complex128, expected numbers"),
        (numpy.zeros((2, 3, 4), [("R", "u1"), ("G", "u1")]), "expected numbers"),
        (
            numpy.full((2, 3, 4), math.nan),
            r"24 of 24 values are not numbers, the first at \(0, 0, 0",
        ),
        (
            numpy.array([[[1, math.inf]]]),
            r"1 of 2 values are not finite, the first at \(0, 0, 0, 1\)",
        ),
    ],
)
def test_values_without_a_meaning_are_refused(array: numpy.ndarray, message: str) -> None:
    with pytest.raises(Refused, match=message):
        Volume(array, numpy.eye(4))


@pytest.mark.parametrize(
    ("affine", "message"),
    [
        (numpy.eye(3), r"\(3, 3\)"),
        (numpy.diag([1, 1, math.nan, 1]), "1 NaN"),
        (numpy.diag([1.0, 0.0, 2.0, 1.0]), r"singular: spacing \(x, y, z\) of 1, 0, 2 mm"),
        (numpy.diag([1.0, 1.0, 1.0, 2.0]), "singular"),
        ([[1, 0.2, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], r"sheared: .* at 78\.7°"),
    ],
)
def test_an_affine_without_right_angles_is_refused(affine: numpy.ndarray, message: str) -> None:
    with pytest.raises(Refused, match=message):
        Volume(numpy.zeros((2, 3, 4)), affine)


def test_a_negative_step_turns_an_axis() -> None:
    assert Volume(numpy.zeros((2, 3, 4)), numpy.diag([-1.0, 2, -3, 1])).orientation == "LAI"


# -- windows of intensity ----------------------------------------------------------------------


def test_a_named_window_brings_values_to_0_and_1() -> None:
    ct = volumes.read_dicom(dicom("CT_small.dcm"))
    kidney = ct.window("ct kidney")
    expected = (ct.array.astype(float).clip(-54, 247) + 54) / 301
    assert numpy.abs(kidney.array - expected).max() < 1e-6
    assert kidney.array.dtype == numpy.float32
    assert [step.name for step in kidney.history] == ["window ct kidney"]
    assert ct.window(-54, 247).array.tolist() == kidney.array.tolist()


def test_percentiles_are_of_what_is_not_air() -> None:
    values = numpy.zeros((4, 10, 10))
    values[2:] = numpy.linspace(100, 300, 200).reshape(2, 10, 10)
    low, high = numpy.percentile(values[2:], (0.5, 99.5))
    window = Volume(values, numpy.eye(4)).window("mr")
    assert window.array[0, 3, 5, 5] == pytest.approx(
        (values[3, 5, 5] - low) / (high - low), abs=1e-6
    )


@pytest.mark.parametrize(
    ("window", "message"),
    [
        (("mr",), "the window 'mr' has no range: values go from 7 to 7"),
        (("ct liver",), "no window is named 'ct liver'"),
        ((5, 5), "goes from 5 to 5, which is no range"),
        ((0, math.inf), "which is no range"),
    ],
)
def test_a_window_without_a_range_is_refused(window: tuple, message: str) -> None:
    with pytest.raises(Refused, match=message):
        Volume(numpy.full((2, 3, 4), 7), numpy.eye(4)).window(*window)


# -- grids -----------------------------------------------------------------------------------------


def test_every_orientation_is_read_turned_and_returned() -> None:
    """All 48: the same body, whatever the order of voxels in the file."""
    image = nibabel.load(str(nifti("anatomical.nii")))
    upright = anatomical().oriented("RAS")
    expected = nibabel.as_closest_canonical(image)
    assert numpy.array_equal(upright.array[0].T, expected.get_fdata())
    assert numpy.allclose(upright.affine, expected.affine)
    seen = set()
    for codes in ORIENTATIONS:
        turn = nibabel.orientations.ornt_transform(
            nibabel.io_orientation(image.affine), nibabel.orientations.axcodes2ornt(tuple(codes))
        )
        other = image.as_reoriented(turn)
        volume = Volume(numpy.asarray(other.dataobj).T, other.affine)
        assert volume.orientation == codes == "".join(nibabel.aff2axcodes(volume.affine))
        again = volume.oriented("RAS")
        assert numpy.array_equal(again.array, upright.array)
        assert numpy.allclose(again.affine, upright.affine)
        # a mask drawn on the upright volume, back on the file's own grid
        mask = ball(again.size, (8, 25, 20), (3, 5, 4))
        back = again.back(mask)
        assert back.shape == volume.size
        assert again.forth(back).tolist() == mask.tolist()
        theirs = nibabel.Nifti1Image(mask.T.astype("u1"), again.affine).as_reoriented(
            nibabel.orientations.ornt_transform(
                nibabel.orientations.axcodes2ornt("RAS"), nibabel.orientations.axcodes2ornt(codes)
            )
        )
        assert numpy.array_equal(back, numpy.asarray(theirs.dataobj).T)
        assert numpy.array_equal(anatomical().oriented(codes).array, volume.array)
        seen.add(volume.orientation)
    assert len(seen) == 48


@pytest.mark.parametrize("codes", ["RAR", "RA", "RASP", "XYZ", "RLS"])
def test_an_orientation_that_is_none_is_refused(codes: str) -> None:
    with pytest.raises(Refused, match="names no orientation"):
        anatomical().oriented(codes)


def test_voxels_and_millimetres() -> None:
    volume = volumes.read_nifti(nifti("example4d.nii.gz"), t=0)
    point = (3, 20, 50)
    expected = nibabel.affines.apply_affine(volume.affine, (50, 20, 3))
    assert numpy.allclose(volume.grid.to_mm(point), expected)
    assert numpy.allclose(volume.grid.to_voxel([expected]), point)


def test_resampling_keeps_the_extent_and_straight_lines() -> None:
    """A ramp in millimetres stays that ramp, at every spacing."""
    volume = small((20, 20, 20), (2, 3, 1))
    z, y, x = numpy.indices((20, 20, 20))
    at = volume.grid.to_mm(numpy.stack([z, y, x], -1).reshape(-1, 3))
    ramp = Volume((at @ (1.0, -2.0, 0.5)).reshape(20, 20, 20), volume.affine)
    for spacing in (0.7, 2.0, (1.5, 2.5, 3.1), ramp.spacing):
        other = ramp.resample(spacing)
        assert numpy.allclose(other.spacing, spacing)
        corner = ramp.grid.to_mm((-0.5, -0.5, -0.5))
        assert numpy.allclose(other.grid.to_mm((-0.5, -0.5, -0.5)), corner)
        ends = numpy.array(other.size) * other.spacing - numpy.array(ramp.size) * ramp.spacing
        assert (numpy.abs(ends) <= numpy.array(other.spacing) / 2 + 1e-9).all()
        inner = tuple(slice(n // 5, -(n // 5)) for n in other.size)
        places = numpy.stack(numpy.indices(other.size), -1)[inner]
        expected = (other.grid.to_mm(places) @ (1.0, -2.0, 0.5)).reshape(places.shape[:-1])
        assert numpy.abs(other.array[0][inner] - expected).max() < 1e-4


def test_resampling_is_nibabels() -> None:
    """Between the same grids, where both have neighbours; also where axes are turned."""
    from nibabel.processing import resample_from_to

    volume = anatomical()
    image = nibabel.Nifti1Image(volume.array[0].T, volume.affine)
    angle = 0.3
    turned = numpy.eye(4)
    turned[:2, :2] = [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
    targets = [volume.resample((1.7, 3, 2.5)).grid, Grid((14, 20, 15), turned * [3, 3, 2.2, 1])]
    for grid in targets:
        ours = volume.onto(grid).array[0]
        theirs = resample_from_to(image, (grid.size[::-1], grid.affine), order=1, cval=math.nan)
        theirs = theirs.get_fdata().T
        inside = ~numpy.isnan(theirs)
        assert inside.mean() > 0.3
        assert numpy.abs(ours - theirs)[inside].max() < 0.5  # of values up to 30393


@pytest.mark.parametrize("spacing", [0, -1, (1, 2, 0), math.nan])
def test_a_spacing_that_is_none_is_refused(spacing: object) -> None:
    with pytest.raises(Refused, match="expected millimetres above 0"):
        small().resample(spacing)  # type: ignore[arg-type]


def test_labels_are_never_mixed() -> None:
    labels = numpy.zeros((4, 5, 6), numpy.uint8)
    labels[1:3, 1:4, 2:5] = 7
    labels[3] = 3
    volume = small().resample(0.9)
    moved = volume.forth(labels)
    assert moved.dtype == numpy.uint8
    assert set(numpy.unique(moved)) == {0, 3, 7}
    assert numpy.array_equal(volume.back(moved), labels)
    shares = volume.forth(labels.astype(numpy.float32))  # floats are logits or chances
    assert len(numpy.unique(shares)) > 3


def test_a_mask_of_a_changed_volume_goes_back_where_it_was() -> None:
    volume = anatomical().oriented("ASL").crop((2, 3, 4, 30, 20, 35)).pad((32, 20, 40)).resample(2)
    assert [step.name.split()[0] for step in volume.history] == [
        "oriented",
        "crop",
        "pad",
        "resample",
    ]
    mask = ball(anatomical().size, (13, 20, 16), (4, 6, 5))
    assert numpy.array_equal(volume.back(volume.forth(mask)), mask)
    logits = numpy.random.RandomState(0).randn(3, *volume.size).astype(numpy.float32)
    back = volume.back(logits)
    assert back.shape == (3, *anatomical().size)
    assert back[0, 0, 0, 0] == 0  # cropped away
    assert volume.original.difference(anatomical().grid) == ""


def test_a_crop_and_a_pad_move_the_affine() -> None:
    volume = small()
    part = volume.crop((1, 2, 3, 4, 5, 6))
    assert numpy.array_equal(part.array, volume.array[:, 1:4, 2:5, 3:6])
    assert numpy.allclose(part.grid.to_mm((0, 0, 0)), volume.grid.to_mm((1, 2, 3)))
    wide = part.pad((5, 3, 4), -1)
    assert wide.size == (5, 3, 4)
    assert (wide.array[:, 3:] == -1).all() and (wide.array[..., 3:] == -1).all()
    assert numpy.array_equal(wide.array[:, :3, :, :3], part.array)
    assert part.pad((1, 1, 1)) is part


@pytest.mark.parametrize(
    "box", [(0, 0, 0, 5, 5, 6), (2, 0, 0, 2, 5, 6), (-1, 0, 0, 4, 5, 6), (0, 0)]
)
def test_a_crop_beyond_the_volume_is_refused(box: tuple) -> None:
    with pytest.raises(Refused, match="is not within a volume of"):
        small().crop(box)


def test_values_of_another_size_do_not_go_back() -> None:
    with pytest.raises(Refused, match=r"\(4, 5, 5\), this volume has \(4, 5, 6\)"):
        small().back(numpy.zeros((4, 5, 5)))


# -- prompts ---------------------------------------------------------------------------------------


def two_parts() -> numpy.ndarray:
    return ball((12, 20, 20), (5, 6, 6), (4, 5, 5)) | ball((12, 20, 20), (6, 15, 15), (3, 3, 3))


@pytest.mark.parametrize("strategy", ["random", "iterative"])
def test_clicks_fall_on_the_object_and_are_drawn_again_alike(strategy: str) -> None:
    mask = two_parts()
    points, labels = volumes.from_mask(mask, 6, strategy, seed=3)
    assert labels == [1] * 6
    assert len(set(points)) == 6
    assert all(mask[int(p.z), int(p.y), int(p.x)] for p in points)
    assert points == volumes.from_mask(mask, 6, strategy, seed=3)[0]
    assert points != volumes.from_mask(mask, 6, strategy, seed=4)[0]


def test_centres_are_those_of_the_largest_parts() -> None:
    assert volumes.from_mask(two_parts(), 2, "centroid")[0] == [(5, 6, 6), (6, 15, 15)]
    ring = ball((3, 21, 21), (1, 10, 10), (1, 9, 9)) & ~ball((3, 21, 21), (1, 10, 10), (2, 6, 6))
    (point,), _ = volumes.from_mask(ring, 1, "centroid")
    assert ring[tuple(int(v) for v in point)]  # its middle is a hole
    with pytest.raises(Refused, match="3 centres were asked for, the mask has 2 connected parts"):
        volumes.from_mask(two_parts(), 3, "centroid")


def test_iterative_clicks_begin_in_the_middle_and_spread() -> None:
    points, _ = volumes.from_mask(two_parts(), 2, "iterative")
    assert numpy.linalg.norm(numpy.array(points[0]) - (5, 6, 6)) <= 1
    assert numpy.linalg.norm(numpy.array(points[1]) - (6, 15, 15)) <= 1


@pytest.mark.parametrize(
    ("mask", "arguments", "message"),
    [
        (numpy.zeros((3, 4, 5)), {}, "the mask is empty"),
        (numpy.ones((3, 4)), {}, r"\(3, 4\), expected \(D, H, W\)"),
        (
            numpy.arange(8).reshape(2, 2, 2),
            {},
            "holds the values 0, 1, 2, 3, 4, 5, 6, 7, expected one",
        ),
        (numpy.full((2, 2, 2), 0.5), {}, "holds the values 0.5"),
        (numpy.ones((1, 1, 2)), {"n": 3}, "3 clicks were asked for, the mask has 2 voxels"),
        (numpy.ones((1, 1, 2)), {"strategy": "centre"}, "no strategy is named 'centre'"),
    ],
)
def test_clicks_from_other_masks_are_refused(
    mask: numpy.ndarray, arguments: dict, message: str
) -> None:
    with pytest.raises(Refused, match=message):
        volumes.from_mask(mask, **arguments)


def test_the_next_click_is_deep_in_the_largest_error() -> None:
    truth = two_parts()
    prediction = truth.copy()
    prediction[:, 10:, 10:] = False  # the small part is missed
    assert volumes.next_click(prediction, truth) == ((6, 15, 15), 1)
    prediction = truth | ball(truth.shape, (6, 5, 15), (4, 4, 4))
    click = volumes.next_click(prediction, truth)
    assert click is not None and click[1] == 0
    assert (prediction & ~truth)[tuple(int(v) for v in click[0])]
    assert volumes.next_click(truth, truth) is None


def test_boxes_and_points_move_with_the_voxels() -> None:
    from mmadapt.tasks.volume.prompts import Box, moved_box

    volume = anatomical()
    mask = numpy.zeros(volume.size, bool)
    mask[4:9, 10:12, 20:30] = True
    for codes in ORIENTATIONS[::7]:
        other = volume.oriented(codes)
        moved = moved_box(volumes.box_of(mask), volume.grid, other.grid)
        assert numpy.allclose(moved, volumes.box_of(other.forth(mask)))
    halved = volume.resample(1.0)
    moved = moved_box(Box(4, 10, 20, 9, 12, 30), volume.grid, halved.grid)
    assert numpy.allclose(moved, (8, 20, 40, 18, 24, 60))


def test_a_box_around_a_mask() -> None:
    mask = numpy.zeros((6, 7, 8), bool)
    mask[2:4, 1:6, 3] = True
    assert volumes.box_of(mask) == (2, 1, 3, 4, 6, 4)
    assert volumes.box_of(mask, 2) == (0, 0, 1, 6, 7, 6)


# -- metrics ---------------------------------------------------------------------------------------


def test_metrics_of_every_structure() -> None:
    """8³ cubes shifted by two voxels, at 2.5 mm along that axis; a structure that was missed."""
    truth = numpy.zeros((20, 20, 20), numpy.uint8)
    truth[4:12, 4:12, 4:12] = 1
    truth[15:18, 15:18, 15:18] = 2
    prediction = numpy.zeros_like(truth)
    prediction[6:14, 4:12, 4:12] = 1
    grid = Grid((20, 20, 20), numpy.diag([1, 1, 2.5, 1]))
    kidney, stone = volumes.score_structures(prediction, truth, grid, {1: "kidney", 2: "stone"})
    assert (kidney.structure, kidney.dice, kidney.hausdorff) == ("kidney", 0.75, 5.0)
    assert kidney.true_ml == pytest.approx(8**3 * 2.5 / 1000)
    assert (stone.dice, stone.hausdorff, stone.surface_dice) == (0.0, math.inf, 0.0)
    assert stone.predicted_ml == 0
    far = volumes.score_structures(prediction, truth, grid, far=grid.diagonal)
    assert [score.structure for score in far] == ["1", "2"]
    assert far[1].hausdorff == grid.diagonal
    table = volumes.score_table([[kidney, stone], [kidney]])
    rows = {row[0]: row for row in table.rows}
    assert rows["kidney"][1:4] == (2, 0, 0.75)
    assert rows["stone"][1:4] == (1, 1, 0.0)
    with pytest.raises(Refused, match=r"labels \[2\] have no name"):
        volumes.score_structures(prediction, truth, grid, {1: "kidney"})
    with pytest.raises(Refused, match=r"truth is float64 .* expected whole numbers"):
        volumes.score_structures(prediction, truth * 0.5, grid)
    with pytest.raises(Refused, match=r"prediction is uint8 \(3, 20, 20\)"):
        volumes.score_structures(prediction[:3], truth, grid)


# -- figures ---------------------------------------------------------------------------------------


def test_three_planes_show_the_same_body_whatever_the_order_of_voxels() -> None:
    """Letters, proportions and the slice drawn; right is on the left, front and head above."""
    labels = ball(anatomical().size, (14, 22, 20), (5, 7, 4)).astype(numpy.uint8)
    drawn = []
    for codes in ("LAS", "RAS", "ASL", "IPR"):
        volume = anatomical().oriented(codes)
        figure = volumes.planes_figure(volume, mask=volume.forth(labels), names={1: "ball"})
        assert len(figure.axes) == 3
        letters = [
            [text.get_text() for text in axes.texts if len(text.get_text()) == 1]
            for axes in figure.axes
        ]
        assert letters == [list("RLAP"), list("RLSI"), list("APSI")]
        titles = [re.sub(r"[xyz] = \d+ of \S+", "", axes.get_title()) for axes in figure.axes]
        pictures = [numpy.asarray(axes.images[0].get_array()) for axes in figure.axes]
        filled = [numpy.asarray(axes.images[1].get_array())[..., 3] > 0 for axes in figure.axes]
        extents = [axes.images[0].get_extent() for axes in figure.axes]
        shown = [p.tolist() for p in pictures], [f.tolist() for f in filled]
        drawn.append((titles, *shown, extents))
        assert [axes.get_aspect() for axes in figure.axes] == [1.0, 1.0, 1.0]
    assert drawn[1:] == drawn[:1] * 3
    assert drawn[0][0] == [
        "axial      S 12.0 mm",
        "coronal      A 4.0 mm",
        "sagittal      L 8.0 mm",
    ]
    assert [tuple(extent[1::2]) for extent in drawn[0][3]] == [(66, 82), (66, 50), (82, 50)]
    # drawn from the left bottom: the file's voxels (LAS) begin at the patient's right and back
    assert drawn[0][1][0] == anatomical().array[0, 14].tolist()
    assert drawn[0][2][0] == (labels[14] > 0).tolist()


def test_the_slices_number_and_place_are_told() -> None:
    figure = volumes.planes_figure(anatomical(), at=(3, 30, 10))
    titles = [axes.get_title().split("   ") for axes in figure.axes]
    assert titles[0] == ["axial", "z = 3 of 0–24", "I 10.0 mm"]
    assert titles[1] == ["coronal", "y = 30 of 0–40", "A 20.0 mm"]
    assert titles[2] == ["sagittal", "x = 10 of 0–32", "R 12.0 mm"]


def test_of_a_file_only_the_planes_are_read() -> None:
    stored = volumes.open_nifti(nifti("anatomical.nii"))
    reads: list[int] = []

    class Watched:
        shape = stored.array.source.shape

        def __getitem__(self, key):
            found = stored.array.source[key]
            reads.append(found.size)
            return found

    watched = Volume(type(stored.array)(Watched()), stored.affine)
    figure = volumes.planes_figure(watched, at=(3, 30, 10))
    expected = volumes.planes_figure(anatomical(), at=(3, 30, 10))
    for ours, theirs in zip(figure.axes, expected.axes, strict=True):
        assert ours.images[0].get_array().tolist() == theirs.images[0].get_array().tolist()
    assert sorted(reads) == sorted((41 * 33, 25 * 33, 25 * 41))


def test_a_voxel_is_drawn_as_long_as_it_is(tmp_path) -> None:
    volume = volumes.read_dicom(series(tmp_path / "ct"))
    figure = volumes.planes_figure(volume)
    extents = [axes.images[0].get_extent()[1::2] for axes in figure.axes]
    assert numpy.allclose(extents, [(8.0, 6.0), (8.0, 15.0), (6.0, 15.0)])


def test_a_mask_of_another_size_is_not_drawn() -> None:
    with pytest.raises(Refused, match=r"the mask is float64 \(2, 3, 4\)"):
        volumes.planes_figure(anatomical(), mask=numpy.zeros((2, 3, 4)))
