"""What every widget shares: pictures, errors, debounced callbacks, and an end."""

from __future__ import annotations

import asyncio
import gc
import sys
from types import SimpleNamespace
from typing import Any

import ipywidgets
import pytest

from mmadapt.errors import DataError, MissingDependencyError
from mmadapt.ui import base
from mmadapt.ui.base import View


class Square(View):
    """A number and its square."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 3
        self.drawn = 0

    def _text(self) -> str:
        return f"{self.number}² = {self.number**2}"

    def figure(self) -> Any:
        from matplotlib.figure import Figure

        self.drawn += 1
        figure = Figure((2, 1))
        figure.text(0.1, 0.5, self._text())
        return figure

    def _build(self) -> Any:
        self.slider = ipywidgets.IntSlider(self.number)
        self.slider.observe(self.handler(self._moved), "value")
        return self.slider

    def _moved(self, change: Any) -> None:
        if change.new == 13:
            raise DataError("13 has no square <here>", "take 14")
        if change.new == 17:
            raise KeyboardInterrupt
        self.number = change.new


def living() -> int:
    """How many widgets ipywidgets keeps."""
    return len(ipywidgets.widgets.widget._instances)


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What a notebook would be sent: bundles, and the updates of pictures."""
    import IPython.display

    sent: list[Any] = []

    def display(bundle: Any, raw: bool, display_id: bool = False) -> Any:
        sent.append(bundle)
        return SimpleNamespace(update=lambda bundle, raw: sent.append(("update", bundle)))

    monkeypatch.setattr(base, "in_notebook", lambda: True)
    monkeypatch.setattr(IPython.display, "display", display)
    return sent


def test_a_view_has_a_picture_and_a_text_without_a_notebook() -> None:
    view = Square()
    bundle = view._repr_mimebundle_()
    assert bundle["text/plain"] == repr(view) == "3² = 9"
    assert bundle["image/png"].startswith(b"\x89PNG")
    assert base.WIDGET not in bundle
    with pytest.raises(NotImplementedError):  # IPython then asks for the bundle
        view._ipython_display_()


def test_a_notebook_gets_the_widget_and_then_the_picture(notebook: list[Any]) -> None:
    view = Square()
    view._ipython_display_()
    live, still = notebook
    assert live[base.WIDGET]["model_id"] == view.widget.model_id
    assert set(still) == {"text/plain", "image/png"}


def test_colab_gets_one_bundle(notebook: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "google.colab", SimpleNamespace())
    view = Square()
    with pytest.raises(NotImplementedError):
        view._ipython_display_()
    assert set(view._repr_mimebundle_()) == {"text/plain", "image/png", base.WIDGET}
    assert notebook == []


def test_the_saved_picture_follows_what_the_page_does(notebook: list[Any]) -> None:
    view = Square()
    view._ipython_display_()
    view.slider.set_state({"value": 5})  # as a front end would
    word, still = notebook[-1]
    assert word == "update" and still["text/plain"] == "5² = 25"


def test_the_picture_is_drawn_once_after_many_changes(
    notebook: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "SETTLED", 0.01)
    view = Square()
    view._ipython_display_()

    async def moved() -> None:
        for number in range(4, 12):
            view.slider.set_state({"value": number})
        assert view.drawn == 1
        await asyncio.sleep(0.05)

    asyncio.run(moved())
    assert view.drawn == 2 and notebook[-1][1]["text/plain"] == "11² = 121"


def test_an_error_is_shown_in_the_widget_and_kept_until_something_works() -> None:
    view = Square()
    line = view.widget.children[1]
    assert line.layout.display == "none"
    view.slider.set_state({"value": 13})
    assert isinstance(view.error, DataError) and view.number == 3
    assert "13 has no square &lt;here&gt;" in line.value and "Next: take 14" in line.value
    assert line.layout.display == ""
    view.slider.set_state({"value": 14})
    assert view.error is None and view.number == 14
    assert line.value == "" and line.layout.display == "none"


def test_an_interrupt_ends_what_runs_and_not_the_kernel() -> None:
    view = Square()
    view.widget  # noqa: B018
    view.slider.set_state({"value": 17})
    assert isinstance(view.error, KeyboardInterrupt) and view.number == 3
    assert "interrupted" in view.widget.children[1].value


def test_a_picture_that_cannot_be_drawn_is_said_in_the_widget(
    notebook: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    view = Square()
    view._ipython_display_()
    monkeypatch.setattr(view, "figure", lambda: 1 / 0)
    view.slider.set_state({"value": 4})
    assert "ZeroDivisionError" in view.widget.children[1].value
    assert view.number == 4 and len(notebook) == 2


def test_calls_that_follow_each_other_run_once_with_the_last_arguments() -> None:
    seen: list[int] = []
    call = base.debounced(seen.append, 0.01)
    call(1)
    assert seen == [1]  # no event loop, nothing to wait for

    async def many() -> None:
        for number in range(2, 9):
            call(number)
        assert seen == [1]
        await asyncio.sleep(0.05)

    asyncio.run(many())
    assert seen == [1, 8]


def test_a_view_that_nobody_holds_leaves_no_widget_behind() -> None:
    gc.collect()
    before = living()
    view = Square()
    slider = view.widget.children[0]
    assert living() > before
    del view
    gc.collect()
    assert living() == before
    slider.value = 7  # its callbacks are there and do nothing


def test_a_closed_view_keeps_its_state_and_can_be_shown_again() -> None:
    gc.collect()
    before = living()
    view = Square()
    view.widget  # noqa: B018
    view.slider.value = 6
    view.close()
    assert living() == before and view.number == 6
    assert view.widget.children[0].value == 6
    view.close()


def test_without_ipywidgets_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    view = Square()
    assert repr(view) == "3² = 9" and view._repr_mimebundle_()["image/png"]
    with pytest.raises(MissingDependencyError, match="pip install ipywidgets"):
        view.widget  # noqa: B018
