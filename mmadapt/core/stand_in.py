"""Standing in for a module's forward: the only way to skip its call or to make it twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


class StandIn:
    """An instance attribute in place of a module's `forward`, from when it is made until `remove`.

    A call becomes `act(own, args, kwargs)`, where `own` is the forward that was there before.
    """

    def __init__(self, module: nn.Module, act: Callable[..., Any]) -> None:
        self.module = module
        self.act = act
        self.before: Callable[..., Any] | None = module.__dict__.get("forward")
        module.__dict__["forward"] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.act(self.own, args, kwargs)

    #: torch.export asks a forward where it was written
    __code__ = __call__.__code__

    def own(self, *args: Any, **kwargs: Any) -> Any:
        """The forward that was there before."""
        if self.before is not None:
            return self.before(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

    def remove(self) -> None:
        """Give the module its forward back; one that has been wrapped since passes calls on."""
        if self.module.__dict__.get("forward") is self:
            del self.module.__dict__["forward"]
            if self.before is not None:
                self.module.__dict__["forward"] = self.before
        self.act = _pass_on


def _pass_on(own: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
    return own(*args, **kwargs)
