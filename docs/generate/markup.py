"""Pieces of Markdown, and docstrings as Markdown."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Sequence
from typing import Any

_BAR = re.compile(r"(`[^`]*`)|\|")
_PAPER = re.compile(r"arXiv:(\d{4}\.\d{4,5})")


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], right: Sequence[int] = ()) -> str:
    """A Markdown table; the columns whose places are in `right` stand to the right."""
    bars = ["---:" if place in right else "---" for place in range(len(columns))]
    lines = [columns, bars, *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(value: Any) -> str:
    text = f"{value:,}" if isinstance(value, int) else str(value)
    return _BAR.sub(lambda found: found[0] if found[1] else "\\|", text.replace("\n", " "))


def code(value: Any) -> str:
    """Something as it is typed, within a line."""
    return f"`{value}`"


def block(text: str, language: str = "text") -> str:
    """Something as it is typed, on lines of its own."""
    return f"```{language}\n{text.strip()}\n```"


def runnable(example: str) -> str:
    """An example with the imports that it takes for granted."""
    names = {"torch": "import torch", "transformers": "import transformers"}
    lines = [line for name, line in names.items() if f"{name}." in example]
    own, _, body = example.partition("\n\n") if example.startswith("from ") else ("", "", example)
    parts = ("\n".join(lines), f"import mmadapt as mm\n{own}".strip(), body)
    return "\n\n".join(part for part in parts if part)


def linked(text: str) -> str:
    """The same text, with every arXiv number a link to the paper, and a list of papers in lines."""
    text = re.sub(rf"({_PAPER.pattern})\n", r"\1  \n", text)
    return _PAPER.sub(r"[arXiv:\1](https://arxiv.org/abs/\1)", text)


def papers(text: str) -> set[str]:
    """The arXiv numbers in a text."""
    return set(_PAPER.findall(text))


def docstring(of: Any) -> list[str]:
    """The paragraphs of a docstring; one that is indented throughout is code."""
    return paragraphs(inspect.getdoc(of) or "")


def paragraphs(text: str) -> list[str]:
    """The paragraphs of a text, neighbouring ones of code joined."""
    found: list[str] = []
    for part in re.split(r"\n[ \t]*\n", inspect.cleandoc(text)):
        if found and is_code(part) and is_code(found[-1]):
            found[-1] += f"\n\n{part}"
        elif part.strip():
            found.append(part)
    return found


def is_code(paragraph: str) -> bool:
    """Whether a paragraph is indented throughout, as code and formulas are."""
    return all(line.startswith("    ") for line in paragraph.splitlines() if line.strip())


def shown(paragraph: str, language: str = "text") -> str:
    """A paragraph as it stands on a page."""
    return block(inspect.cleandoc(paragraph), language) if is_code(paragraph) else linked(paragraph)


def first_sentence(of: Any) -> str:
    """What a docstring begins with, on one line."""
    begin = docstring(of)[:1]
    return re.split(r"(?<!al)[.!?](?=\s|$)", " ".join(begin[0].split()))[0] + "." if begin else ""


def folded(title: str, text: str) -> str:
    """Text that is shown when its title is clicked."""
    inside = "\n".join(f"    {line}".rstrip() for line in text.splitlines())
    return f'??? note "{title}"\n\n{inside}'
