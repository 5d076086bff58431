"""The start: the README, without what has pages of its own."""

from __future__ import annotations

import re

#: sections of the README that have pages of their own here: title -> what those are made from
ELSEWHERE = {"The words": "docs/words.md", "What there is": "mmadapt/adapter"}
#: what stands at its end
ONWARD = """
## On from here

- [The words](docs/words.md) and one figure, then [the first tutorial](tutorials/01_five_minutes.ipynb)
- [Every method](mmadapt/adapter) with its formula, sites and costs; [every backbone](mmadapt/backbones) with its
  sites; [the laws](tests/test_laws.py) that hold between them
- Coming from [PEFT](docs/from_peft.md) or [AdapterHub](docs/from_adapterhub.md)
- [What adapters cost](docs/performance.md), measured
"""


def page(readme: str) -> str:
    """The README without the sections that are pages here."""
    begin, *sections = re.split(r"^(?=## )", readme, flags=re.MULTILINE)
    titles = [section.splitlines()[0].removeprefix("## ") for section in sections]
    missing = [title for title in ELSEWHERE if title not in titles]
    if missing:
        raise ValueError(f"the README has no section {missing[0]!r}; its sections are {titles}")
    kept = [s for s, title in zip(sections, titles, strict=True) if title not in ELSEWHERE]
    text = "".join([begin, *kept, ONWARD])
    for title, there in ELSEWHERE.items():
        text = text.replace(f"(#{title.lower().replace(' ', '-')})", f"({there})")
    return text
