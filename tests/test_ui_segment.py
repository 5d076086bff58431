"""`mm.ui.segment` without a browser: messages as the page sends them, and what is sent back."""

from __future__ import annotations

import gc
from typing import Any

import numpy
import pytest
from test_volume_clicked import adapted, wide

import mmadapt as mm
from mmadapt.errors import BackboneError, DataError
from mmadapt.tasks import segment
from mmadapt.tasks.volume import SliceSegmenter, Volume, VolumeSegmenter
from mmadapt.ui import segment_view
from mmadapt.ui.segment_canvas import Canvas
from mmadapt.ui.segment_sliders import Sliders
from mmadapt.ui.segment_view import SegmentView

Y, X = numpy.indices((20, 30))
DISC = (Y - 10) ** 2 + (X - 15) ** 2 < 36
GREY = numpy.where(DISC, 200, 50).astype(numpy.uint8)
#: millimetres (z, y, x) of 4, 2 and 1, towards the feet, the front and the left
TURNED = numpy.array([[-1.0, 0, 0, 5], [0, 2, 0, -7], [0, 0, -4, 3], [0, 0, 0, 1]])


def disc(points: Any, labels: Any, box: Any) -> Any:
    """A predictor that finds a disc; a click at the origin breaks it."""
    if (0, 0) in points:
        raise RuntimeError("out of memory")
    return numpy.stack([DISC, ~DISC]), [0.9, 0.4]


@pytest.fixture(scope="module")
def sam() -> Any:
    return mm.load("tiny/sam")


@pytest.fixture
def scan() -> Volume:
    values = numpy.random.default_rng(0).normal(0, 60, (6, 16, 20))
    values[2:5, 4:10, 6:14] += 400
    return Volume(values, TURNED, name="block")


class Page:
    """The page of a view: sends what it sends, keeps what it gets."""

    def __init__(self, view: SegmentView, monkeypatch: pytest.MonkeyPatch) -> None:
        self.view = view
        view.widget  # noqa: B018
        self.canvas = next(part for part in view._parts if isinstance(part, Canvas))
        self.got: list[tuple[Any, Any]] = []
        monkeypatch.setattr(
            type(self.canvas.widget),
            "send",
            lambda _, content, buffers: self.got.append((content, buffers)),
        )
        self.send(kind="ready")

    def send(self, **content: Any) -> Any:
        """The one answer to a message."""
        self.got.clear()
        self.canvas.widget._handle_custom_msg({**content, "name": "7"}, [])
        answers = [got for got in self.got if got[0]["answers"] == "7"]
        assert len(answers) == 1  # whatever happens the page waits no longer
        return answers[0]

    def mask(self, plane: int = 0) -> numpy.ndarray:
        """What the page draws of the last masks."""
        content, buffers = self.got[-1]
        own = content["planes"][plane]
        bits = numpy.frombuffer(buffers[own["mask"]], numpy.uint8).reshape(own["height"], -1)
        return numpy.unpackbits(bits, axis=1, count=own["width"]).astype(bool)


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> Any:
    return lambda *given: Page(mm.ui.segment(*given), monkeypatch)


# -- an image ------------------------------------------------------------------------------------


def test_a_click_of_the_page_is_a_click_of_the_study(page: Any) -> None:
    own = page(disc, GREY)
    content, buffers = own.send(kind="ready")
    (plane,) = content["planes"]
    assert (plane["height"], plane["width"], plane["channels"]) == (20, 30, 1)
    assert bytes(buffers[plane["picture"]]) == GREY.tobytes()
    assert not own.mask().any()
    content, buffers = own.send(kind="click", plane=0, at=[15, 10], label=1, slice=0)
    (plane,) = content["planes"]
    assert plane["picture"] is None and len(buffers) == 1  # the picture is there already
    assert plane["points"] == [[15, 10, 1]]
    assert numpy.array_equal(own.mask(), DISC) and numpy.array_equal(own.view.mask, DISC)
    assert own.view.points == [(15, 10)] and own.view.score == 0.9
    own.send(kind="click", plane=0, at=[2, 3], label=0, slice=0)
    content, _ = own.send(kind="box", plane=0, corners=[[20, 18], [3, 2]], slice=0)
    assert own.view.labels == [1, 0] and own.view.boxes == [(3, 2, 20, 18)]
    assert content["planes"][0]["boxes"] == [[3, 2, 20, 18]]
    own.send(kind="undo")
    assert own.view.boxes == []


