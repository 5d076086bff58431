"""Answers by greedy decoding, how many are exactly right, and how well responses were expected."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch

from mmadapt.core.attach import disabled
from mmadapt.core.attached import require_bank
from mmadapt.core.backbone import Backbone, unwrap_model
from mmadapt.core.given import context
from mmadapt.core.table import Table
from mmadapt.errors import DataError
from mmadapt.tasks.instruct.data import Example, encode, padding, prompt_ids
from mmadapt.tasks.instruct.loss import token_losses
from mmadapt.train.flags import eval_mode

if TYPE_CHECKING:
    from torch import Tensor

BATCH = 128
LONGEST = 64  # new tokens


def tokenizer_of(m: Any, tokenizer: Any = None) -> Any:
    """The tokenizer that was given, or the backbone's own; `DataError` without one."""
    found = tokenizer or (m.tokenize if isinstance(m, Backbone) else None)
    if found is None or not hasattr(found, "decode"):
        raise DataError(
            f"there is no tokenizer with {type(unwrap_model(m)).__name__}",
            "pass tokenizer=, for example transformers.AutoTokenizer.from_pretrained(folder)",
        )
    return found


def answers(
    m: Any,
    prompts: Sequence[str],
    *,
    tokenizer: Any = None,
    template: str = "plain",
    visual: Tensor | None = None,
    longest: int = LONGEST,
    pad: int | None = None,
) -> list[str]:
    """What the model answers, by greedy decoding with a cache, padded on the left.

    `visual`, (N, V) or (N, K, V), are features for the adapter, a row a prompt. An answer ends at the
    end's token or after `longest` tokens; special tokens are left out.
    """
    tokenizer, model = tokenizer_of(m, tokenizer), cast(Any, unwrap_model(m))
    fill, found = padding(tokenizer, pad), []
    device = next(model.parameters()).device
    for start in range(0, len(prompts), BATCH):
        rows = prompt_ids(tokenizer, prompts[start : start + BATCH], template)
        width = max(map(len, rows))
        ids = torch.tensor([[fill] * (width - len(row)) + row for row in rows], device=device)
        real = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows], device=device)
        with answering(m, None if visual is None else visual[start : start + BATCH]):
            out = model.generate(
                input_ids=ids,
                attention_mask=real,
                max_new_tokens=longest,
                do_sample=False,
                pad_token_id=fill,
            )
        found += tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
    return found


@contextmanager
def answering(m: Any, visual: Tensor | None = None) -> Iterator[None]:
    """Eval mode without gradients, and features for the adapter where there are any."""
    model = unwrap_model(m)
    seen = None if visual is None else visual.to(next(model.parameters()).device)
    told = nullcontext() if seen is None else context(m, visual=seen)
    with eval_mode(model), told:
        yield


def exact_match(m: Any, examples: Sequence[Example], **how: Any) -> float:
    """The part of examples whose answer is the response, to the letter; `how` as `answers` takes it."""
    if "longest" not in how:  # one more than the longest response shows that it ends there
        tokens = tokenizer_of(m, how.get("tokenizer"))(
            [one.response for one in examples], add_special_tokens=False
        )["input_ids"]
        how["longest"] = max(map(len, tokens)) + 1
    found = answers(m, [one.prompt for one in examples], **how)
    right = [a == one.response for a, one in zip(found, examples, strict=True)]
    return sum(right) / len(right)


def perplexity(
    m: Any,
    examples: Sequence[Example],
    *,
    tokenizer: Any = None,
    template: str = "plain",
    visual: Tensor | None = None,
    pad: int | None = None,
) -> float:
    """Of a token of the responses and their ends, exp(mean −log p)."""
    tokenizer, model = tokenizer_of(m, tokenizer), unwrap_model(m)
    total, count = 0.0, 0
    device = next(model.parameters()).device
    for start in range(0, len(examples), BATCH):
        batch = encode(tokenizer, examples[start : start + BATCH], template=template)
        tensors = {k: v.to(device) for k, v in batch.padded(pad=pad).items()}
        with answering(m, None if visual is None else visual[start : start + BATCH]):
            total += float(token_losses(model, tensors).double().sum())
        count += sum(map(len, batch.ids)) - sum(batch.prompts)
    return math.exp(total / count)


def on_and_off(m: Any, tasks: dict[str, Sequence[Example]], **how: Any) -> Table:
    """Exact match and perplexity of every task by name, with what is attached on and off."""
    require_bank(m)
    table = Table(
        (
            "task",
            "examples",
            "exact match, on",
            "exact match, off",
            "perplexity, on",
            "perplexity, off",
        )
    )
    for name, examples in tasks.items():
        found = [(exact_match(m, examples, **how), perplexity(m, examples, **how))]
        with disabled(m):
            found.append((exact_match(m, examples, **how), perplexity(m, examples, **how)))
        (match_on, expected_on), (match_off, expected_off) = found
        row = (match_on, match_off, expected_on, expected_off)
        table.rows.append((name, len(examples), *row))
    return table


def side_by_side(
    m: Any, examples: Sequence[Example | str], *, visual: Tensor | None = None, **how: Any
) -> Table:
    """What the model answers with what is attached on and off, and what was wanted where it is known."""
    require_bank(m)
    prompts = [one if isinstance(one, str) else one.prompt for one in examples]
    on = answers(m, prompts, visual=visual, **how)
    with disabled(m):
        off = answers(m, prompts, visual=visual, **how)
    wanted = [None if isinstance(one, str) else one.response for one in examples]
    table = Table(("prompt", "adapter off", "adapter on", "wanted"))
    table.rows = list(zip(map(repr, prompts), off, on, wanted, strict=True))
    return table
