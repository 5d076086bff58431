"""Execute tutorials in place, so that what is committed shows what readers will see.

    python tutorials/execute.py [NOTEBOOK ...]

Widget state, timings and stderr are not kept; an error stops it and leaves the file as it was.
"""

from __future__ import annotations

import sys
from pathlib import Path


def execute(path: Path) -> None:
    """Run one notebook and write its outputs."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=600, record_timing=False).execute(cwd=path.parent)
    notebook.metadata.pop("widgets", None)
    notebook.metadata["language_info"] = {"name": "python"}  # else it names this Python's version
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            output.get("metadata", {}).clear()
    nbformat.write(notebook, path)
    print(f"{path.name}: {len(notebook.cells)} cells, {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    folder = Path(__file__).parent
    for path in [Path(name) for name in sys.argv[1:]] or sorted(folder.glob("*.ipynb")):
        execute(path)
