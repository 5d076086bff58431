"""JupyterLab and Notebook 7 from one server, in Debian's chromium, driven through playwright-core.

    apt-get install chromium; npm install --prefix DIR playwright-core
    NODE_PATH=DIR/node_modules pytest -n 0 -m browser tests/browser

A widget has a scenario `NAME.mjs`, which does what a person would, and `test_browser_NAME.py`, which writes the
notebook and checks what was seen. `MMADAPT_SHOTS=DIR` keeps pictures of the widgets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import front as fronts
import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The address of a server, and its folder."""
    root = tmp_path_factory.mktemp("notebooks")
    with fronts.jupyter(root, tmp_path_factory.mktemp("jupyter")) as base:
        yield base, root


@pytest.fixture(params=["lab", "notebook"])
def front(request: pytest.FixtureRequest) -> str:
    """A front end."""
    return request.param


@pytest.fixture
def drive(server: tuple[str, Path], front: str) -> Callable[..., dict[str, Any]]:
    """Drives a notebook with a scenario of this folder; what the scenario saw."""
    return lambda scenario, path, **more: fronts.drive(
        server[0], front, HERE / scenario, path, **more
    )


@pytest.fixture
def notebook(
    server: tuple[str, Path], front: str, request: pytest.FixtureRequest
) -> Callable[..., Path]:
    """Writes a notebook of these cells, and beside it modules by name."""
    root = server[1]
    name = request.node.originalname  # type: ignore[attr-defined]

    def write(*cells: str, **modules: str) -> Path:
        for module, text in modules.items():
            (root / f"{module}.py").write_text(text)
        return fronts.write(root / f"{name}_{front}.ipynb", *cells)

    return write
