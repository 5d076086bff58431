"""Links in pages: written so that they hold on a code host, made to hold in the site."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]
_FENCE = re.compile(r"^ {0,3}(```|~~~).*?^ {0,3}\1", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(\]\()([^)\s#:]+)(?=[)#])")


def rewritten(
    text: str, origin: str, place: str, pages: Mapping[str, str], keep: Callable[[str], str]
) -> str:
    """The same Markdown with every link to a file of the repository leading to its place in the site.

    `origin` is where the text stands in the repository, `place` in the site; `pages` maps files of the
    repository to pages, and `keep` puts any other file into the site and says where. Links that lead
    to no file stay as they are, for mkdocs to complain about.
    """

    def replace(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(origin), match[2]))
        if target in pages and pages[target] != place:
            there = pages[target]
        elif (ROOT / target).is_file():
            there = keep(target)
        else:
            return match[0]
        return match[1] + posixpath.relpath(there, posixpath.dirname(place) or ".")

    parts, end = [], 0
    for fence in _FENCE.finditer(text):
        parts += [_LINK.sub(replace, text[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, _LINK.sub(replace, text[end:])])
