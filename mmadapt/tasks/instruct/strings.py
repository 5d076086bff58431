"""A small generated world of instructions: operations on strings of letters, and captions of scenes.

`tiny/llama` is trained on the plain wording of `OPERATIONS` and on captions, text alone. Every string
belongs to one split by a digest of its letters, so that those of "validation" and "test" are in no
training data, whatever the wording.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable

import torch

from mmadapt.errors import DataError
from mmadapt.tasks.instruct.data import Example
from mmadapt.tasks.scenes import COLOURS, PATTERNS, draw_attributes, object_names

OPERATIONS: dict[str, Callable[[str], str]] = {
    "copy": lambda s: s,
    "reverse": lambda s: s[::-1],
    "upper": str.upper,
    "first": lambda s: s[0],
    "last": lambda s: s[-1],
    "double": lambda s: "".join(2 * letter for letter in s),
    "sort": lambda s: "".join(sorted(s)),
    "count": lambda s: str(len(s)),
}
#: wordings that training never shows, and the operation each asks for
WORDINGS = {
    "spell {} backwards = ": "reverse",
    "put {} in order = ": "sort",
    "stutter {} = ": "double",
    "shout {} = ": "upper",
}
CAPTION = "caption: "
SPLITS = ("train", "validation", "test")
SHORTEST, LONGEST = 3, 6  # letters


def plain(operation: str) -> str:
    """The wording that training shows."""
    return f"{operation} {{}} = "


def split_of(string: str) -> str:
    """A tenth of all strings is for tests, another for validation."""
    return {0: "test", 1: "validation"}.get(zlib.crc32(string.encode()) % 10, "train")


def draw_strings(count: int, generator: torch.Generator, split: str = "train") -> list[str]:
    """Random strings of 3 to 6 small letters that belong to a split."""
    if split not in SPLITS:
        raise DataError(f"split is {split!r}, expected one of {', '.join(SPLITS)}")
    found: list[str] = []
    while len(found) < count:
        letters = torch.randint(97, 123, (256, LONGEST), generator=generator)
        lengths = torch.randint(SHORTEST, LONGEST + 1, (256,), generator=generator).tolist()
        for row, length in zip(letters.tolist(), lengths, strict=True):
            string = bytes(row[:length]).decode()
            if split_of(string) == split:
                found.append(string)
    return found[:count]


def instructions(
    count: int, *, seed: int, split: str = "train", wordings: dict[str, str] | None = None
) -> list[Example]:
    """Instructions in random order; the plain wording of all operations without `wordings`."""
    return draw_instructions(count, torch.Generator().manual_seed(seed), split, wordings)


def draw_instructions(
    count: int,
    generator: torch.Generator,
    split: str = "train",
    wordings: dict[str, str] | None = None,
) -> list[Example]:
    """As `instructions`, from a generator."""
    asked = list((wordings or {plain(name): name for name in OPERATIONS}).items())
    which = torch.randint(len(asked), (count,), generator=generator).tolist()
    strings = draw_strings(count, generator, split)
    return [
        Example(asked[i][0].format(string), OPERATIONS[asked[i][1]](string))
        for i, string in zip(which, strings, strict=True)
    ]


def caption(attributes: list[int]) -> str:
    """The caption of a scene, from what `mmadapt.tasks.scenes.scenes` says of it."""
    thing, colour, pattern, behind = attributes
    name = object_names()[thing]
    return f"a {COLOURS[colour]} {name} on a {PATTERNS[pattern]} {COLOURS[behind]} background"


def draw_captions(count: int, generator: torch.Generator, split: str = "any") -> list[Example]:
    """Captions of scenes that are not drawn, of the combinations of a split of the scenes."""
    drawn = draw_attributes(count, generator, split=split)
    return [Example(CAPTION, caption(row)) for row in drawn.tolist()]


def read_caption(text: str) -> list[int | None]:
    """The attributes that a caption names, None for each that it does not."""
    head, _, tail = text.partition(" on a ")
    article, _, rest = head.partition(" ")
    colour, _, thing = rest.partition(" ")
    pattern, _, behind = tail.partition(" ")
    parts = (
        (thing, object_names()),
        (colour, COLOURS),
        (pattern, PATTERNS),
        (behind.removesuffix(" background"), COLOURS),
    )
    return [
        names.index(word) if article == "a" and word in names else None for word, names in parts
    ]
