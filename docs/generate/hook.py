"""What mkdocs calls: it adds the generated pages, makes links hold, and puts drawings into pages.

Nothing is fetched and nothing is trained; models are small and random, or have no numbers at all.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import backbone_pages
import law_facts
import links
import method_pages
import notebooks
import reference_pages
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
#: sections of the README that have pages of their own here
ELSEWHERE = ("The words", "What there is")

ONWARD = """
## On from here

- [The words](docs/words.md) and one figure, then [the first tutorial](tutorials/01_five_minutes.ipynb)
- [Every method](mmadapt/adapter) with its formula, sites and costs; [every backbone](mmadapt/backbones) with its
  sites; [the laws](tests/test_laws.py) that hold between them
- Coming from [PEFT](docs/from_peft.md) or [AdapterHub](docs/from_adapterhub.md)
- [What adapters cost](docs/performance.md), measured
"""

#: what generated pages are made from, and what links from pages written by hand lead to
MADE_FROM = {
    "mmadapt/adapter": "methods/index.md",
    "mmadapt/backbones": "backbones/index.md",
    "tests/test_laws.py": "laws.md",
}
#: what a browser fetches by itself
_LOADED = re.compile(
    r'<(script|link|img|audio|video|iframe)\b[^>]*?(?:src|href)="?(https?://[^" >]+)'
)

_texts: dict[str, str] = {}  # place in the site -> Markdown
_pictures: dict[str, bytes] = {}
_origins: dict[str, str] = {}  # place in the site -> place in the repository


def on_config(config: Any) -> Any:
    """Make all pages, and give the navigation those that `…/*` stands for."""
    _texts["index.md"] = start((ROOT / "README.md").read_text())
    _origins["index.md"] = "README.md"
    for path in sorted((ROOT / "tutorials").glob("*.ipynb")):
        place = f"tutorials/{path.stem}.md"
        notebook = notebooks.read(path, place)
        _texts[place] = notebook.text
        _pictures.update(notebook.pictures)
        _origins[place] = f"tutorials/{path.name}"
    _texts["laws.md"] = law_facts.page()
    for made in (method_pages.pages(), backbone_pages.pages(), reference_pages.pages()):
        _texts.update(made)
    config["nav"] = [_expanded(entry) for entry in config["nav"]]
    return config


def start(readme: str) -> str:
    """The README without the sections that are pages here."""
    begin, *sections = re.split(r"^(?=## )", readme, flags=re.MULTILINE)
    titles = [section.splitlines()[0].removeprefix("## ") for section in sections]
    missing = [title for title in ELSEWHERE if title not in titles]
    if missing:
        raise ValueError(f"the README has no section {missing[0]!r}; its sections are {titles}")
    kept = [s for s, title in zip(sections, titles, strict=True) if title not in ELSEWHERE]
    return "".join([begin, *kept, ONWARD])


def _expanded(entry: Any) -> Any:
    if isinstance(entry, dict):
        [(title, inside)] = entry.items()
        if isinstance(inside, str) and inside.endswith("/*"):
            begin = inside.removesuffix("*")
            return {title: [place for place in _texts if place.startswith(begin)]}
        if isinstance(inside, list):
            return {title: [_expanded(each) for each in inside]}
    return entry


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages, and the pictures of notebooks."""
    for place, content in {**_texts, **_pictures}.items():
        files.append(File.generated(config, place, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Let links lead to pages and files of the site, and drawings take the colours of the page."""
    place = page.file.src_uri
    origin = _origins.get(place, f"docs/{place}")
    pages = {f"docs/{file.src_uri}": file.src_uri for file in files}
    pages |= {there: here for here, there in _origins.items()} | MADE_FROM
    pages |= {f"mmadapt/{Path(one).with_suffix('.py')}": one for one in backbone_pages.places()}

    def keep(target: str) -> str:
        there = f"source/{target}"
        if files.get_file_from_path(there) is None:
            files.append(File.generated(config, there, abs_src_path=str(ROOT / target)))
        return there

    text = links.rewritten(markdown, origin, place, pages, keep)
    return re.sub(r"^!\[([^\]]*)\]\((\w+\.svg)\)$", _drawing, text, flags=re.MULTILINE)


def _drawing(match: re.Match[str]) -> str:
    lines = (ROOT / "docs" / match[2]).read_text().splitlines()
    drawing = "\n".join(line.strip() for line in lines if line.strip())  # one block, without gaps
    named = drawing.replace("<svg ", f'<svg role="img" aria-label="{match[1]}" ', 1)
    return f"<div>\n{named}\n</div>"


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Refuse a page that would load anything from elsewhere."""
    found = _LOADED.search(output)
    if found:
        raise ValueError(
            f"{page.file.src_uri} loads {found[2]}; the site has to work without network"
        )
    return output