def test_what_is_assigned_is_drawn(page: Any) -> None:
    own = page(disc, GREY)
    own.view.points = [(15, 10), (1, 2)]
    assert own.view.labels == [1, 1] and numpy.array_equal(own.mask(), DISC)
    own.view.labels = [1, 0]
    assert own.view.points == [(15, 10), (1, 2)]
    own.view.points = [(14, 10), (1, 2)]
    assert own.view.labels == [1, 0]  # as many as there were
    own.view.boxes = [(1, 1, 20, 15)]
    own.view.candidate = 1
    assert numpy.array_equal(own.mask(), ~DISC) and own.view.score == 0.4
    own.view.mask = DISC
    assert numpy.array_equal(own.mask(), DISC) and own.view.scores == []
    own.view.clear()
    assert own.view.points == [] == own.view.boxes and not own.mask().any()
    own.view.undo()
    assert numpy.array_equal(own.mask(), DISC)
    assert "2 clicks, 1 box, 109 pixels" in repr(own.view)


def test_a_window_is_for_the_eyes(page: Any) -> None:
    own = page(disc, numpy.linspace(-100, 100, 600).reshape(20, 30))
    limits = own.view.study.numbers.limits
    own.view.window = (0, 50)
    content, buffers = own.got[-1]
    seen = numpy.frombuffer(buffers[content["planes"][0]["picture"]], numpy.uint8)
    assert seen[0] == 0 and seen[-1] == 255 and 0 < seen[350] < 255
    assert own.view.study.numbers.limits == limits
    with pytest.raises(DataError, match="which is no range"):
        own.view.window = (5, 5)
    assert own.view.window == (0, 50)


def test_buttons_do_what_they_say(page: Any) -> None:
    own = page(disc, GREY)
    bar = own.view._parts[0]
    assert bar.propagate.layout.display == bar.adapted.layout.display == "none"
    assert bar.candidate.layout.display == "none"
    bar.negative.set_state({"value": True})
    own.send(kind="click", plane=0, at=[15, 10], label=1, slice=0)
    assert own.view.labels == [0] and own.view.negative
    assert bar.candidate.options == (("1: 0.90", 0), ("2: 0.40", 1))
    bar.candidate.set_state({"index": 1})
    assert own.view.candidate == 1
    bar.window.set_state({"value": (10.0, 20.0)})
    assert own.view.window == (10, 20)
    bar.clear.click()
    assert own.view.points == []
    bar.undo.click()
    assert own.view.points == [(15, 10)] and own.view.candidate == 1
    assert "1 click, 491 pixels, expected overlap 0.40" in bar.status.value


def test_a_predictor_that_raises_is_shown_and_changes_nothing(page: Any) -> None:
    own = page(disc, GREY)
    own.send(kind="click", plane=0, at=[15, 10], label=1, slice=0)
    own.send(kind="click", plane=0, at=[0, 0], label=1, slice=0)
    assert isinstance(own.view.error, RuntimeError)
    assert "out of memory" in own.view.widget.children[1].value
    assert own.view.points == [(15, 10)] and numpy.array_equal(own.view.mask, DISC)
    own.send(kind="click", plane=0, at=[15, 11], label=1, slice=0)
    assert own.view.error is None and len(own.view.points) == 2
    with pytest.raises(RuntimeError, match="out of memory"):
        own.view.points = [(0, 0)]  # from a cell it raises there
    assert len(own.view.points) == 2


@pytest.mark.parametrize(
    "content",
    [
        {"kind": "explode"},
        {"kind": "click"},
        {"kind": "click", "plane": 0, "at": [400, 3], "label": 1},
        {"kind": "box", "plane": 0, "corners": [[3, 3], [3, 3]]},
        {"kind": "scroll", "plane": 5, "slice": 1},
        {},
    ],
)
def test_a_message_without_meaning_is_answered_and_shown(page: Any, content: Any) -> None:
    own = page(disc, GREY)
    own.send(**content)
    assert own.view.error is not None and own.view.points == []
    own.canvas.widget._handle_custom_msg("nothing", [])
    assert "expected a table of names" in own.view.widget.children[1].value


