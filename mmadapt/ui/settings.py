"""Views whose state is a few named values, each with a control, over something computed from them."""

from __future__ import annotations

from typing import Any, Generic, TypeVar, overload

from mmadapt.ui.base import View, ipywidgets

T = TypeVar("T")


class Value(Generic[T]):
    """A value of a `Settings` view: read as it is; assigned, everything is computed anew."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, view: None, owner: type) -> Value[T]: ...
    @overload
    def __get__(self, view: Settings, owner: type) -> T: ...
    def __get__(self, view: Settings | None, owner: type) -> Any:
        return self if view is None else view.values[self.name]

    def __set__(self, view: Settings, value: T) -> None:
        view.change(**{self.name: value})


class Settings(View):
    """A subclass has `_checked`, `_computed` and `_controls`, besides a view's `_text` and `figure`.

    `change(name=value)` checks all values, computes, and only then takes them: what raises changes
    nothing. Controls that are moved do the same, and stand where the values are afterwards.
    """

    #: seconds that controls have to rest before something is computed
    delay = 0.0

    def __init__(self, /, **values: Any) -> None:
        super().__init__()
        self.values: dict[str, Any] = {}
        self._controls_made: dict[str, Any] = {}
        self._output: Any = None
        self._following = False
        self.change(**values)

    def _checked(self, values: dict[str, Any]) -> dict[str, Any]:
        """The values as they are kept; raises for those without a meaning."""
        return values

    def _computed(self, values: dict[str, Any]) -> None:
        """Compute what is shown; the last thing before the values are taken."""

    def _controls(self) -> dict[str, Any]:
        """A control by the name of each value that has one; their `value` is the value."""
        raise NotImplementedError

    def _html(self) -> str:
        """What stands below the controls, while they are moved."""
        raise NotImplementedError

    def change(self, /, **values: Any) -> None:
        """Take other values, several at once."""
        with self._lock:
            wanted = self._checked({**self.values, **values})
            self._computed(wanted)
            self.values = wanted
            self._follow()
            self.changed()

    # -- the widget ---------------------------------------------------------------------------------

    def _build(self) -> Any:
        widgets = ipywidgets()
        self._controls_made = self._controls()
        self._output = widgets.HTML()
        moved = self.handler(self._moved, self.delay)
        for control in self._controls_made.values():
            control.observe(moved, "value")
        self._follow()
        return widgets.VBox([*self._controls_made.values(), self._output])

    def _moved(self, change: Any = None) -> None:
        if self._following:
            return
        found = {name: control.value for name, control in self._controls_made.items()}
        if any(found[name] != self.values[name] for name in found):
            try:
                self.change(**found)
            finally:
                self._follow()

    def _follow(self) -> None:
        """Controls stand where the values are, and what is below them is up to date."""
        if self._output is None:
            return
        self._following = True
        try:
            for name, control in self._controls_made.items():
                _put(control, self.values[name])
            # a widget's own lines are as high as its buttons
            self._output.value = f'<div style="line-height:1.35">{self._html()}</div>'
        finally:
            self._following = False

    def close(self) -> None:
        super().close()
        self._output, self._controls_made = None, {}


def _put(control: Any, value: Any) -> None:
    """A value into its control, whose range or choice grows where the value lies outside."""
    if hasattr(control, "options") and value not in [option for _, option in control.options]:
        labelled = {*control.options, (f"{value:.3g}", value)}
        control.options = sorted(labelled, key=lambda option: option[1])
    if hasattr(control, "max") and isinstance(value, (int, float)):
        control.max, control.min = max(control.max, value), min(control.min, value)
    control.value = type(control.value)(value)
