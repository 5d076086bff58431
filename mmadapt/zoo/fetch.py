"""HTTP as the zoo speaks it: proxies and settings read at every call, tokens kept to their host.

Python's own client, since the hub's library neither resumes across runs nor checks what it got, and
needs half a minute to find that there is no network.
"""

from __future__ import annotations

import http.client
import os
import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mmadapt import __version__
from mmadapt.errors import OfflineError
from mmadapt.folders import hub_home

#: seconds until it is clear that there is no network, all mirrors together
PATIENCE = 2.5
#: bytes of an answer that is read at once
_LONGEST = 50_000_000
TRUE = {"1", "ON", "YES", "TRUE"}


@dataclass(frozen=True)
class Settings:
    """What the environment says about the network at this moment."""

    endpoint: str
    offline: bool
    token: str | None
    connect: float
    read: float


def settings(token: str | bool | None = None) -> Settings:
    """The hub's address, its token and timeouts, by the variables that huggingface_hub reads too.

    `token` replaces the one of the environment; False sends none.
    """
    environment = os.environ
    names = ("MMADAPT_OFFLINE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    offline = any(environment.get(name, "").upper() in TRUE for name in names)
    endpoint = environment.get("HF_ENDPOINT") or "https://huggingface.co"
    return Settings(
        endpoint.rstrip("/"),
        offline,
        _token() if token in (None, True) else token or None,  # type: ignore[arg-type]
        _seconds("HF_HUB_ETAG_TIMEOUT", PATIENCE),
        _seconds("HF_HUB_DOWNLOAD_TIMEOUT", 10.0),
    )


def _seconds(name: str, default: float) -> float:
    try:
        return max(0.1, float(os.environ.get(name) or default))
    except ValueError:
        return default


def _token() -> str | None:
    """The token of the environment, else the one that `hf auth login` has written."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if os.environ.get(name, "").strip():
            return os.environ[name].strip()
    if os.environ.get("HF_HUB_DISABLE_IMPLICIT_TOKEN", "").upper() in TRUE:
        return None
    path = Path(os.environ.get("HF_TOKEN_PATH") or hub_home() / "token").expanduser()
    try:
        return path.read_text().strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def origin(url: str) -> tuple[str, str | None, int | None]:
    """Scheme, host and port: what a token is bound to."""
    parts = urlsplit(url)
    return parts.scheme.lower(), parts.hostname, parts.port


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects; a token goes along within its own origin, to no other host."""

    http_error_308 = urllib.request.HTTPRedirectHandler.http_error_302

    def redirect_request(
        self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> Any:
        if code in (307, 308) and req.get_method() not in ("GET", "HEAD"):
            raise urllib.error.HTTPError(req.full_url, code, msg, headers, fp)
        kept = {key: value for key, value in req.headers.items() if key.lower() != "content-length"}
        request = urllib.request.Request(
            newurl,
            headers=kept,
            origin_req_host=req.origin_req_host,
            unverifiable=True,
            method=req.get_method() if req.get_method() in ("GET", "HEAD") else "GET",
        )
        token = req.unredirected_hdrs.get("Authorization")
        if token and origin(newurl) == origin(req.full_url):
            request.add_unredirected_header("Authorization", token)
        return request


class _Patience:
    """A connection that gives up on a silent network early, and is patient once it stands."""

    host: str
    port: int
    sock: socket.socket
    timeout: float

    def __init__(self, *arguments: Any, connect: float, **more: Any) -> None:
        self.connect_seconds = connect
        super().__init__(*arguments, **more)

    def connect(self) -> None:
        end = time.monotonic() + self.connect_seconds
        addresses = _resolve(self.host, self.port, self.connect_seconds)
        self._create_connection = partial(_dial, addresses, end)
        super().connect()  # pyright: ignore[reportAttributeAccessIssue]
        self.sock.settimeout(self.timeout)


class _Plain(_Patience, http.client.HTTPConnection):
    pass


class _Secure(_Patience, http.client.HTTPSConnection):
    pass


class _Handler(urllib.request.AbstractHTTPHandler):
    """Opens both kinds of web addresses; authorities are read only where a connection needs them."""

    def __init__(self, connect: float) -> None:
        super().__init__()
        self.connect = connect

    def http_open(self, req: Any) -> Any:
        return self.do_open(partial(_Plain, connect=self.connect), req)  # type: ignore[arg-type]

    def https_open(self, req: Any) -> Any:
        make = partial(_Secure, connect=self.connect)
        return self.do_open(make, req, context=_certificates())  # type: ignore[arg-type]

    http_request = https_request = urllib.request.AbstractHTTPHandler.do_request_


def _opener(connect: float) -> urllib.request.OpenerDirector:
    """What opens web addresses, and neither files nor ftp, wherever redirects lead."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.UnknownHandler(),
        _Handler(connect),
        _Redirects(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    return opener


def _certificates() -> ssl.SSLContext:
    """The system's authorities, and those that a company's proxy wants trusted."""
    context = ssl.create_default_context()
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        bundle = os.environ.get(name)
        if bundle and Path(bundle).exists():
            folder = Path(bundle).is_dir()
            context.load_verify_locations(**{"capath" if folder else "cafile": bundle})
    return context


def _resolve(host: str, port: int, seconds: float) -> list[Any]:
    """The host's addresses, found within `seconds`: a resolver without network may block far longer."""
    found: list[Any] = []

    def ask() -> None:
        try:
            found.append(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except OSError as error:
            found.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    if not found:
        raise TimeoutError(f"no answer to who {host} is")
    if isinstance(found[0], OSError):
        raise found[0]
    return found[0]


def _dial(addresses: list[Any], end: float, *_: Any) -> socket.socket:
    """A socket to the first address that answers before `end`; no silent one takes all the time."""
    error: OSError = TimeoutError("no answer in time")
    for family, kind, protocol, _name, address in addresses:
        left = end - time.monotonic()
        if left <= 0:
            break
        link = socket.socket(family, kind, protocol)
        try:
            link.settimeout(left if len(addresses) == 1 else min(left, 1.5))
            link.connect(address)
            return link
        except OSError as failed:
            link.close()
            error = failed
    raise error


def request(
    url: str,
    *,
    method: str = "GET",
    headers: Mapping[str, str] | None = None,
    token: str | None = None,
    body: bytes | None = None,
    connect: float | None = None,
) -> http.client.HTTPResponse:
    """Open `url`; the token is sent to its own scheme, host and port only, wherever redirects lead.

    Raises `OfflineError` where the network is not to be used, `urllib.error.HTTPError` for answers of
    400 and above, and `OSError` where nothing answers.
    """
    now = settings(token)
    if now.offline:
        raise OfflineError(
            f"the network is not to be used, and {url} is not on this machine",
            "unset HF_HUB_OFFLINE, TRANSFORMERS_OFFLINE and MMADAPT_OFFLINE, or fetch it elsewhere",
        )
    asked = urllib.request.Request(url, data=body, method=method)
    asked.add_header("User-Agent", f"mmadapt/{__version__}")
    for name, value in (headers or {}).items():
        asked.add_header(name, value)
    if token:
        asked.add_unredirected_header("Authorization", f"Bearer {token}")
    return _opener(connect or now.connect).open(asked, timeout=now.read)


def content(url: str, token: str | None) -> bytes:
    """The whole of a short answer; one that breaks off raises `http.client.IncompleteRead`."""
    with request(url, token=token) as answer:
        found = answer.read(_LONGEST)
        if answer.length:  # it was announced, and did not come
            raise http.client.IncompleteRead(found, answer.length)
        return found


def reason(error: BaseException) -> str:
    """Why a request failed, in a few words."""
    inner = getattr(error, "reason", error)
    if isinstance(inner, ssl.SSLCertVerificationError):
        return (
            f"its certificate is not trusted ({inner.verify_message}); the authority of a company's "
            "proxy is named by REQUESTS_CA_BUNDLE"
        )
    if isinstance(inner, TimeoutError):
        return str(inner) if str(inner) not in ("", "timed out") else "no answer in time"
    if isinstance(inner, socket.gaierror):
        return "its address is not known"
    if isinstance(inner, ConnectionRefusedError):
        return "nothing answers there"
    return str(getattr(inner, "strerror", None) or inner)[:200]
