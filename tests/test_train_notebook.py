"""Training in a real kernel: what the saved notebook shows, and the stop button."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("ipykernel")
nbformat = pytest.importorskip("nbformat")

SETTING = """
import torch
import mmadapt as mm

torch.manual_seed(0)
torch.set_num_threads(1)
model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
def loss(model, batch):
    return model(batch).square().mean()
"""


@pytest.mark.slow
def test_the_saved_notebook_shows_the_last_loss_and_the_curve_and_no_widget() -> None:
    from nbclient import NotebookClient

    run = 'mm.fit(model, torch.randn(8, 4), loss=loss, steps=40, label="sketch", lr=1e-2)'
    twice = (
        "half = mm.fit(model, torch.randn(8, 4), loss=loss, steps=3, autocast=torch.bfloat16)\n"
        "full = mm.fit(model, torch.randn(8, 4), loss=loss, steps=3)"
    )
    cells = [nbformat.v4.new_code_cell(text) for text in (SETTING, run, twice)]
    notebook = nbformat.v4.new_notebook(cells=cells)
    NotebookClient(notebook, timeout=300).execute()
    assert "widgets" not in notebook.metadata
    shown, returned = notebook.cells[1].outputs
    assert shown.output_type == "display_data"
    assert shown.data["text/plain"].startswith("sketch: 40/40  loss ")
    assert "<svg" in shown.data["text/html"] and "<progress" not in shown.data["text/html"]
    assert "History(finished 40 steps" in returned.data["text/plain"]
    assert "<svg" in returned.data["text/html"]
    assert [o.data["text/plain"][:8] for o in notebook.cells[2].outputs] == ["fit: 3/3"] * 2


def _until(client: Any, text: str) -> str:
    """What the kernel prints, up to `text`."""
    printed = ""
    while text not in printed:
        message = client.get_iopub_msg(timeout=120)
        assert message["msg_type"] != "error", message["content"]
        if message["msg_type"] == "stream":
            printed += message["content"]["text"]
    return printed


@pytest.mark.slow
def test_the_stop_button_ends_the_run_and_the_kernel_goes_on() -> None:
    from jupyter_client.manager import start_new_kernel

    manager, client = start_new_kernel()
    try:
        client.execute(SETTING)
        client.execute(
            "def noted(model, batch):\n"
            "    calls.append(1) or len(calls) > 1 or print('at work', flush=True)\n"
            "    return loss(model, batch)\n"
            "calls = []\n"
            "history = mm.fit(model, torch.randn(8, 4), loss=noted, steps=10**8)\n"
            "print('returned', history.interrupted, len(history.losses) == len(calls))"
        )
        _until(client, "at work")
        manager.interrupt_kernel()
        assert "returned True True" in _until(client, "returned True True")
        client.execute("print('and again', mm.fit(model, torch.randn(8, 4), loss=loss, steps=2))")
        assert "finished 2 steps" in _until(client, "finished")
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
