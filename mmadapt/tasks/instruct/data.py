"""Prompts and responses as token ids, in rows that are padded or packed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmadapt.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

IGNORED = -100  # the label of a token whose prediction is no concern


@dataclass(frozen=True)
class Example:
    """What is asked, and the answer wanted."""

    prompt: str
    response: str


@dataclass(frozen=True, eq=False)
class Tokens:
    """Token ids of examples, and how many at the head of each belong to the prompt.

    `cut` and `dropped` are places among the examples that were given: those whose response lost its
    end, and those of which no token of a response was left.
    """

    ids: list[list[int]]
    prompts: list[int]
    tokenizer: Any
    cut: tuple[int, ...] = ()
    dropped: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        lengths = [len(row) for row in self.ids]
        text = f"Tokens({len(self)} rows of {min(lengths)} to {max(lengths)} tokens"
        if self.cut:
            text += f"; {len(self.cut)} responses cut short, first at {self.cut[0]}"
        if self.dropped:
            text += f"; {len(self.dropped)} examples dropped, first at {self.dropped[0]}"
        return f"{text})"

    def padded(self, side: str = "right", pad: int | None = None) -> dict[str, Tensor]:
        """One example a row: input_ids, attention_mask, position_ids and labels, int64 (N, T).

        Positions start with the first real token on either side. `pad` is the id to fill with, the
        tokenizer's own without it; it is masked and never learned. Raises `DataError` where there is
        neither.
        """
        if side not in ("left", "right"):
            raise DataError(f"side is {side!r}, expected 'left' or 'right'")
        fill, longest = padding(self.tokenizer, pad), max(map(len, self.ids))
        rows = []
        for row, prompt in zip(self.ids, self.prompts, strict=True):
            free, real = longest - len(row), range(len(row))
            spare = [0] * free
            columns = (
                (row, [fill] * free),
                ([1] * len(row), spare),
                (list(real), spare),
                ([IGNORED] * prompt + row[prompt:], [IGNORED] * free),
            )
            rows.append([b + a if side == "left" else a + b for a, b in columns])
        return _tensors(("input_ids", "attention_mask", "position_ids", "labels"), rows)

    def packed(self, length: int, pad: int | None = None) -> dict[str, Tensor]:
        """Several examples a row of `length`: input_ids, position_ids and labels, int64 (N, length).

        Positions start anew with every example. That, without a mask and without a cache, is how
        models of transformers are told that examples of a row do not see one another;
        `response_loss` calls them so, and `check_packing` says whether a model keeps to it. Raises
        `DataError` for an example longer than `length`.
        """
        fill, longest = padding(self.tokenizer, pad), max(map(len, self.ids))
        if longest > length:
            raise DataError(
                f"an example has {longest} tokens, and a row {length}",
                f"packed({longest}), or encode(…, longest={length}) to cut it",
            )
        bins: list[list[int]] = []
        for place, row in enumerate(self.ids):  # the first row of the last few with room
            size = len(row)
            for one in bins[-8:]:
                if sum(len(self.ids[i]) for i in one) + size <= length:
                    one.append(place)
                    break
            else:
                bins.append([place])
        rows = []
        for one in bins:
            ids, positions, labels = [], [], []
            for place in one:
                row, prompt = self.ids[place], self.prompts[place]
                ids += row
                positions += range(len(row))
                labels += [IGNORED] * prompt + row[prompt:]
            free = length - len(ids)
            rows.append(
                [ids + [fill] * free, [*positions, *range(free)], labels + [IGNORED] * free]
            )
        return _tensors(("input_ids", "position_ids", "labels"), rows)


def encode(
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    template: str = "plain",
    longest: int | None = None,
) -> Tokens:
    """Turn examples into ids: the beginning's token, the prompt, the response, the end's token.

    `template` is "plain", "chat" for the tokenizer's own chat template, or a text with "{prompt}" in
    it, behind which the response follows. Only responses and the end are learned. Of an example with
    more than `longest` tokens the end is cut off; one of whose response nothing is left is dropped;
    both are reported. Raises `DataError` where nothing is left at all.
    """
    if not len(examples):
        raise DataError("there are no examples")
    if longest is not None and (type(longest) is not int or longest < 2):
        raise DataError(f"longest is {longest!r}, expected a whole number of at least 2")
    heads = prompt_ids(tokenizer, [one.prompt for one in examples], template)
    answers = tokenizer([one.response for one in examples], add_special_tokens=False)["input_ids"]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids, prompts, cut, dropped = [], [], [], []
    for place, (head, answer) in enumerate(zip(heads, answers, strict=True)):
        row = [*head, *answer, *end]
        if longest is not None and len(row) > longest:
            if len(head) >= longest:
                dropped.append(place)
                continue
            cut.append(place)
            row = row[:longest]
        ids.append(row)
        prompts.append(len(head))
    if not ids:
        shortest = min(map(len, heads))
        raise DataError(
            f"longest is {longest}, and the shortest prompt alone has {shortest} tokens",
            f"give at least {shortest + 2}",
        )
    return Tokens(ids, prompts, tokenizer, tuple(cut), tuple(dropped))


def prompt_ids(tokenizer: Any, prompts: Sequence[str], template: str = "plain") -> list[list[int]]:
    """The ids of prompts as the response follows them; `template` as `encode` takes it."""
    if template == "chat":
        if not getattr(tokenizer, "chat_template", None):
            raise DataError(
                f"{type(tokenizer).__name__} has no chat template",
                'set tokenizer.chat_template, or pass template="plain" or a text with "{prompt}"',
            )
        talks = [[{"role": "user", "content": prompt}] for prompt in prompts]
        texts = [
            tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
            for talk in talks
        ]
        return tokenizer(texts, add_special_tokens=False)["input_ids"]
    if template != "plain" and template.count("{prompt}") != 1:
        raise DataError(
            f"template is {template!r}",
            'expected "plain", "chat", or a text that holds "{prompt}" once',
        )
    texts = [
        prompt if template == "plain" else template.replace("{prompt}", prompt)
        for prompt in prompts
    ]
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [[*begin, *row] for row in rows]


def padding(tokenizer: Any, pad: int | None = None) -> int:
    """The id that fills rows; `DataError` where neither the tokenizer nor the caller has one."""
    if pad is None:
        pad = tokenizer.pad_token_id
    if pad is None:
        end = tokenizer.eos_token_id
        choice = (
            f"pad={end}, its end token {tokenizer.eos_token!r}" if end is not None else "pad=<id>"
        )
        raise DataError(
            f"{type(tokenizer).__name__} has no padding token",
            f"pass {choice}: padding is masked and never learned; or set tokenizer.pad_token",
        )
    return pad


def _tensors(names: tuple[str, ...], rows: list[list[list[int]]]) -> dict[str, Tensor]:
    import torch

    return {name: torch.tensor([row[column] for row in rows]) for column, name in enumerate(names)}
