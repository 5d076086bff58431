"""The look of figures and of small pictures in HTML."""

from __future__ import annotations

import math
import pickle
import re
import subprocess
import sys

import numpy
import pytest
from matplotlib import rc_context, rcParams
from matplotlib.figure import Figure

from mmadapt.core.figure import INK, LINES, cells, drawn, img, new_figure, png
from mmadapt.core.svg import bars_svg, curve_svg, wave_svg


@drawn
def some_figure() -> Figure:
    figure = new_figure(3, 2)
    axes = figure.add_subplot()
    axes.plot([1, 2], [3, 4])
    axes.plot([1, 2], [4, 3])
    axes.set_xlabel("step")
    axes.set_title("title")
    return figure


def _look(figure: Figure) -> tuple:
    axes = figure.axes[0]
    return (
        [line.get_color() for line in axes.lines],
        axes.xaxis.label.get_color(),
        axes.title.get_color(),
        figure.get_facecolor(),
        axes.spines["top"].get_visible(),
    )


def test_figures_look_alike_whatever_the_users_own_style_is() -> None:
    expected = _look(some_figure())
    before = {name: value for name, value in rcParams.items() if name != "backend"}
    assert expected[0] == list(LINES[:2])
    assert expected[1] == INK
    some_figure()
    assert before == {name: rcParams[name] for name in before}
    with rc_context():
        from matplotlib import pyplot

        pyplot.style.use("dark_background")
        assert _look(some_figure()) == expected
        data = png(some_figure())
    assert data == png(some_figure())


def test_a_notebook_shows_a_figure_without_any_magic() -> None:
    script = (
        "import sys\n"
        "from IPython.core.formatters import DisplayFormatter\n"
        "from mmadapt.core.figure import new_figure\n"
        "data, _ = DisplayFormatter().format(new_figure(2, 1))\n"
        "assert data['image/png'][:4] == b'\\x89PNG', data\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_figure_can_be_pickled() -> None:
    copied = pickle.loads(pickle.dumps(some_figure()))
    assert copied._repr_png_()[:4] == b"\x89PNG"


def _contrast(one: str, other: str) -> float:
    """WCAG 2.1's ratio of luminances."""

    def luminance(colour: str) -> float:
        parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_what_is_drawn_on_pages_stands_out_on_white_and_on_dark() -> None:
    for page in ("#ffffff", "#111111"):
        for colour in LINES[:3]:
            assert _contrast(colour, page) > 3.0, (colour, page)
    assert _contrast(INK, "#ffffff") > 7


def test_cells_write_what_there_is_room_for() -> None:
    figure = new_figure(3, 2)
    axes = figure.add_subplot()
    values = numpy.array([[0.0, 1.0], [math.nan, 0.5]])
    image = cells(axes, values, ["a", "b"], ["c", "d"], "share", (0, 1), write=".1f")
    assert [text.get_text() for text in axes.texts] == ["0.0", "1.0", "0.5"]
    assert [text.get_color() for text in axes.texts][:2] == [INK, "white"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]
    assert image.get_clim() == (0, 1)
    assert figure.axes[1].get_ylabel() == "share"
    many = new_figure(3, 2).add_subplot()
    cells(many, numpy.zeros((30, 30)), write=".1f")
    assert not many.texts


def test_a_picture_in_html_has_words_for_those_who_do_not_see_it() -> None:
    shown = img(png(some_figure()), 'a "figure" <of> two')
    assert 'alt="a &quot;figure&quot; &lt;of&gt; two"' in shown
    assert "data:image/png;base64,iVBOR" in shown


# -- SVG --------------------------------------------------------------------------------------------


def test_a_curve_has_its_range_and_its_ends_and_the_pages_colour() -> None:
    shown = curve_svg([2.0, math.nan, 1.0, 0.5], label="loss <a>")
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", shown)
    assert texts == ["loss &lt;a&gt; 2", "0.5", "1", "step 4"]
    assert 'fill="currentColor"' in shown
    assert "background" not in shown
    (points,) = re.findall(r'points="([^"]*)"', shown)
    places = [tuple(map(float, point.split(","))) for point in points.split()]
    assert [x for x, _ in places] == pytest.approx([1, 1 + 358 * 2 / 3, 359], abs=0.1)
    heights = [y for _, y in places]
    assert heights == sorted(heights)  # it falls, and y grows downwards


@pytest.mark.parametrize("values", [[], [1.0], [math.inf, 1.0], [math.nan] * 5])
def test_a_curve_of_fewer_than_two_numbers_is_nothing(values: list[float]) -> None:
    assert curve_svg(values) == ""


def test_a_long_curve_has_at_most_a_point_a_pixel() -> None:
    (points,) = re.findall(r'points="([^"]*)"', curve_svg([float(i) for i in range(100_000)]))
    assert 300 < len(points.split()) <= 360


def test_bars_are_as_high_as_their_values() -> None:
    heights = [float(h) for h in re.findall(r'height="([\d.]+)"/>', bars_svg([1.0, 0.5, 0.0]))]
    assert heights == [16.0, 8.0, 0.0]
    assert bars_svg([0.0, math.nan]).count("<rect") == 2
    assert bars_svg([1.0] * 2000).count("<rect") <= 60


def test_a_wave_has_its_length() -> None:
    assert "1.50 s" in wave_svg([-0.5, -1.0], [0.5, 2.0], 1.5)
