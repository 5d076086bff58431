"""The views made of ipywidgets in real front ends: sliders, switches, and a stop that stops."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytestmark = pytest.mark.browser

SETTING = """
import torch
import mmadapt as mm
from mmadapt.core.compose import Sum
from mmadapt.tasks.few_shot.classifier import CosineHead, ZeroShotClassifier

torch.manual_seed(0)
clip = mm.load("tiny/clip")
a = mm.attach(clip, mm.Bottleneck(4, at="vision.layers[*].mlp"), name="a")
b = mm.attach(clip, mm.LoRA(2, at="vision.layers[*].mlp.up"), name="b")
mm.set_active(clip, "a")
middles = torch.randn(3, 6)
labels = torch.arange(3).repeat(8)
shots, test = (middles[labels] + 0.5 * torch.randn(24, 6) for _ in range(2))
head = CosineHead(torch.randn(3, 6), 5.0)
classifier = ZeroShotClassifier(clip, head, ("cat", "dog", "owl")).eval()


def said():
    now = mm.active(clip)
    weights = dict(zip(now.names, now.weights))
    return f"weights are {weights.get('a', 0):.2f} {weights.get('b', 0):.2f}"


def loss(model, batch):
    return model.encode_image(batch).square().mean()


pixels = torch.rand(8, 3, 32, 32)
"""


def test_sliders_move_numbers_and_stop_stops(drive: Any, notebook: Any) -> None:
    path = notebook(
        "from setting import *\nw = mm.ui.few_shot(shots, labels, test, labels, classifier)\nw",
        "print(w.residual, f'{100 * w.accuracy.accuracy:.1f} %')",
        "x = mm.ui.mix(clip, said)\nx",
        "print(mm.active(clip))",
        "t = mm.ui.inspect(clip)\nt",
        "print(t.resting == [f'vision.layers[{i}].mlp:out' for i in range(4)])",
        "run = mm.ui.live(clip, pixels, loss=loss, steps=10**8)",
        "history = run.wait()\nprint(history.interrupted, len(history.losses) > 0)",
        setting=SETTING,
    )
    seen = drive("views.mjs", path)
    residual, accuracy = seen["fewShot"].strip().split(" ", 1)
    assert float(residual) > 1.0
    assert seen["shown"].strip() == accuracy
    assert seen["mixed"].strip() == "Sum('a', 'b')"
    assert seen["resting"].strip() == "True"
    assert seen["stopped"].strip() == "True True"
    assert seen["buttons"] == 0
    saved = json.loads(path.read_text())
    assert "widgets" not in saved["metadata"]
    for cell in saved["cells"][0], saved["cells"][2], saved["cells"][4]:
        assert any("image/png" in output["data"] for output in cell["outputs"])
    frame, button = saved["cells"][6]["outputs"]
    assert "<polyline" in "".join(frame["data"]["text/html"])
    assert "".join(button["data"]["text/plain"]) == ""
    assert path.stat().st_size < 300_000
