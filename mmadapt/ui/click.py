"""Clicks on images and volumes."""

from __future__ import annotations

from typing import Any


def segment(model: Any, picture: Any) -> Any:
    """Segment an image or a volume by clicks and boxes."""
    raise NotImplementedError
