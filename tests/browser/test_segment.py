"""`mm.ui.segment` in real front ends."""

from __future__ import annotations

import json
from typing import Any

import numpy
import pytest

pytestmark = pytest.mark.browser

#: a disc that any click near its middle finds, by a plain function instead of a model
DISC = """
import numpy
import mmadapt as mm

y, x = numpy.indices((64, 64))
disc = (x - 32) ** 2 + (y - 24) ** 2 < 15**2
image = numpy.where(disc, 180, 60).astype("uint8")


def predict(points, labels, box):
    if (1, 1) in [(round(x), round(y)) for x, y in points]:
        raise ValueError("nothing is there")
    return disc, [0.75]
"""


def test_a_click_segments(drive: Any, notebook: Any) -> None:
    path = notebook(
        "from disc import *\nw = mm.ui.segment(predict, image)\nw",
        "print([(round(x), round(y)) for x, y in w.points], w.labels, numpy.rint(w.boxes).tolist())",
        "w.points = [(5, 6)]\nprint(w.points, int(w.mask.sum()))",
        disc=DISC,
    )
    seen = drive("segment.mjs", path, at=(32, 24), beside=(5, 60), box=(10, 8, 50, 40))
    assert seen["before"][:3] == [180] * 3
    # 0.4 of #E69F00 over it
    assert numpy.allclose(seen["clicked"][:3], [200, 172, 108], atol=3)
    assert seen["menu"] == 0
    assert seen["state"].strip() == "[(32, 24), (5, 60)] [1, 0] [[10.0, 8.0, 50.0, 40.0]]"
    y, x = numpy.indices((64, 64))
    inside = int(((x - 32) ** 2 + (y - 24) ** 2 < 15**2).sum())
    assert seen["assigned"].strip() == f"[(5.0, 6.0)] {inside}"
    saved = json.loads(path.read_text())
    assert "widgets" not in saved["metadata"]
    assert "image/png" in saved["cells"][0]["outputs"][0]["data"]
    assert path.stat().st_size < 100_000
