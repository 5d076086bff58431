"""How long after the decoder's answer a click's mask is on the screen, and how fast slices scroll.

    NODE_PATH=DIR/node_modules python benchmarks/click_widget.py    # writes click_widget.json and the page

JupyterLab in headless chromium, without a GPU. The decoder is a function that answers a mask at once and
notes the time; the page notes when it has drawn, and when the next frame is done.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy
from machine import processor
from pages import fill

HERE = Path(__file__).parent
RESULTS = HERE / "click_widget.json"
PAGE = HERE.parent / "docs" / "widgets.md"
SIDE, CLICKS, SCROLLS, DEPTH = 1024, 20, 30, 300

CELLS = (
    f"""import numpy, time, json, mmadapt as mm
y, x = numpy.indices(({SIDE}, {SIDE}))
waves = numpy.sin(x / 37) + numpy.sin(y / 23)  # many parts, long outlines
answered = []
def predict(points, labels, box):
    mask = waves > 0.1 * (len(points) % 9) - 0.4
    answered.append(1000 * time.time())
    return mask
w = mm.ui.segment(predict, (60 * (waves + 2)).astype("uint8"))
w""",
    "print(json.dumps(answered))",
    f"""scan = numpy.random.default_rng(0).integers(-1000, 1000, ({DEPTH}, 512, 512), dtype="int16")
v = mm.ui.segment(mm.load("tiny/sam"), scan)
v""",
)


def measure() -> dict[str, Any]:
    """Milliseconds, medians and 90th percentiles."""
    sys.path.insert(0, str(HERE.parent / "tests" / "browser"))
    import front

    with tempfile.TemporaryDirectory() as folder:
        root, own = Path(folder) / "notebooks", Path(folder) / "jupyter"
        root.mkdir()
        own.mkdir()
        path = front.write(root / "clicks.ipynb", *CELLS)
        scenario = HERE / "click_widget.mjs"
        with front.jupyter(root, own) as base:
            seen = front.drive(base, "lab", scenario, path, clicks=CLICKS, scrolls=SCROLLS, side=DEPTH // 2)  # fmt: skip
    clicked, scrolled = seen["clicked"], seen["scrolled"]
    return {
        "machine": f"{processor()}, {os.cpu_count()} cores, others at work",
        "side": SIDE,
        "volume": [DEPTH, 512, 512],
        "decoder to drawn": _spread(clicked["answered"], clicked["drawn"]),
        "decoder to frame": _spread(clicked["answered"], clicked["framed"]),
        "click to drawn": _spread(clicked["asked"], clicked["drawn"]),
        "wheel to drawn": _spread(scrolled["asked"], scrolled["drawn"]),
        "wheel to frame": _spread(scrolled["asked"], scrolled["framed"]),
        "after 50 slices scrolled at once": round(seen["burst"]["done"] - seen["burst"]["sent"]),
    }


def _spread(start: list[float], end: list[float]) -> list[float]:
    took = numpy.array(end) - numpy.array(start)
    return [round(float(value), 1) for value in numpy.percentile(took, (50, 90))]


def table(found: dict[str, Any]) -> str:
    """Rows of a Markdown table."""
    volume = " × ".join(map(str, found["volume"][::-1]))
    rows = [
        (f"the decoder's answer to its mask drawn, {found['side']}²", "decoder to drawn"),
        ("the same, to the end of the next frame", "decoder to frame"),
        ("the click to its mask drawn, with a decoder that takes no time", "click to drawn"),
        (f"the wheel to the next slice drawn, {volume}", "wheel to drawn"),
        ("the same, to the end of the next frame", "wheel to frame"),
    ]
    lines = [f"| {what} | {found[name][0]:g} | {found[name][1]:g} |" for what, name in rows]
    head = ["| milliseconds | median | 90 % |", "|---|---:|---:|"]
    last = found["after 50 slices scrolled at once"]
    tail = (
        f"| the last of fifty turns of the wheel, without a pause, to its slice drawn | {last} | |"
    )
    return "\n".join([*head, *lines, tail, "", f"{found['machine']}."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="run nothing, only write the table")
    options = parser.parse_args()
    if not options.write:
        RESULTS.write_text(json.dumps(measure(), indent=1) + "\n")
    found = json.loads(RESULTS.read_text())
    print(table(found))
    PAGE.write_text(fill(PAGE.read_text(), {"clicks": table(found)}))


if __name__ == "__main__":
    main()
