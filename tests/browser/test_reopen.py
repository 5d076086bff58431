from __future__ import annotations

import json
from typing import Any

import pytest
from test_segment import DISC

pytestmark = pytest.mark.browser


def test_reopen(drive: Any, notebook: Any) -> None:
    path = notebook(
        "from disc import *\nw = mm.ui.segment(predict, image)\nw",
        "print([(round(x), round(y)) for x, y in w.points], w.labels, numpy.rint(w.boxes).tolist())",
        "w.points = [(5, 6)]\nprint(w.points, int(w.mask.sum()))",
        disc=DISC,
    )
    drive("segment.mjs", path, at=(32, 24), beside=(5, 60), box=(10, 8, 50, 40))
    path = path.rename(path.with_name("re" + path.name))
    print(drive("reopen.mjs", path, kernel=True, shot="fresh"))
    n = json.loads(path.read_text())
    n["metadata"]["kernelspec"] = {"name": "gone", "display_name": "gone"}
    path.write_text(json.dumps(n))
    path = path.rename(path.with_name("re" + path.name))
    print(drive("reopen.mjs", path, kernel=False, shot="nokernel"))
