"""Answers shown while they are made, in a notebook or a terminal."""

from __future__ import annotations

import html
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch

from mmadapt.core.attach import disabled
from mmadapt.core.attached import require_bank
from mmadapt.core.backbone import unwrap_model
from mmadapt.tasks.instruct.data import padding, prompt_ids
from mmadapt.tasks.instruct.score import LONGEST, answering, tokenizer_of
from mmadapt.train.progress import in_notebook

if TYPE_CHECKING:
    from torch import Tensor

#: takes the answer so far, whole
Show = Callable[[str], None]


class Pieces:
    """What `generate` hands new tokens to: decodes them and shows the answer so far.

    Letters of several bytes appear when their last byte is there.
    """

    def __init__(self, tokenizer: Any, show: Show) -> None:
        self.tokenizer, self.show = tokenizer, show
        self.ids: list[int] = []
        self.text, self.begun = "", False

    def put(self, value: Tensor) -> None:
        if not self.begun:  # the prompt comes first
            self.begun = True
            return
        self.ids += value.flatten().tolist()
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        if not text.endswith("\ufffd") and text != self.text:
            self.text = text
            self.show(text)

    def end(self) -> None:
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        if text != self.text:
            self.text = text
            self.show(text)


def stream(
    m: Any,
    prompt: str,
    *,
    tokenizer: Any = None,
    template: str = "plain",
    visual: Tensor | None = None,
    longest: int = LONGEST,
    pad: int | None = None,
    show: Show | None = None,
    **options: Any,
) -> str:
    """Answer one prompt, showing it piece by piece, and return the whole answer.

    Greedy unless `options` of transformers' `generate` say otherwise, such as `do_sample=True,
    temperature=0.1`. `show` is given the answer so far, whole, after every piece; without it a
    notebook updates one output in place and a terminal is written to.
    """
    tokenizer, model = tokenizer_of(m, tokenizer), cast(Any, unwrap_model(m))
    shown = show or (_Notebook(prompt) if in_notebook() else _Terminal())
    pieces = Pieces(tokenizer, shown)
    ids = torch.tensor(
        prompt_ids(tokenizer, [prompt], template), device=next(model.parameters()).device
    )
    with answering(m, visual):
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=longest,
            pad_token_id=padding(tokenizer, pad),
            streamer=pieces,
            **{"do_sample": False, **options},
        )
    if isinstance(shown, _Terminal):
        shown.end()
    return pieces.text


def stream_both(m: Any, prompt: str, *, show: Show | None = None, **how: Any) -> tuple[str, str]:
    """Answer a prompt with what is attached off, then on, both in sight; returns (off, on)."""
    require_bank(m)
    texts = {"adapter off": "", "adapter on": ""}
    notebook = _Notebook() if show is None and in_notebook() else None

    def display(which: str) -> Show:
        if show is None and notebook is None:
            return _Terminal(f"{which}: ")

        def update(text: str) -> None:
            texts[which] = text
            if notebook is not None:
                notebook.rows(prompt, texts)
            elif show is not None:
                show("\n".join(f"{name}: {one}" for name, one in texts.items()))

        return update

    with disabled(m):
        off = stream(m, prompt, show=display("adapter off"), **how)
    return off, stream(m, prompt, show=display("adapter on"), **how)


class _Terminal:
    """Writes what is new of an answer."""

    def __init__(self, head: str = "") -> None:
        self.written = 0
        sys.stdout.write(head)

    def __call__(self, text: str) -> None:
        sys.stdout.write(text[self.written :])
        sys.stdout.flush()
        self.written = len(text)

    def end(self) -> None:
        """Close the line."""
        sys.stdout.write("\n")
        sys.stdout.flush()


class _Notebook:
    """One output of a notebook, replaced at every piece."""

    def __init__(self, prompt: str = "") -> None:
        self.prompt, self.handle = prompt, None

    def __call__(self, text: str) -> None:
        self.rows(self.prompt, {"": text})

    def rows(self, prompt: str, texts: dict[str, str]) -> None:
        from IPython.display import display

        value = _Shown(prompt, dict(texts))
        if self.handle is None:
            self.handle = display(value, display_id=True)
        else:
            self.handle.update(value)


class _Shown:
    """A prompt and its answers, rich and plain."""

    def __init__(self, prompt: str, texts: dict[str, str]) -> None:
        self.prompt, self.texts = prompt, texts

    def __repr__(self) -> str:
        return "\n".join(
            f"{name + ': ' if name else ''}{self.prompt}{text}" for name, text in self.texts.items()
        )

    def _repr_html_(self) -> str:
        lines = [
            f"<div><small>{html.escape(name)}</small> <code>{html.escape(self.prompt)}<b>"
            f"{html.escape(text)}</b></code></div>"
            for name, text in self.texts.items()
        ]
        return "".join(lines)
