"""What forward passes are told beyond their inputs: an adapter for each row, facts for layers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from mmadapt.core.attached import require_bank
from mmadapt.errors import AttachError, did_you_mean

if TYPE_CHECKING:
    from mmadapt.core.bank import Bank


@contextlib.contextmanager
def context(m: Any, *, rows: Sequence[str | None] | None = None, **facts: Any) -> Iterator[Any]:
    """What the forward passes inside the block are told, beyond their inputs.

    `rows`: row i of every batch runs with the attachment `rows[i]`, or bare for None. All attachments
    named must be alike (one adapter, equal hyper-parameters) and stand at `out` sites; a `weight`
    site has one weight for the whole batch. What was active is active again afterwards.

    Other keywords are facts that attached layers ask for, such as a padding `mask` (B, T), False for
    padding; they win over what the anatomy reads from the model's inputs. One that no layer asks for
    is an error.

        with mm.context(model, rows=["french", None, "german"]):
            model(batch_of_three)
    """
    from mmadapt.core.context import Context
    from mmadapt.core.rows import chosen

    _, bank = require_bank(m)
    if facts:
        _check_facts(bank, facts)
    forwards = bank.forwards
    before = forwards.given, forwards.context
    with contextlib.nullcontext() if rows is None else chosen(bank, list(rows)):
        forwards.given = {**forwards.given, **facts}
        forwards.context = Context(forwards.given)
        try:
            yield m
        finally:
            forwards.given, forwards.context = before


def asked_facts(bank: Bank) -> set[str]:
    """The facts that attached layers ask for, active or not."""
    return {
        fact for name in bank.records for _, layer in bank.layers_of(name) for fact in layer.facts
    }


def _check_facts(bank: Bank, facts: dict[str, Any]) -> None:
    asked = asked_facts(bank)
    for fact in facts:
        if fact not in asked:
            raise AttachError(
                f"no attached layer asks for the fact {fact!r}",
                did_you_mean(fact, asked) if asked else "attached layers ask for none",
            )
