"""Text as it is compared: what is said, not how it is written."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from mmadapt.errors import DataError


def check_texts(texts: Sequence[str]) -> None:
    """Refuse what is no text, such as the NaN or None that a table has for an empty cell."""
    if isinstance(texts, str):
        raise DataError(f"the texts are one string, {texts!r}", "a list with one text a clip")
    for place, text in enumerate(texts):
        if not isinstance(text, str):
            raise DataError(
                f"text {place} is {text!r}, expected a string",
                "an empty string where nothing is said",
            )


def normalise(text: str) -> str:
    """Composed characters (NFC), case folded, punctuation left out, one space between words.

    Punctuation is what Unicode calls so (P); an apostrophe within a word stays, and so do marks, which
    are vowels in Indic scripts. A dash or slash parts words.
    """
    folded = unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())
    kept = []
    for place, character in enumerate(folded):
        if not unicodedata.category(character).startswith("P"):
            kept.append(character)
        elif character in "'’" and _inside(folded, place):
            kept.append("'")
        elif unicodedata.category(character) == "Pd" or character in "/…":
            kept.append(" ")
    return " ".join("".join(kept).split())


def _inside(text: str, place: int) -> bool:
    return 0 < place < len(text) - 1 and text[place - 1].isalpha() and text[place + 1].isalpha()