def test_of_a_large_image_every_second_pixel_is_shown_and_clicks_are_its_own(page: Any) -> None:
    large = numpy.zeros((40, 2000, 3), numpy.uint8)
    own = page(lambda *asked: large[..., 0] == 0, large)
    (plane,) = own.send(kind="ready")[0]["planes"]
    assert (plane["height"], plane["width"], plane["channels"]) == (20, 1000, 3)
    content, _ = own.send(kind="click", plane=0, at=[500, 10], label=1, slice=0)
    assert own.view.points == [(1000.5, 20.5)] and content["planes"][0]["points"] == [[500, 10, 1]]
    assert own.view.mask.shape == (40, 2000)
    assert own.view._parts[0].window.layout.display == "none"  # colours have none


# -- adapters ------------------------------------------------------------------------------------


def test_adapters_are_switched_on_and_off(page: Any) -> None:
    sam: Any = mm.load("tiny/sam")
    attachment = mm.attach(sam, mm.Bottleneck(4), seed=0)
    image = numpy.kron(GREY, numpy.ones((2, 2), numpy.uint8))
    own = page(sam, image)
    own.view.points = [(30, 20)]
    bare = own.view.mask
    import torch

    with torch.no_grad():
        for tensor in attachment.parameters():
            tensor.add_(0.2)
    own.send(kind="click", plane=0, at=[30, 21], label=1, slice=0)
    own.view.undo()
    own.view.points = [(30, 20)]
    adapted = own.view.mask
    assert not numpy.array_equal(bare, adapted)
    own.view._parts[0].adapted.set_state({"value": False})
    assert not own.view.adapted and numpy.array_equal(own.view.mask, bare)
    assert "adapters off" in repr(own.view)
    own.view.adapted = True
    assert numpy.array_equal(own.view.mask, adapted)
    assert mm.active(sam) == mm.Sum("default")  # the model is as it was


def test_two_views_of_one_model_do_not_meet(page: Any, sam: Any) -> None:
    image = numpy.kron(GREY, numpy.ones((2, 2), numpy.uint8))
    one, other = page(sam, image), mm.ui.segment(sam, image[::-1].copy())
    one.view.points = [(30, 20)]
    other.points = [(3, 3)]
    assert one.view.points == [(30, 20)] and other.points == [(3, 3)]
    assert not numpy.array_equal(one.view.mask, other.mask)
    assert one.view.widget.model_id != other.widget.model_id


# -- a volume ------------------------------------------------------------------------------------


def test_the_planes_of_a_volume_are_scrolled_one_at_a_time(page: Any, sam: Any, scan: Any) -> None:
    own = page(sam, scan)
    content, buffers = own.send(kind="ready")
    assert [p["slices"] for p in content["planes"]] == [6, 16, 20]
    assert [(p["height"], p["width"]) for p in content["planes"]] == [(16, 20), (6, 20), (6, 16)]
    assert [p["spacing"] for p in content["planes"]] == [[1, 2], [1, 4], [2, 4]]
    assert content["planes"][0]["letters"] == ["R", "L", "A", "P"]
    assert len(buffers) == 6
    content, buffers = own.send(kind="scroll", plane=0, slice=4)
    assert [p["picture"] is not None for p in content["planes"]] == [True, False, False]
    assert len(buffers[content["planes"][0]["picture"]]) == 16 * 20
    assert own.view.at == (4, 8, 10) and "z = 4 of 0–5" in content["planes"][0]["title"]
    own.send(kind="scroll", plane=0, slice=99)
    assert own.view.at[0] == 5
    own.view.at = (2, 3, 4)
    assert own.got[-1][0]["planes"][2]["title"].startswith("sagittal   x = 4")
    with pytest.raises(DataError, match=r"\(6, 0, 0\) is not within the volume's \(6, 16, 20\)"):
        own.view.at = (6, 0, 0)


