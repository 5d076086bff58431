"""What every verb asks first: is something attached, and which one is meant?"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from mmadapt.core.backbone import unwrap_model
from mmadapt.errors import AttachError, did_you_mean

if TYPE_CHECKING:
    from torch import nn

    from mmadapt.core.bank import Bank

#: what may name an attachment
NAME = re.compile(r"[A-Za-z0-9_-]+")


def require_bank(m: Any) -> tuple[nn.Module, Bank]:
    """The model and its bank; an error where nothing is attached."""
    from mmadapt.core.bank import bank_of

    model = unwrap_model(m)
    bank = bank_of(model)
    if bank is None:
        raise AttachError(
            f"nothing is attached to this {type(model).__name__}",
            "mmadapt.attach(model, mmadapt.Bottleneck(32)) puts an adapter in",
        )
    return model, bank


def require_name(bank: Bank, name: str | None, verb: str) -> str:
    """The name given, checked, or the only one attached."""
    if name is None:
        if len(bank.records) != 1:
            raise AttachError(
                f"{verb} needs a name: {len(bank.records)} attachments are there "
                f"({', '.join(bank.records)})",
                f"for example {verb}(model, …, name={next(iter(bank.records))!r})",
            )
        return next(iter(bank.records))
    if name not in bank.records:
        raise AttachError(f"no attachment is named {name!r}", did_you_mean(str(name), bank.records))
    return name


def check_name(name: str) -> None:
    """Raise `AttachError` where no attachment can have this name."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise AttachError(
            f"{name!r} cannot name an attachment", "use letters, digits, '_' and '-' only"
        )
    if name == "training":  # a flag of every torch module
        raise AttachError("'training' cannot name an attachment", "choose another name")
