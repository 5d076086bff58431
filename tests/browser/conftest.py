"""JupyterLab and Notebook 7 from one server, in Debian's chromium, driven through playwright-core.

    apt-get install chromium; npm install --prefix DIR playwright-core
    NODE_PATH=DIR/node_modules pytest -n 0 -m browser tests/browser

`MMADAPT_SHOTS=DIR` keeps a picture of each widget.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest

HERE = Path(__file__).parent
TOKEN = "mmadapt"


def _needed(program: str, step: str) -> str:
    found = shutil.which(program)
    if found is None:
        pytest.fail(f"browser tests need {program}: {step}")
    return found


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The address of a Jupyter server with settings of its own, and its folder."""
    root = tmp_path_factory.mktemp("notebooks")
    own = tmp_path_factory.mktemp("jupyter")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = own / "settings"
    _write_settings(settings)
    environment = {
        **os.environ,
        "JUPYTER_CONFIG_DIR": str(own / "config"),
        "JUPYTER_DATA_DIR": str(own / "data"),
        "JUPYTER_RUNTIME_DIR": str(own / "runtime"),
        "JUPYTERLAB_SETTINGS_DIR": str(settings),
        "JUPYTERLAB_WORKSPACES_DIR": str(own / "workspaces"),
        "IPYTHONDIR": str(own / "ipython"),
    }
    log = (own / "log").open("w")
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"),
            *("--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0"),
            *(f"--IdentityProvider.token={TOKEN}", f"--ServerApp.root_dir={root}"),
        ],
        env=environment,
        stdout=log,
        stderr=log,
    )
    base = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            assert process.poll() is None, (own / "log").read_text()
            try:
                urllib.request.urlopen(f"{base}/api/status?token={TOKEN}", timeout=5).close()
                break
            except OSError:
                time.sleep(0.1)
        yield base, root
    finally:
        process.terminate()
        process.wait(30)
        log.close()


def _write_settings(folder: Path) -> None:
    """No news, no tour of the page."""
    for extension, values in {
        "@jupyterlab/apputils-extension/notification": {
            "fetchNews": "false",
            "checkForUpdates": False,
            "doNotDisturbMode": True,
        },
    }.items():
        path = folder / f"{extension}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))


@pytest.fixture(params=["lab", "notebook"])
def front(request: pytest.FixtureRequest) -> str:
    """A front end."""
    return request.param


@pytest.fixture
def drive(server: tuple[str, Path], front: str) -> Callable[..., dict[str, Any]]:
    """Drives a notebook with a scenario in this folder; what the scenario saw."""
    base, _ = server
    node = _needed("node", "install Node.js")
    chromium = _needed("chromium", "apt-get install chromium")

    def run(scenario: str, path: Path, **more: Any) -> dict[str, Any]:
        given = {
            "base": base,
            "front": front,
            "path": path.name,
            "token": TOKEN,
            "chromium": chromium,
            "shots": os.environ.get("MMADAPT_SHOTS"),
            **more,
        }
        done = subprocess.run(
            [node, str(HERE / scenario), json.dumps(given)],
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        seen = json.loads(done.stdout.splitlines()[-1])
        assert seen.pop("beyond") == []  # nothing was asked of another machine
        return seen

    return run


@pytest.fixture
def notebook(
    server: tuple[str, Path], front: str, request: pytest.FixtureRequest
) -> Callable[..., Path]:
    """Writes a notebook of these cells, beside modules by name."""
    _, root = server

    def write(*cells: str, **modules: str) -> Path:
        for name, text in modules.items():
            (root / f"{name}.py").write_text(text)
        made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
        made.metadata.kernelspec = {"name": "python3", "display_name": "Python 3"}
        path = root / f"{request.node.originalname}_{front}.ipynb"
        nbformat.write(made, path)
        return path

    return write
