"""Learning responses only, and whether examples that share a row stay apart."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from torch.nn import functional as F

from mmadapt.core.backbone import unwrap_model
from mmadapt.core.given import context
from mmadapt.errors import CheckError, DataError
from mmadapt.tasks.instruct.data import IGNORED
from mmadapt.train.flags import eval_mode

if TYPE_CHECKING:
    from torch import Tensor

APART = 1e-4  # of the largest logit; kernels of other shapes round otherwise


def response_loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Mean cross-entropy of the tokens of responses; for `mm.fit`.

    `batch` is what `Tokens.padded` or `Tokens.packed` gives; with "visual", features (N, V) or
    (N, K, V), these travel with the forward pass.
    """
    losses = token_losses(model, batch)
    return losses.sum() / (batch["labels"][:, 1:] != IGNORED).sum().clamp(min=1)


def token_losses(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Cross-entropy of every response token, and 0 elsewhere; (N, T − 1)."""
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "visual")}
    visual = batch.get("visual")
    with nullcontext() if visual is None else context(model, visual=visual):
        # with a cache transformers would let the examples of a packed row see one another
        logits = model(**inputs, use_cache=False).logits
    wanted = batch["labels"][:, 1:]
    flat = F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(),
        wanted.flatten(),
        ignore_index=IGNORED,
        reduction="none",
    )
    return flat.view_as(wanted)


def check_packing(m: Any, batch: dict[str, Tensor]) -> None:
    """Raise `CheckError` where examples of a packed row see one another, or their places in it.

    `batch` is what `Tokens.packed` gives; its first row with two examples is run whole and in parts.
    """
    model = unwrap_model(m)
    starts = (batch["position_ids"] == 0).sum(1)
    if not bool((starts > 1).any()):
        raise DataError("no row of this batch holds two examples", "pack into longer rows")
    row = int((starts > 1).nonzero()[0])
    device = next(model.parameters()).device
    ids, positions = (batch[key][row, None].to(device) for key in ("input_ids", "position_ids"))
    second = int((positions[0] == 0).nonzero()[1])
    with eval_mode(model):
        whole = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        alone = model(
            input_ids=ids[:, second:], position_ids=positions[:, second:], use_cache=False
        ).logits
    far = float((whole[:, second:] - alone).abs().max() / alone.abs().max())
    if far > APART:
        raise CheckError(
            f"{type(model).__name__} lets examples of a packed row see one another: logits of the "
            f"second change by {far:.2g} of their size with the first before them",
            "use Tokens.padded for this model, or an adapter that does not look along the tokens",
        )
