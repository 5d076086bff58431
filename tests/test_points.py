"""Generated solids, clouds of one's own, their picture, and the study's committed numbers."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

import mmadapt as mm
from mmadapt.ops.points import along_line, farthest_points
from mmadapt.tasks import points

# -- solids -----------------------------------------------------------------------------------------


def test_a_seed_decides_everything_and_chance_is_left_alone() -> None:
    before = torch.get_rng_state()
    one, same, other = (points.solids(2, points=60, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.clouds, same.clouds)
    assert not torch.equal(one.clouds, other.clouds)
    assert one.clouds.shape == (20, 60, 3)
    assert one.labels.tolist() == [kind for kind in range(10) for _ in range(2)]
    assert repr(one) == "Solids(20 clouds of 60 points, 10 kinds)"


def test_solids_are_clouds_as_any2point_takes_them() -> None:
    clouds = points.solids(2, "test", points=60, seed=0).clouds
    assert torch.allclose(clouds.mean(1), torch.zeros(20, 3), atol=1e-6)
    assert torch.allclose(clouds.norm(dim=-1).amax(1), torch.ones(20))


def test_no_proportion_is_in_two_splits() -> None:
    ranges = sorted(pair for pairs in points.SPLITS.values() for pair in pairs)
    for (_, high), (low, _) in itertools.pairwise(ranges):
        assert high <= low
    boxes = {
        split: points.solids(8, split, points=2000, noise=0.0, cut=0.0, turned="no", seed=1)
        for split in points.SPLITS
    }
    for split, found in boxes.items():
        own = found.clouds[found.labels == found.names.index("box")]
        extent = own.amax(1) - own.amin(1)
        for width, height in extent[:, [0, 2]].tolist():
            factor = height / width
            assert any(low - 0.02 < factor < high + 0.02 for low, high in points.SPLITS[split])


def test_what_is_turned_upright_keeps_its_height_and_what_is_turned_at_will_does_not() -> None:
    settings: dict[str, Any] = {"points": 400, "noise": 0.0, "cut": 0.0, "seed": 2}
    for turned, keeps in (("no", True), ("upright", True), ("any", False)):
        cloud = points.solids(1, turned=turned, **settings)
        tube = cloud.clouds[cloud.names.index("tube")]
        radii = tube[:, :2].norm(dim=1)  # a tube about the vertical axis has one radius
        assert (radii.std() < 0.06) == keeps


def test_a_cut_takes_one_side_away() -> None:
    whole, cut = (
        points.solids(1, points=500, noise=0.0, cut=share, turned="no", seed=5).clouds[0]
        for share in (0.0, 0.4)
    )  # of a ball: without a side, its middle lies elsewhere, so it is no ball about it
    assert whole.norm(dim=1).std() < 0.12 < cut.norm(dim=1).std()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"each": 0}, "each is 0"),
        ({"points": 1.5}, "points is 1.5"),
        ({"split": "valid"}, "split is 'valid'"),
        ({"turned": "up"}, "turned is 'up'"),
        ({"noise": -1.0}, "noise is -1.0"),
        ({"noise": float("nan")}, "noise is nan"),
        ({"cut": 1.0}, "cut 1.0"),
    ],
)
def test_solids_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(mm.errors.DataError, match=message):
        points.solids(**{"each": 1, **changes})


# -- one's own clouds ---------------------------------------------------------------------------------


def test_own_points_are_centred_and_scaled() -> None:
    raw = numpy.random.default_rng(0).normal(size=(2, 30, 3)) * 40 + 7
    found = points.unit_clouds(raw)
    assert found.dtype == torch.float64
    assert torch.allclose(found.mean(1), torch.zeros(2, 3, dtype=torch.float64), atol=1e-9)
    assert torch.allclose(found.norm(dim=-1).amax(1), torch.ones(2, dtype=torch.float64))
    assert torch.allclose(points.unit_clouds(raw[0]), found[0])
    assert points.unit_clouds([[0, 0, 0], [2, 0, 0]]).tolist() == [[-1, 0, 0], [1, 0, 0]]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (torch.zeros(5, 6), r"\(5, 6\), expected \(N, 3\)"),
        (torch.zeros(0, 3), r"\(0, 3\), expected"),
        (torch.ones(4, 3), "coincide"),
        (torch.tensor([[0.0, 0, 0], [1, torch.nan, torch.inf]]), r"2 coordinates .* at \(1, 1\)"),
    ],
)
def test_own_points_that_are_none_are_refused(raw: Any, message: str) -> None:
    with pytest.raises(mm.errors.DataError, match=message):
        points.unit_clouds(raw)


# -- the picture ----------------------------------------------------------------------------------------


def test_the_picture_shows_a_cloud_its_centres_and_all_views() -> None:
    cloud = points.solids(1, points=80, seed=0).clouds[4]
    figure = points.cloud_figure(cloud, tokens=12, grid=(7, 9), rows=20, title="cone")
    assert len(figure.axes) == 1 + 6 + 1
    solid, *images, lines = figure.axes
    assert solid.get_title() == "80 points, 12 centres"
    for axes in images:
        (drawn,) = axes.collections
        places = drawn.get_offsets()
        assert len(places) == 12
        assert (places >= 0).all() and (places[:, 0] <= 9).all() and (places[:, 1] <= 7).all()
    centres = cloud[farthest_points(cloud[None], 12)[0]]
    expected = along_line(centres[None], (-1.0, 0.0, 1.0), 20)[0]
    for view, drawn in enumerate(lines.collections):
        assert numpy.allclose(drawn.get_offsets()[:, 0], expected[view], atol=1e-4)
        assert (drawn.get_offsets()[:, 1] == view).all()


def test_its_plain_twin_counts_the_same() -> None:
    cloud = points.solids(1, points=80, seed=0).clouds[4]
    table = points.cloud_table(cloud, tokens=12, grid=(7, 9), rows=20)
    assert len(table) == 6
    figure = points.cloud_figure(cloud, tokens=12, grid=(7, 9), rows=20)
    for axes, row in zip(figure.axes[1:7], table, strict=True):
        patches = [tuple(p) for p in numpy.floor(axes.collections[0].get_offsets()).tolist()]
        assert row[1] == len(set(patches))
        assert row[2] == max(patches.count(patch) for patch in patches)
    assert "six images of 7 × 9 patches" in str(table)


def test_a_batch_is_no_picture() -> None:
    with pytest.raises(mm.errors.DataError, match="expected one cloud"):
        points.cloud_figure(points.solids(1, points=40).clouds)
    with pytest.raises(mm.errors.DataError, match="expected one cloud"):
        points.cloud_table(torch.randn(8, 3), tokens=9)


# -- the study ------------------------------------------------------------------------------------------


def test_the_table_of_the_study_is_that_of_its_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    import points as study  # type: ignore[import-not-found]

    try:
        known = json.loads(study.RESULTS.read_text())
        page = study.PAGE.read_text()
        assert study.write(page, known) == page
        assert known["settings"] == json.loads(json.dumps(study.SETTINGS))
        assert study.finished(known)  # with these seeds every method was run
        for row in known["rows"]:  # what test was measured with is what validation chose
            if row["split"] == "test" and row["method"] in study.TRAINED:
                assert row["setting"] == study.chosen_rate(known["rows"], row["method"])
        test = next(row for row in known["rows"] if row["split"] == "test")
        test["accuracy"] = 0.01
        assert study.write(page, known) != page
    finally:
        del sys.modules["points"], sys.modules["machine"]
