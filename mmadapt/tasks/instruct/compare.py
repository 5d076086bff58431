"""Ways to teach a decoder a new wording, and what each costs what it knew."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mmadapt.adapter import Adapter, BiasScale, LlamaAdapter, LoRA, Unlock
from mmadapt.core.attach import attach, disabled
from mmadapt.core.attachment import Attachment
from mmadapt.core.backbone import unwrap_model
from mmadapt.core.table import Table, count
from mmadapt.tasks.instruct.data import Example, encode
from mmadapt.tasks.instruct.loss import response_loss
from mmadapt.tasks.instruct.score import exact_match, perplexity, tokenizer_of
from mmadapt.train.evaluation import Evaluation
from mmadapt.train.fit import fit
from mmadapt.train.history import History
from mmadapt.train.optimiser import Optimiser

_LAYERS = 4  # of tiny/llama
_TOKENS = LlamaAdapter(layers=_LAYERS)
_NORMS = Unlock(at=("text.layers[*].norm1", "text.layers[*].norm2", "text.norm"))


@dataclass(frozen=True)
class Method:
    """What is trained, None for the whole model, and the peak learning rate."""

    adapters: tuple[Adapter, ...] | None
    rate: float
    #: factor on the rate of what is neither a token nor a gate
    others: float = 1.0


METHODS: dict[str, Method] = {
    "LLaMA-Adapter": Method((_TOKENS,), 3.2e-1),
    "LLaMA-Adapter V2": Method((_NORMS, BiasScale(), _TOKENS), 1.2e-1, 0.3),
    "LoRA (q, v)": Method((LoRA(8, at=("text.layers[*].attn.q", "text.layers[*].attn.v")),), 1e-2),
    "full fine-tuning": Method(None, 1e-3),
}


@dataclass
class Result:
    """What one method reached with one seed."""

    method: str
    parameters: int
    seed: int
    #: exact match and perplexity of the new task
    new: float
    perplexity: float
    #: exact match of what the backbone was trained for, with the adaptation on, and off if it can be
    old_on: float | None
    old_off: float | None
    #: loss of the untrained attachment less that of the bare backbone
    start: float | None = None
    rate: float = 0.0
    steps: int = 0
    seconds: float = 0.0


def adapt(
    m: Any,
    method: Method,
    examples: Sequence[Example],
    *,
    name: str = "wording",
    seed: int = 0,
    steps: int = 300,
    batch: int = 24,
    rate: float | None = None,
    tokenizer: Any = None,
    watch: Callable[[Attachment], Evaluation] | None = None,
) -> tuple[Attachment | None, History, float]:
    """Attach and train on examples; the last is CPU seconds. Nothing is decayed.

    `watch` makes an evaluation of the attachment, such as a record of its gates.
    """
    started, model, peak = time.process_time(), unwrap_model(m), rate or method.rate
    data = encode(tokenizer_of(m, tokenizer), examples).padded()
    attachment = None
    if method.adapters is None:
        model.requires_grad_(True)
        groups = [{"params": list(model.parameters()), "lr": peak}]
    else:
        attachment = attach(m, list(method.adapters), name=name, seed=seed)
        named = list(attachment.named_parameters())
        own = [p for n, p in named if n.endswith((".prompt", ".gate"))]
        rest = [p for n, p in named if not n.endswith((".prompt", ".gate"))]
        groups = [{"params": own, "lr": peak}, {"params": rest, "lr": peak * method.others}]
        groups = [group for group in groups if group["params"]]
    history = fit(
        m,
        data,
        loss=response_loss,
        steps=steps,
        batch_size=batch,
        optimiser=Optimiser(build=torch.optim.AdamW(groups, weight_decay=0.0)),
        evaluation=watch(attachment) if watch is not None and attachment is not None else None,
        seed=seed,
        progress=False,
    )
    return attachment, history, time.process_time() - started


def start_difference(m: Any, method: Method, examples: Sequence[Example], seed: int = 0) -> float:
    """Loss with the untrained adapters less that without; attaches and takes them out again."""
    if method.adapters is None:
        return 0.0
    attachment = attach(m, list(method.adapters), name="untrained", seed=seed)
    batch = encode(tokenizer_of(m), examples).padded()
    with torch.no_grad():
        found = float(response_loss(unwrap_model(m), batch))
        with disabled(m):
            found -= float(response_loss(unwrap_model(m), batch))
    attachment.detach()
    return found


def finish(
    m: Any,
    name: str,
    history: History,
    new: Sequence[Example],
    old: Sequence[Example],
    **more: Any,
) -> Result:
    """Measure an adapted model on the new task and, where there is one, on the old one, on and off."""
    result = Result(
        name, history.parameters, more.pop("seed", 0), exact_match(m, new), perplexity(m, new),
        exact_match(m, old) if old else None, None, steps=len(history.losses), **more,
    )  # fmt: skip
    if old and METHODS[name].adapters is not None:
        with disabled(m):
            result.old_off = exact_match(m, old)
    return result


def bare(m: Any, new: Sequence[Example], old: Sequence[Example]) -> Result:
    """The backbone as it is."""
    before = exact_match(m, old)
    return Result("backbone", 0, 0, exact_match(m, new), perplexity(m, new), before, before)


def summary(results: Sequence[Result]) -> Table:
    """One row a method, means over its seeds, in per cent."""
    table = Table(
        ("method", "trained", "new wording %", "perplexity", "old task, on %", "off %", "seconds")
    )
    for name in dict.fromkeys(result.method for result in results):
        own = [result for result in results if result.method == name]

        def mean(what: str, own: list[Result] = own) -> float | None:
            found = [getattr(result, what) for result in own]
            return None if None in found else sum(found) / len(found)

        row: list[Any] = [name, count(own[0].parameters)]
        for what in ("new", "perplexity", "old_on", "old_off"):
            value = mean(what)
            percent = what != "perplexity"
            row.append(
                "–" if value is None else f"{100 * value:.1f}" if percent else f"{value:.3f}"
            )
        table.rows.append((*row, f"{mean('seconds'):.0f}"))
    return table
