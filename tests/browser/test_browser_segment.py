"""`mm.ui.segment` in real front ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import pytest

pytestmark = pytest.mark.browser

#: a disc that any click finds, by a plain function instead of a model
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

#: the same disc as a ball, by a model
BALL = """
import numpy
import mmadapt as mm
from mmadapt.tasks.volume import Volume

z, y, x = numpy.indices((12, 64, 64))
ball = 9 * (z - 6) ** 2 + (x - 32) ** 2 + (y - 24) ** 2 < 15**2
noise = numpy.random.default_rng(0).normal(0, 30, ball.shape)
scan = Volume(numpy.where(ball, 300, -300) + noise, numpy.diag([-1.0, -1, 5, 1]), name="ball")
sam = mm.load("tiny/sam")
"""


def test_a_click_segments(drive: Any, notebook: Any) -> None:
    path = notebook(
        "from disc import *\nw = mm.ui.segment(predict, image)\nw",
        "print([(round(x), round(y)) for x, y in w.points], w.labels, numpy.rint(w.boxes).tolist())",
        "print(w.window[0] > 0, w.window[1], w.error)",
        "w.points = [(5, 6)]\nprint(w.points, int(w.mask.sum()))",
        "import base64\nprint(base64.b64encode(w._repr_mimebundle_()['image/png']).decode()[-200:])",
        disc=DISC,
    )
    seen = drive(
        "segment.mjs", path, at=(32, 24), beside=(5, 60), box=(10, 8, 50, 40), refused=(1, 1)
    )
    assert seen["before"][:3] == [180] * 3
    # 0.4 of #E69F00 over it
    assert numpy.allclose(seen["clicked"][:3], [200, 172, 108], atol=3)
    assert seen["menus"] == 0
    assert seen["state"].strip() == "[(32, 24), (5, 60)] [1, 0] [[10.0, 8.0, 50.0, 40.0]]"
    assert seen["alert"] == "ValueError: nothing is there" and seen["alerts"] == 0
    assert seen["window"].strip() == "True 255.0 None"
    y, x = numpy.indices((64, 64))
    inside = int(((x - 32) ** 2 + (y - 24) ** 2 < 15**2).sum())
    assert seen["assigned"].strip() == f"[(5.0, 6.0)] {inside}"
    assert seen["pictures"] == [0]  # hidden while the widget lives
    saved = json.loads(path.read_text())
    assert "widgets" not in saved["metadata"]
    _, picture = saved["cells"][0]["outputs"]
    assert "1 click" in "".join(picture["data"]["text/plain"])  # as it was left, not as it began
    assert path.stat().st_size < 100_000
    _show_again(drive, path)


def _show_again(drive: Any, path: Path) -> None:
    """The saved notebook beside another kernel, and without any."""
    again = path.rename(path.with_name(f"again_{path.name}"))
    seen = drive("reopen.mjs", again, kernel=True)
    assert seen["canvases"] == 0 and seen["widths"][0] > 300
    saved = json.loads(again.read_text())
    saved["metadata"]["kernelspec"] = {"name": "gone", "display_name": "gone"}
    again.write_text(json.dumps(saved))
    again = again.rename(path.with_name(f"without_{path.name}"))
    seen = drive("reopen.mjs", again, kernel=False)
    assert seen["canvases"] == 0 and seen["widths"][0] > 300


def test_a_volume_is_scrolled_and_clicked(drive: Any, notebook: Any) -> None:
    path = notebook(
        "from ball import *\nw = mm.ui.segment(sam, scan)\nw",
        "print(int(w.mask.sum()))",
        "print([tuple(map(round, p)) for p in w.points], w.at)",
        ball=BALL,
    )
    seen = drive("volume.mjs", path, at=(32, 24), slice=9)
    assert seen["titles"][0] == "axial   z = 6 of 0–11   S 30.0 mm"
    # the ball, which is white, under 0.4 of #E69F00; the model may miss no pixel of its middle
    assert seen["pixel"][2] < 0.75 * seen["pixel"][0]
    assert int(seen["propagated"]) > int(seen["clicked"]) > 50
    assert seen["state"].strip() == "[(9, 24, 32)] (9, 20, 32)"
