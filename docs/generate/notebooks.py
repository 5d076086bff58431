"""The committed notebooks as pages: nothing is executed, outputs are those that were saved."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

#: nbconvert's Markdown, with what cells print in blocks that can be told from code
TEMPLATE = """\
{%- extends "markdown/index.md.j2" -%}
{%- block stream %}
``` {.text .output}
{{ output.text.rstrip() | strip_ansi }}
```
{% endblock stream %}
{%- block data_html scoped %}
<div class="shown">
{{ output.data["text/html"].splitlines() | map("trim") | select | join("\\n") }}
</div>
{% endblock data_html -%}
{%- block data_text scoped %}
``` {.text .output}
{{ output.data["text/plain"].rstrip() }}
```
{% endblock data_text -%}
"""


@dataclass
class Notebook:
    """A notebook as Markdown, with the pictures in its outputs by their place in the site."""

    text: str
    pictures: dict[str, bytes]


def read(path: Path, place: str) -> Notebook:
    """The notebook at `path`, for a page at `place` in the site."""
    import nbformat
    from nbconvert import MarkdownExporter

    notebook = nbformat.read(path, as_version=4)
    resources = {"output_files_dir": f"{path.stem}_files", "unique_key": "output"}
    exporter = MarkdownExporter(raw_template=TEMPLATE)
    text, found = exporter.from_notebook_node(notebook, resources=resources)
    here = place.rpartition("/")[0]
    pictures = {f"{here}/{name}": content for name, content in found["outputs"].items()}
    return Notebook(text, pictures)
