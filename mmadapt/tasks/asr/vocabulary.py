"""Which characters a model can write, and text as their numbers."""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mmadapt.errors import DataError

Unknown = Literal["refuse", "drop"]
_SHOWN = 12


@dataclass(frozen=True)
class Vocabulary:
    """The characters of a CTC model by their number, with `blank`, and `delimiter` between words.

    `Vocabulary.of(backbone)` takes those of its tokenizer, `Vocabulary.read("vocab.json")` those of a
    file such as wav2vec 2.0 models have. Tokens of several characters, such as `<unk>`, are never
    written. Where all letters are of one case, text is brought to it.
    """

    tokens: tuple[str, ...]
    blank: int = 0
    delimiter: str = "|"

    def __post_init__(self) -> None:
        if not 0 <= self.blank < len(self.tokens):
            raise DataError(f"blank is {self.blank}, and there are {len(self.tokens)} tokens")
        if len(set(self.tokens)) != len(self.tokens):
            twice = [token for token, times in Counter(self.tokens).items() if times > 1]
            raise DataError(f"the vocabulary holds {', '.join(map(repr, twice))} twice")
        if not self._numbers:
            raise DataError(
                "no token of the vocabulary is a single character",
                "models of word pieces need their own tokenizer: pass ids as labels",
            )

    @classmethod
    def of(cls, source: Any) -> Vocabulary:
        """That of a `Backbone`, of a transformers tokenizer, or of a mapping from token to number."""
        if isinstance(source, Vocabulary):
            return source
        tokenizer: Any = getattr(source, "tokenize", None) if hasattr(source, "anatomy") else source
        if isinstance(tokenizer, Mapping):
            return cls(_in_order(tokenizer), _blank(tokenizer))
        if not hasattr(tokenizer, "get_vocab"):
            raise DataError(
                f"{type(source).__name__} says no vocabulary",
                'Vocabulary.read("vocab.json"), or Vocabulary(("<pad>", "|", "a", …))',
            )
        known = tokenizer.get_vocab()
        blank = getattr(tokenizer, "pad_token_id", None)
        delimiter = getattr(tokenizer, "word_delimiter_token", None) or " "
        return cls(_in_order(known), _blank(known) if blank is None else blank, delimiter)

    @classmethod
    def read(cls, path: str | Path) -> Vocabulary:
        """That of a `vocab.json`, from token to number."""
        known = json.loads(Path(path).read_text())
        if not isinstance(known, dict) or not all(isinstance(n, int) for n in known.values()):
            raise DataError(
                f"{path} is no mapping from token to number",
                "files with a vocabulary for each language hold one under the language's name",
            )
        return cls(_in_order(known), _blank(known))

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def _numbers(self) -> dict[str, int]:
        between = {self.delimiter: " "}
        return {
            between.get(token, token): number
            for number, token in enumerate(self.tokens)
            if len(token) == 1 and number != self.blank
        }

    def spell(self, text: str) -> str:
        """The text as it can be written: composed characters (NFC), one space, the vocabulary's case."""
        text = " ".join(unicodedata.normalize("NFC", text).split())
        letters = [token for token in self._numbers if token.upper() != token.lower()]
        if letters and all(letter == letter.upper() for letter in letters):
            return text.upper()
        if letters and all(letter == letter.lower() for letter in letters):
            return text.lower()
        return text

    def missing(self, texts: Iterable[str]) -> dict[str, int]:
        """Characters that cannot be written and how often they occur, the most frequent first."""
        numbers = self._numbers
        found = Counter(c for text in texts for c in self.spell(text) if c not in numbers)
        return dict(found.most_common())

    def ids(self, text: str, unknown: Unknown = "refuse") -> list[int]:
        """The numbers of the text's characters.

        One that the vocabulary lacks is a `DataError` that lists all of them, or is left out with
        `unknown="drop"`.
        """
        if unknown not in ("refuse", "drop"):
            raise DataError(f'unknown is {unknown!r}, expected "refuse" or "drop"')
        if unknown == "refuse":
            self.require([text])
        numbers = self._numbers
        kept = "".join(c for c in self.spell(text) if c in numbers)
        return [numbers[character] for character in " ".join(kept.split())]

    def require(self, texts: Iterable[str]) -> None:
        """Refuse texts with characters that the vocabulary lacks, listing all of them."""
        missing = self.missing(texts)
        if missing:
            shown = ", ".join(f"{c!r} ({times}×)" for c, times in list(missing.items())[:_SHOWN])
            more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
            raise DataError(
                f"the vocabulary has no {shown}{more}; it can write {''.join(self._numbers)!r}",
                'rewrite the texts, for example digits as words, or unknown="drop" leaves them out',
            )

    def text(self, ids: Iterable[int]) -> str:
        """Characters of numbers that are no repeats, blanks and longer tokens left out."""
        characters = {number: character for character, number in self._numbers.items()}
        return " ".join("".join(characters.get(number, "") for number in ids).split())


def _in_order(known: Mapping[str, int]) -> tuple[str, ...]:
    if sorted(known.values()) != list(range(len(known))):
        raise DataError(f"the numbers of the {len(known)} tokens are not 0 to {len(known) - 1}")
    return tuple(sorted(known, key=lambda token: known[token]))


def _blank(known: Mapping[str, int]) -> int:
    for token in ("<pad>", "[PAD]", "<blank>", "<blk>"):
        if token in known:
            return known[token]
    raise DataError(
        "the vocabulary names no blank: it has none of <pad>, [PAD], <blank>, <blk>",
        "Vocabulary(tokens, blank=…)",
    )
