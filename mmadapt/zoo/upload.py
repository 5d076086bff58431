"""An adapter published in a repository of the hub, with a page that tells what it is."""

from __future__ import annotations

import html
import http.client
import re
import urllib.error
from dataclasses import dataclass
from typing import Any

from mmadapt.core.card import CARD, is_ours
from mmadapt.core.store import content, to_files, writes
from mmadapt.errors import DownloadError, GatedError, OfflineError, ZooError
from mmadapt.zoo import hub
from mmadapt.zoo.fetch import Settings, reason, settings
from mmadapt.zoo.fetch import content as answered
from mmadapt.zoo.files import megabytes

_LOGIN = (
    "log in with `hf auth login`, set HF_TOKEN or pass token=, of an account that may write there"
)
_CLIENTS = ("httpx", "httpx2", "httpcore", "requests", "urllib3")


@dataclass(frozen=True)
class Upload:
    """What was sent to the hub, or would be."""

    repo: str
    private: bool
    #: bytes by file name
    files: dict[str, int]
    #: the page, as people read it
    card: str
    #: of the commit; empty where nothing was sent
    url: str = ""
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        kind = "private" if self.private else "public"
        sent = (
            f"sent to {self.url}"
            if self.url
            else f"would be sent to {self.repo} ({kind}), nothing was"
        )
        sizes = ", ".join(f"{name} {megabytes(size)}" for name, size in self.files.items())
        return "\n".join([f"{sizes}: {sent}", *self.notes])

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(repr(self))}\n\n{html.escape(self.card)}</pre>"


def push(
    m: Any,
    repo: str,
    name: str | None = None,
    *,
    private: bool = False,
    token: str | bool | None = None,
    licence: str | None = None,
    metrics: dict[str, Any] | None = None,
    data: str | None = None,
    dry_run: bool = False,
) -> Upload:
    """Send one attachment's files to the repository `repo` ("org/name") of the hub, made if need be.

    They are those of `mmadapt.save`, with a model card; a card that others wrote stays. `dry_run=True`
    shows what would be sent and asks no server. Without a name exactly one must be attached.

    Raises `GatedError` without a token or the right to write, `OfflineError` without a network and
    `DownloadError` for other refusals, before anything of the repository is changed.

        mm.zoo.push(clip, "me/sketch", licence="MIT", data="Omniglot, 16 a class", dry_run=True)
    """
    target = repo.removeprefix("hf:") if isinstance(repo, str) else ""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", target):
        raise ZooError(f"{repo!r} names no repository", 'expected "org/name"')
    manifest, tensors = content(m, name, licence, metrics, data)
    files = to_files(manifest, tensors, f"hf:{target}")
    notes = () if manifest.get("licence") else ('no licence is told: licence="Apache-2.0"',)
    card = files[CARD].decode()

    def uploaded(url: str = "", *more: str) -> Upload:
        sizes = {name: len(content) for name, content in files.items()}
        return Upload(target, private, sizes, card, url, (*notes, *more))

    if dry_run or not writes():
        return uploaded()
    now = _ready(token, target)
    theirs = _page(now, target)
    if theirs and not is_ours(theirs):
        del files[CARD]
        return uploaded(_send(now, target, private, files), f"the {CARD} that was there stays")
    return uploaded(_send(now, target, private, files))


def _ready(token: str | bool | None, repo: str) -> Settings:
    """The hub's address and a token it knows; one short request tells."""
    now = settings(token)
    if not now.token and not now.offline:
        raise GatedError(f"sending to {repo} needs a token, and there is none", _LOGIN)
    try:
        _ask(now, repo, f"{now.endpoint}/api/whoami-v2")
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            raise GatedError(f"{now.endpoint} does not know the token", _LOGIN) from None
        raise DownloadError(
            f"{now.endpoint} answered HTTP {error.code}", "try again later"
        ) from None
    return now


def _ask(now: Settings, repo: str, url: str) -> bytes:
    """What is answered to one request; `OfflineError` within three seconds where nothing answers."""
    later = "mmadapt.save keeps the adapter here; push again where there is a network"
    try:
        return answered(url, now.token)
    except OfflineError as error:
        raise OfflineError(f"nothing was sent to {repo}: {error.message}", later) from None
    except urllib.error.HTTPError:
        raise
    except (OSError, http.client.HTTPException) as error:
        raise OfflineError(
            f"nothing was sent to {repo}: {now.endpoint} cannot be reached ({reason(error)})", later
        ) from None


def _page(now: Settings, repo: str) -> str:
    """The page of the repository; empty where there is none."""
    try:
        return _ask(now, repo, hub.address(repo, "main", CARD)).decode(errors="replace")
    except urllib.error.HTTPError as error:
        if error.code in (401, 404):
            return ""
        raise hub.refused(error, repo, "main", "") from None


def _exists(now: Settings, repo: str) -> bool:
    """Whether the repository is there, for this token's owner to see."""
    try:
        _ask(now, repo, f"{now.endpoint}/api/models/{repo}")
    except urllib.error.HTTPError:
        return False
    return True


def _send(now: Settings, repo: str, private: bool, files: dict[str, bytes]) -> str:
    """Make the repository where there is none, and commit all files at once; the commit's address."""
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    api = HfApi(endpoint=now.endpoint, token=now.token)
    operations = [CommitOperationAdd(name, content) for name, content in files.items()]
    try:
        if not _exists(now, repo):
            api.create_repo(repo, private=private, exist_ok=True)
        return api.create_commit(repo, operations, commit_message="Adapter of mmadapt").commit_url
    except HfHubHTTPError as error:
        code = error.response.status_code
        if code in (401, 403, 404):
            raise GatedError(
                f"this account may not write to {repo} (HTTP {code})", _LOGIN
            ) from None
        raise DownloadError(f"{repo} was refused: {error}", "see its page on the hub") from None
    except OfflineModeIsEnabled as error:
        raise OfflineError(
            f"nothing was sent to {repo}: {error}", "unset HF_HUB_OFFLINE and start anew"
        ) from None
    except Exception as error:
        if (
            not isinstance(error, OSError)
            and type(error).__module__.partition(".")[0] not in _CLIENTS
        ):
            raise
        raise OfflineError(
            f"{repo}: the connection broke ({error})",
            "push again; HF_HUB_DISABLE_XET=1 sends by plain HTTP",
        ) from None
