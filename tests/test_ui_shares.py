"""`mm.ui.contribution`: what sites contribute over patches, under tokens, along time."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
import torch
from backbones import BACKBONES, IMAGE, pixels
from snapshot import randomise
from torch import nn

import mmadapt as mm
from mmadapt.core.contribution import Contribution
from mmadapt.core.site import Span


def adapted(name: str) -> nn.Module:
    model = BACKBONES[name].fresh()
    randomise(mm.attach(model, mm.Bottleneck(4), name="a"))
    return model


def images(count: int) -> list[numpy.ndarray]:
    return [numpy.full((IMAGE, IMAGE, 3), 40 * row, numpy.uint8) for row in range(count)]


def test_patches_lie_over_the_image_of_the_row() -> None:
    w = mm.ui.contribution(adapted("open_clip_vision"), pixels(3), images(3))
    assert w.rows == 3
    w.row = 2
    figure = w.figure()
    panels = [axes for axes in figure.axes if axes.get_title()]
    assert [axes.get_title() for axes in panels] == [f"vision.layers[{i}].mlp" for i in range(2)]
    for axes, site in zip(panels, w.found.shares, strict=True):
        picture, heat = axes.images
        assert float(numpy.asarray(picture.get_array()).max()) == 80
        assert numpy.allclose(heat.get_array(), w.found.grid(site)[2])
        assert picture.get_extent() == heat.get_extent()
    assert len({axes.images[-1].get_clim() for axes in panels}) == 1


def test_without_images_patches_are_pictures_of_their_own() -> None:
    w = mm.ui.contribution(adapted("open_clip_vision"), pixels(1))
    (heat,) = w.figure().axes[0].images
    assert heat.get_alpha() == 1.0


def test_tokens_stand_under_their_columns() -> None:
    ids = torch.arange(5)[None] + 1
    w = mm.ui.contribution(adapted("hf_llama"), {"input_ids": ids}, tokens=[["a", " b", "\n", "d", ""]])  # fmt: skip
    axes = w.figure().axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "␣b", "⏎", "d", "∅"]
    values = numpy.asarray(axes.images[0].get_array())
    expected = numpy.stack([share[0].numpy() for share in w.found.shares.values()])
    assert numpy.allclose(values, expected)


def made(shapes: dict[str, tuple[int, ...]]) -> Contribution:
    shares = {site: torch.rand(shape) for site, shape in shapes.items()}
    return Contribution(shares, {site: Span("x") for site in shares}, {s: (s,) for s in shares})


def test_frames_lie_along_seconds() -> None:
    from mmadapt.ui.shares import SharesView

    w = SharesView(made({"audio.layers[0].mlp:out": (2, 50)}), seconds=[1.5, 2.0])
    w.row = 1
    axes = w.figure().axes[0]
    assert axes.get_xlim() == (0, 2.0)
    assert axes.get_xlabel() == "seconds"


def test_many_sites_are_shown_by_some_the_first_and_last_among_them() -> None:
    from mmadapt.ui.shares import SharesView

    w = SharesView(made({f"layers[{i}].mlp:out": (1, 4) for i in range(2000)}))
    labels = [label.get_text() for label in w.figure().axes[0].get_yticklabels()]
    assert len(labels) == 48
    assert (labels[0], labels[-1]) == ("layers[0].mlp", "layers[1999].mlp")
    assert len(w._html()) < 300_000


def test_the_slider_chooses_the_row() -> None:
    w = mm.ui.contribution(adapted("open_clip_vision"), pixels(3), images(3))
    slider, shown = w.widget.children[0].children
    before = shown.value
    slider.set_state({"value": 1})
    assert w.row == 1
    assert shown.value != before
    assert "mean share" in shown.value
    (only,) = mm.ui.contribution(adapted("open_clip_vision"), pixels(1)).widget.children[0].children
    assert "mean share" in only.value


@pytest.mark.parametrize("row", [3, -1, "1"])
def test_a_row_that_is_not_there_is_refused(row: Any) -> None:
    w = mm.ui.contribution(adapted("open_clip_vision"), pixels(3))
    with pytest.raises(mm.errors.DataError, match="expected 0 to 2"):
        w.row = row
    assert w.row == 0


def test_too_few_images_or_tokens_are_refused() -> None:
    model = adapted("open_clip_vision")
    with pytest.raises(mm.errors.DataError, match="1 images for 2 rows of the batch"):
        mm.ui.contribution(model, pixels(2), images(1))
    with pytest.raises(mm.errors.DataError, match="0 tokens for 2 rows"):
        mm.ui.contribution(model, pixels(2), tokens=[])
    with pytest.raises(mm.errors.DataError, match="1 seconds for 2 rows"):
        mm.ui.contribution(model, pixels(2), seconds=[1.5])


@pytest.mark.parametrize(
    "image",
    [
        numpy.random.rand(IMAGE, IMAGE),
        numpy.ones((IMAGE, IMAGE), bool),
        numpy.random.randint(-5, 5, (IMAGE, IMAGE, 3)).astype(numpy.int16),
        torch.rand(3, IMAGE, IMAGE),
        torch.rand(IMAGE, IMAGE).half(),
    ],
)
def test_images_of_any_numbers_are_drawn(image: Any) -> None:
    w = mm.ui.contribution(adapted("open_clip_vision"), pixels(1), [image])
    assert w._repr_mimebundle_()["image/png"][:4] == b"\x89PNG"


def test_what_is_no_image_is_refused_with_its_shape() -> None:
    w = mm.ui.contribution(adapted("open_clip_vision"), pixels(1), [numpy.array(["x"])])
    with pytest.raises(mm.errors.DataError, match=r"an image is \(1,\) of <U1"):
        w.figure()


def test_a_pass_that_fails_raises_at_once() -> None:
    with pytest.raises(Exception, match="size|shape|dimension|Expected|expected"):
        mm.ui.contribution(adapted("open_clip_vision"), torch.rand(2, 5))