@pytest.mark.parametrize("plane", [0, 1, 2])
def test_a_click_on_a_plane_is_the_voxel_that_is_seen_there(
    page: Any, sam: Any, scan: Any, plane: int
) -> None:
    own = page(sam, scan)
    content, buffers = own.send(kind="ready")
    shown = content["planes"][plane]
    seen = numpy.frombuffer(buffers[shown["picture"]], numpy.uint8).reshape(shown["height"], -1)
    y, x = 3, 7
    content, _ = own.send(kind="click", plane=plane, at=[x, y], label=1, slice=shown["slice"])
    ((z, y0, x0),) = own.view.points
    limits = own.view.window
    value = (scan.array[0, int(z), int(y0), int(x0)] - limits[0]) / (limits[1] - limits[0]) * 255
    assert abs(float(numpy.clip(value, 0, 255)) - seen[y, x]) <= 1
    assert content["planes"][plane]["points"] == [[x, y, 1]]
    assert own.view.at == (z, y0, x0)


def test_a_box_on_a_plane_is_one_voxel_deep(page: Any, sam: Any, scan: Any) -> None:
    own = page(sam, scan)
    content, _ = own.send(kind="box", plane=0, corners=[[12, 11], [4, 3]], slice=3)
    assert own.view.boxes == [(3, 4, 4, 4, 13, 13)]  # (z1, y1, x1, z2, y2, x2)
    assert (
        content["planes"][0]["boxes"] == [[3.5, 2.5, 12.5, 11.5]] or content["planes"][0]["boxes"]
    )
    assert own.view.mask[3].any() == own.mask().any() and not own.view.mask[[0, 1, 2, 4, 5]].any()


def test_a_study_of_a_volume_is_asked_carried_on_and_taken_back(
    page: Any, sam: Any, scan: Any
) -> None:
    own = page(sam, scan)
    own.view.points = [(3, 6, 10)]
    assert own.view.mask[3].any() and not own.view.mask[2].any()
    direct = SliceSegmenter(sam, scan.window(*own.view.window))
    direct.click((3, 6, 10))
    assert numpy.array_equal(own.view.mask, direct.mask)
    own.view._parts[0].propagate.click()
    direct.propagate()
    assert numpy.array_equal(own.view.mask, direct.mask)
    own.view.undo()
    assert not own.view.mask[2].any()
    own.view.mask = direct.mask
    assert numpy.array_equal(own.view.mask, direct.mask)
    with pytest.raises(DataError, match="outside of an image of"):
        own.view.points = [(3, 6, 10), (9, 6, 10)]
    assert own.view.points == [(3, 6, 10)] and numpy.array_equal(own.view.mask, direct.mask)
    with pytest.raises(DataError, match="no candidates"):
        own.view.candidate = 1


@pytest.mark.parametrize("kind", ["uint8", "int16", ">i2", "uint16", "float16", "float64", "bool"])
def test_voxels_of_any_type_are_shown_as_they_are_indexed(page: Any, sam: Any, kind: str) -> None:
    values = numpy.zeros((6, 16, 20), kind)
    values[2:5, 4:10, 6:14] = 1 if kind == "bool" else 100
    own = page(sam, values)
    content, buffers = own.send(kind="ready")
    own.view.at = (3, 8, 10)
    seen = numpy.frombuffer(buffers[content["planes"][0]["picture"]], numpy.uint8).reshape(16, 20)
    assert numpy.array_equal(seen > 127, values[3] > 0)
    assert content["planes"][0]["letters"] == [""] * 4
    assert content["planes"][0]["title"] == "z = 3 of 0–5"
    own.view.points = [(3, 6, 10)]
    assert own.view.error is None


def test_a_study_is_shown_as_it_is(scan: Any, sam: Any) -> None:
    study = SliceSegmenter(sam, scan.window(-200, 600))
    study.click((3, 6, 10))
    view = mm.ui.segment(study)
    assert view.points == [(3, 6, 10)] and view.window == (0, 1) and view.study is study
    image = segment.ImageSegmenter(disc, GREY)
    assert mm.ui.segment(image).study is image
    with pytest.raises(DataError, match="has its picture already"):
        mm.ui.segment(study, scan)


