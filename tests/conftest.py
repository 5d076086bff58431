"""What every test gets: one thread, no network, slow pieces only on request."""

from __future__ import annotations

import ipaddress
import os
import socket
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

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
