"""The zoo: a registry of backbones, readable without torch.

mm.zoo.list()            # a table of names
mm.zoo.entry("tiny/clip")
"""

from __future__ import annotations

from mmadapt.zoo.manifest import Entry, entry, list

__all__ = ["Entry", "entry", "list"]
