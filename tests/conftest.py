"""What every test gets: one thread, no network, slow pieces only on request."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

if TYPE_CHECKING:
    from hub import Hub

torch.set_num_threads(1)


#: markers whose tests run on request only
ASKED_FOR = ("slow", "browser")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave such tests out unless -m or a test's own id asks for them."""
    if config.option.markexpr or any("::" in argument for argument in config.args):
        return
    left = [item for item in items if any(map(item.get_closest_marker, ASKED_FOR))]
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if item not in left]


def _is_local(address: Any) -> bool:
    if not isinstance(address, tuple):  # a unix socket's path
        return True
    if address[0] in ("localhost", ""):
        return True
    try:
        return ipaddress.ip_address(address[0]).is_loopback
    except ValueError:
        return False


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection to anything but this machine is an error, whoever tries it."""

    def guarded(connect: Any) -> Any:
        def attempt(self: socket.socket, address: Any) -> Any:
            if not _is_local(address):
                raise AssertionError(f"a test tried to connect to {address}")
            return connect(self, address)

        return attempt

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, guarded(getattr(socket.socket, name)))


@pytest.fixture(autouse=True)
def fixed_draws() -> None:
    """Whatever a test draws is the same in every order of tests."""
    torch.manual_seed(0)


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A server that speaks the hub's API, on this machine."""
    from hub import Hub

    with Hub() as server:
        yield server


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface_hub asks its endpoint in this test; it reads its settings once, at import."""
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_UPDATE_CHECK", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)


@pytest.fixture
def empty_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: Hub) -> Path:
    """A machine without caches, tokens or settings, whose hub is the local one; its cache folder."""
    for name in list(os.environ):
        if name.startswith(
            ("HF_", "HUGGING", "TRANSFORMERS_", "MMADAPT_", "TORCH_HOME", "XDG_")
        ) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setattr("mmadapt.zoo.digests._VERIFIED", {})
    monkeypatch.setattr("mmadapt.zoo.manifest._REGISTERED", {})
    return home / ".cache" / "mmadapt"
