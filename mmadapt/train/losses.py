"""What `fit` minimises when no loss is given: the one the model computes itself."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mmadapt.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor


def model_loss(model: Any, batch: Any) -> Tensor:
    """`model(**batch).loss`, for models of transformers and those that do alike.

    Raises `DataError` that names the keys where the batch and the model do not fit together.
    """
    if not isinstance(batch, Mapping):
        raise DataError(
            f"without loss= a batch is passed as model(**batch); this one is a {type(batch).__name__}",
            "yield dictionaries, or pass loss=, a function loss(model, batch)",
        )
    name, keys = type(model).__name__, ", ".join(map(str, batch)) or "none"
    expected = _expected(model)
    main = getattr(model, "main_input_name", None)
    missing = [key for key, needed in expected.items() if needed and key not in batch]
    if isinstance(main, str) and main in expected and main not in batch:
        if not {"inputs_embeds", "encoder_outputs"} & set(batch):
            missing.append(main)
    if missing:
        raise DataError(
            f"the batch lacks {', '.join(dict.fromkeys(missing))}, which {name}.forward needs; its "
            f"keys: {keys}",
            "rename the keys of the batch, or pass loss=, a function loss(model, batch)",
        )
    unknown = [key for key in batch if expected and key not in expected]
    if unknown and not _takes_any(model):
        raise DataError(
            f"{name}.forward takes no {', '.join(map(str, unknown))}; it takes "
            f"{', '.join(expected)}",
            "drop or rename these keys of the batch, or pass loss=, a function loss(model, batch)",
        )
    value = getattr(model(**batch), "loss", None)
    if value is None:
        raise DataError(
            f"{name} returned no loss; the batch has the keys {keys}",
            "most models compute one when the batch holds 'labels'; else pass loss=, a function "
            "loss(model, batch)",
        )
    return value


def _parameters(model: Any) -> list[inspect.Parameter]:
    return list(inspect.signature(model.forward).parameters.values())


def _expected(model: Any) -> dict[str, bool]:
    """Keyword -> whether it has to be there."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {p.name: p.default is p.empty for p in _parameters(model) if p.kind in named}


def _takes_any(model: Any) -> bool:
    return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in _parameters(model))
