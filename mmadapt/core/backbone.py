"""A backbone: a frozen pretrained model with what is needed to use it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmadapt.core.anatomy import Anatomy, find_anatomy
from mmadapt.errors import BackboneError

if TYPE_CHECKING:
    from torch import nn


@dataclass(eq=False)
class Backbone:
    """A model with its preprocessing, tokenizer, anatomy and zoo entry.

    `preprocess` takes one image or a sequence of images (PIL, or uint8 arrays (H, W, 3)) and
    returns float pixels (N, 3, S, S), or of sound one clip or several (`audio.Audio`) and returns an
    `audio.Batch`; `tokenize` takes texts and returns token ids (N, L), or is
    the tokenizer of transformers.
    Every mmadapt verb takes a `Backbone` or the bare model; `backbone(…)` calls the model.
    """

    model: nn.Module
    preprocess: Callable[..., Any] | None = None
    tokenize: Callable[..., Any] | None = None
    anatomy: Anatomy | None = None
    entry: Any = None

    def __post_init__(self) -> None:
        if self.anatomy is None:
            self.anatomy = find_anatomy(_module(self.model))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def __repr__(self) -> str:
        family = self.anatomy.family if self.anatomy else "?"
        count = sum(parameter.numel() for parameter in self.model.parameters())
        name = getattr(self.entry, "name", None) or type(self.model).__name__
        return f"Backbone({name}: {family}, {count / 1e6:.3g} M parameters)"

    def _repr_html_(self) -> str:
        from mmadapt.core.bank import backbone_parameters, bank_of
        from mmadapt.core.table import facts

        parameters = [parameter for _, parameter in backbone_parameters(self.model)]
        kinds = [f"{str(p.dtype).removeprefix('torch.')} on {p.device}" for p in parameters]
        assert self.anatomy is not None
        roles = [role for role in self.anatomy.roles(self.model) if not role.endswith(".bias")]
        bank = bank_of(self.model)
        given = [word for word in ("preprocess", "tokenize") if getattr(self, word) is not None]
        licence = getattr(self.entry, "licence", {}).get("weights", "")
        shown = {
            "model": type(self.model).__name__,
            "weights": ", ".join(dict.fromkeys(kinds)),
            "sites": f"{len(roles)} roles; mmadapt.sites(backbone) lists them",
            "comes with": ", ".join(given),
            "licence": licence,
            "attached": f"{', '.join(bank.records)}; active: {bank.active!r}" if bank else "",
        }
        return facts(repr(self), shown)._repr_html_()


def _module(model: Any) -> nn.Module:
    from torch import nn

    if not isinstance(model, nn.Module):
        raise BackboneError(
            f"expected a Backbone or a torch.nn.Module, got {type(model).__name__}",
            'load one with mmadapt.load("tiny/clip"), or pass your own model',
        )
    return getattr(model, "_orig_mod", model)  # torch.compile wraps the model it was given


def unwrap(m: Any) -> tuple[nn.Module, Anatomy, Any]:
    """(model, anatomy, zoo entry or None) of a backbone or of any module with a known anatomy."""
    if isinstance(m, Backbone):
        assert m.anatomy is not None
        return m.model, m.anatomy, m.entry
    model = _module(m)
    bank = getattr(model, "_mmadapt", None)
    if bank is not None:
        return model, bank.anatomy, bank.entry
    return model, find_anatomy(model), None


def unwrap_model(m: Any) -> nn.Module:
    """The bare model, whether or not its anatomy is known."""
    return m.model if isinstance(m, Backbone) else _module(m)