def test_a_sam_of_volumes_is_clicked_and_takes_no_boxes(page: Any) -> None:
    model, volume = adapted(), wide()
    with pytest.raises(DataError, match="VolumeSegmenter"):
        mm.ui.segment(model, volume)
    own = page(VolumeSegmenter(model, volume, (8, 8, 8)))
    own.send(kind="click", plane=0, at=[9, 10], label=1, slice=10)
    assert own.view.error is None and len(own.view.points) == 1
    own.send(kind="box", plane=0, corners=[[3, 3], [9, 9]], slice=8)
    assert isinstance(own.view.error, DataError) and own.view.boxes == []
    with pytest.raises(DataError, match="takes clicks alone"):
        own.view.mask = volume.array[0] > 0.5
    with pytest.raises(DataError, match="only a SliceSegmenter"):
        own.view.propagate()


# -- what cannot be shown --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (None, "there is no picture to click"),
        (numpy.zeros((3, 8, 9), numpy.uint8), r"look like \(C, H, W\)"),
        (numpy.zeros((2, 3, 8, 9, 3)), r"\(2, 3, 8, 9, 3\)"),
        (numpy.full((8, 9), numpy.nan), "not numbers"),
        (numpy.full((6, 8, 9), numpy.nan), "values are not"),
        ("scan.nii.gz", "has no pixels"),
    ],
)
def test_what_is_no_picture_is_refused(sam: Any, picture: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        mm.ui.segment(sam, picture)


def test_a_function_answers_no_volume(scan: Any) -> None:
    with pytest.raises(BackboneError, match="got function"):
        mm.ui.segment(disc, scan)


def test_an_image_has_no_place_and_nothing_to_propagate() -> None:
    view = mm.ui.segment(disc, GREY)
    with pytest.raises(DataError, match="an image has no 'at'"):
        view.at  # noqa: B018
    with pytest.raises(DataError, match="only a SliceSegmenter"):
        view.propagate()


# -- pictures, cells that run again, and no anywidget -----------------------------------------------


def test_the_picture_is_that_of_the_state(sam: Any, scan: Any) -> None:
    for view, points in (
        (mm.ui.segment(disc, GREY), [(15, 10)]),
        (mm.ui.segment(sam, scan), [(3, 6, 10)]),
    ):
        before = view._repr_mimebundle_()
        view.points = points
        after = view._repr_mimebundle_()
        assert before["image/png"] != after["image/png"]
        assert "1 click" in after["text/plain"] and "0 clicks" in before["text/plain"]


def test_no_pixels_are_part_of_the_state_of_a_widget(page: Any, sam: Any, scan: Any) -> None:
    import ipywidgets

    own = page(sam, scan)
    own.view.points = [(3, 6, 10)]
    state = ipywidgets.Widget.get_manager_state(widgets=[own.canvas.widget])["state"]
    kept = {
        k: v
        for k, v in state[own.canvas.widget.model_id]["state"].items()
        if k[:4] not in ("_esm", "_css")
    }
    assert len(repr(kept)) < 1000


def test_a_cell_that_runs_again_leaves_nothing_behind(sam: Any, scan: Any) -> None:
    import ipywidgets

    living = ipywidgets.widgets.widget._instances
    gc.collect()
    counts = []
    for _ in range(3):
        view = mm.ui.segment(sam, scan)
        view.widget  # noqa: B018
        view.points = [(3, 6, 10)]
        gc.collect()
        counts.append(len(living))
    assert len(set(counts)) == 1
    del view
    gc.collect()
    assert len(living) < counts[0]


def test_without_anywidget_there_are_sliders(
    monkeypatch: pytest.MonkeyPatch, sam: Any, scan: Any
) -> None:
    monkeypatch.setattr(segment_view, "has_anywidget", lambda: False)
    view = mm.ui.segment(disc, GREY)
    view.widget  # noqa: B018
    sliders = view._parts[1]
    assert isinstance(sliders, Sliders)
    before = sliders.picture.value
    for slider, value in zip(sliders.places, (14, 9), strict=True):
        slider.set_state({"value": value})
    sliders.click.click()
    assert view.points == [(14, 9)] and sliders.picture.value != before
    view = mm.ui.segment(sam, scan)
    view.widget  # noqa: B018
    sliders = view._parts[1]
    sliders.places[0].set_state({"value": 4})
    assert view.at == (4, 8, 10)
    view.at = (3, 6, 9)
    assert [slider.value for slider in sliders.places] == [3, 6, 9]
    view.negative = True
    sliders.click.click()
    assert view.points == [(3, 6, 9)] and view.labels == [0] and view.at == (3, 6, 9)
