"""Compiled code and hooks: in which order it sees them, and when it must be dropped."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.hooks import RemovableHandle

_was_reset = False


def reset_compiled_code() -> None:
    """Compiled code does not see new hooks; drop it, where dynamo has been in use at all."""
    global _was_reset
    _was_reset = compiled_code_exists()
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


def compiled_code_exists() -> bool:
    """Whether a forward pass may have run in compiled code, which leaves no note in `Forwards`."""
    frames = sys.modules.get("torch._dynamo.convert_frame")
    return _was_reset or getattr(frames, "FRAME_COUNTER", 0) > 0


def first_before(module: nn.Module, hook: Any) -> RemovableHandle:
    """A forward pre-hook (module, args, kwargs) in front of those there are."""
    handle = module.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)
    _reorder(module._forward_pre_hooks)
    return handle


def first_after(module: nn.Module, hook: Any) -> RemovableHandle:
    """A forward hook (module, args, kwargs, output) in front of those there are."""
    handle = module.register_forward_hook(hook, prepend=True, with_kwargs=True)
    _reorder(module._forward_hooks)
    return handle


def _reorder(hooks: dict[int, Any]) -> None:
    """torch.compile finds hooks by the order they were inserted in, which `prepend` does not change."""
    ordered = list(hooks.items())
    hooks.clear()
    hooks.update(ordered)
