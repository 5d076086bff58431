"""Layers of transformers that were told to recompute in backward, while the backbone evaluates.

transformers recomputes a layer only where the layer's own flag says "train". A frozen backbone
evaluates, so that what was asked for would silently not happen. Here that one flag is raised for the
question, and lowered while the layer computes, the second time too: its dropout stays off.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import nn

_FUNCTION = "_gradient_checkpointing_func"


class _Evaluating:
    """A layer's checkpointing function whose passes find the layer in eval mode, while its parts are."""

    def __init__(self, layer: nn.Module, function: Callable[..., Any]) -> None:
        self.layer = layer
        self.function = function

    def __call__(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if any(part.training for part in self.layer.children()):  # put into train mode as a whole
            return self.function(run, *args, **kwargs)

        def evaluate(*args: Any, **kwargs: Any) -> Any:
            before, self.layer.training = self.layer.training, False
            try:
                return run(*args, **kwargs)
            finally:
                self.layer.training = before

        return self.function(evaluate, *args, **kwargs)


def recompute(model: nn.Module) -> None:
    """Let layers that were told to recompute do so in eval mode; harmless when called again."""
    library: Any = sys.modules.get("transformers.modeling_layers")
    if library is None:  # then none of its layers is here
        return
    for layer in model.modules():
        if isinstance(layer, library.GradientCheckpointingLayer) and layer.gradient_checkpointing:
            function = getattr(layer, _FUNCTION)
            if not isinstance(function, _Evaluating):
                setattr(layer, _FUNCTION, _Evaluating(layer, function))
            layer.training = True


def as_before(model: nn.Module) -> None:
    """Give every layer its own checkpointing function back."""
    for layer in model.modules():
        function = layer.__dict__.get(_FUNCTION)
        if isinstance(function, _Evaluating):
            setattr(layer, _FUNCTION, function.function)
