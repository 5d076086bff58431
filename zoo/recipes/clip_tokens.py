"""The tokenizer of `tiny/clip`: open_clip's own, with merges that make each caption word one token."""

from __future__ import annotations

import gzip
from itertools import pairwise
from pathlib import Path

from mmadapt.tasks.scenes import COLOURS, OBJECTS, PATTERNS

CONTEXT_LENGTH = 20


def caption_words() -> list[str]:
    """Every word that a caption may hold."""
    words = ["a", "an", "the", "photo", "image", "picture", "of", "on", "background", "digit"]
    words += [*COLOURS, *PATTERNS, *OBJECTS]
    return list(dict.fromkeys(words))


def write_merges(path: Path) -> int:
    """Write byte-pair merges that make each caption word one token; returns the vocabulary size."""
    merges: list[tuple[str, str]] = []
    for word in caption_words():
        symbols = [*word[:-1], word[-1] + "</w>"]
        while len(symbols) > 1:
            pairs = list(pairwise(symbols))
            known = [merges.index(pair) for pair in pairs if pair in merges]
            # An earlier merge is applied first, as the tokenizer will; else the first pair grows.
            pair = merges[min(known)] if known else pairs[0]
            if not known:
                merges.append(pair)
            at = pairs.index(pair)
            symbols[at : at + 2] = ["".join(pair)]
    text = "\n".join(["#version: mmadapt tiny", *(" ".join(pair) for pair in merges)])
    with open(path, "wb") as file:  # no time stamp: the same bytes on every run
        file.write(gzip.compress(text.encode(), mtime=0))
    return 256 * 2 + len(merges) + 2  # bytes, bytes that end a word, merges, start and end


def load_tokenizer(merges: Path):
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer(bpe_path=str(merges), context_length=CONTEXT_LENGTH)
