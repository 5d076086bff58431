"""A Jupyter server of its own, and scenarios that drive its notebooks in chromium."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nbformat

TOKEN = "mmadapt"
#: no news beside the page
SETTINGS = {
    "@jupyterlab/apputils-extension/notification": {
        "fetchNews": "false",
        "checkForUpdates": False,
        "doNotDisturbMode": True,
    }
}


@contextmanager
def jupyter(root: Path, own: Path) -> Iterator[str]:
    """The address of a server for JupyterLab and Notebook 7 on a folder; settings and a log are in `own`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, values in SETTINGS.items():
        path = own / "settings" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    environment = {
        **os.environ,
        "JUPYTER_CONFIG_DIR": str(own / "config"),
        "JUPYTER_DATA_DIR": str(own / "data"),
        "JUPYTER_RUNTIME_DIR": str(own / "runtime"),
        "JUPYTERLAB_SETTINGS_DIR": str(own / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(own / "workspaces"),
        "IPYTHONDIR": str(own / "ipython"),
    }
    with (own / "log").open("w") as log:
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
        try:
            _wait(process, f"http://127.0.0.1:{port}/api/status?token={TOKEN}", own / "log")
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(30)


def _wait(process: subprocess.Popen[Any], address: str, log: Path) -> None:
    for _ in range(600):
        if process.poll() is not None:
            break
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError(f"the server did not start:\n{log.read_text()}")


def write(path: Path, *cells: str) -> Path:
    """A notebook of these cells, which have not run."""
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    made.metadata.kernelspec = {"name": "python3", "display_name": "Python 3"}
    nbformat.write(made, path)
    return path


def drive(base: str, front: str, scenario: Path, path: Path, **more: Any) -> dict[str, Any]:
    """What a scenario saw in a notebook; nothing may have been asked of another machine."""
    programs = {}
    for program, step in (("node", "install Node.js"), ("chromium", "apt-get install chromium")):
        programs[program] = shutil.which(program)
        if programs[program] is None:
            raise RuntimeError(f"browser tests need {program}: {step}")
    given = {
        "base": base,
        "front": front,
        "path": path.name,
        "token": TOKEN,
        "chromium": programs["chromium"],
        "shots": os.environ.get("MMADAPT_SHOTS"),
        **more,
    }
    command = [str(programs["node"]), str(scenario), json.dumps(given)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise RuntimeError(f"{scenario.name} in {front} failed:\n{done.stdout}\n{done.stderr}")
    seen = json.loads(done.stdout.splitlines()[-1])
    if beyond := seen.pop("beyond"):
        raise RuntimeError(f"the page asked other machines: {beyond}")
    return seen
