"""The committed notebooks as pages: nothing is executed, outputs are those that were saved."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass
class Notebook:
    """A notebook as Markdown, with the pictures in its outputs by their place in the site."""

    title: str
    text: str
    pictures: dict[str, bytes]


def read(path: Path, place: str) -> Notebook:
    """The notebook at `path`, for a page at `place` in the site."""
    import nbformat
    from nbconvert import MarkdownExporter

    notebook = nbformat.read(path, as_version=4)
    folder = f"{path.stem}_files"
    resources = {"output_files_dir": folder, "unique_key": "output"}
    text, found = MarkdownExporter().from_notebook_node(notebook, resources=resources)
    title = next(line for line in text.splitlines() if line.startswith("# "))[2:]
    here = place.rpartition("/")[0]
    pictures = {f"{here}/{name}": content for name, content in found["outputs"].items()}
    return Notebook(title, text, pictures)
