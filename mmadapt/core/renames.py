"""Checkpoints of ours that another library renamed on writing."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import nn

    from mmadapt.core.bank import Bank


def undo_renames(bank: Bank, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    """A load pre-hook of the bank: gives tensors that were saved under other names their own.

    transformers writes a model under the names of its published files. Its patterns are made for
    the backbone and rename parts of our keys too ("layers" becomes "encoder.layer"), and its Trainer
    loads the file as it is; without this hook a resumed adapter would silently start anew.
    """
    own = {prefix + key for key in bank.state_dict()}
    strays = {key for key in state_dict if key.startswith(prefix)} - own
    if not strays:
        return
    for saved, name in _saved_names(bank.installed.root, own).items():
        if saved in strays and name not in state_dict:
            state_dict[name] = state_dict.pop(saved)


def _saved_names(root: nn.Module, names: set[str]) -> dict[str, str]:
    """Name in a file that transformers writes -> name here, for each of `names`."""
    writing = sys.modules.get("transformers.core_model_loading")
    if writing is None or not hasattr(root, "save_pretrained"):
        return {}
    marks = {name: torch.empty(0, device="meta") for name in sorted(names)}
    found = writing.revert_weight_conversion(root, dict(marks))
    back = {id(mark): name for name, mark in marks.items()}
    return {saved: back[id(mark)] for saved, mark in found.items() if id(mark) in back}
