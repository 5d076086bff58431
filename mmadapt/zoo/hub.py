"""What a repository on the hub holds: its commit, its files with sizes and digests, its terms."""

from __future__ import annotations

import json
import urllib.error
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from mmadapt.errors import DownloadError, GatedError, ZooError
from mmadapt.zoo.download import patiently
from mmadapt.zoo.fetch import content, settings
from mmadapt.zoo.files import COMMIT, File, role_of


@dataclass(frozen=True)
class Listing:
    """A repository at one commit."""

    commit: str
    files: tuple[File, ...]
    licence: str = "unknown"


def address(repo: str, revision: str, path: str) -> str:
    """Where a file of a repository is fetched from; the endpoint is read now."""
    return f"{settings().endpoint}/{repo}/resolve/{quote(revision, safe='')}/{quote(path)}"


def listing(repo: str, revision: str, token: str | None, name: str = "") -> Listing:
    """Ask the hub which commit `revision` is and what it holds. `name` is what errors speak of."""
    url = f"{settings().endpoint}/api/models/{repo}/revision/{quote(revision, safe='')}?blobs=true"
    try:
        data = json.loads(patiently(lambda: content(url, token), url))
    except urllib.error.HTTPError as error:
        raise refused(error, repo, revision, name) from None
    except ValueError as error:
        raise DownloadError(
            f"{url} answered with no JSON ({error})", "is HF_ENDPOINT the address of a hub?"
        ) from None
    return _listing(data, url)


def _listing(data: Any, url: str) -> Listing:
    """The answer of the hub, checked: its file names become paths here."""
    try:
        commit = data["sha"]
        if not COMMIT.fullmatch(commit):
            raise ValueError(f"no commit: {str(commit)[:60]!r}")
        files = []
        for item in data["siblings"]:
            lfs = item.get("lfs") or {}
            blob = "" if lfs.get("sha256") else item.get("blobId") or ""
            files.append(
                File(
                    item["rfilename"],
                    role_of(item["rfilename"]),
                    lfs.get("size", item.get("size")),
                    lfs.get("sha256") or "",
                    blob,
                )
            )
        card = data.get("cardData")
        licence = (card.get("license") if isinstance(card, dict) else None) or "unknown"
        return Listing(commit, tuple(files), str(licence)[:80])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DownloadError(f"{url} answered with what is no repository: {error}") from None
    except ZooError as error:
        raise DownloadError(f"{url}: {error.message}", error.hint) from None


def refused(error: urllib.error.HTTPError, repo: str, revision: str, name: str) -> ZooError:
    """What the hub's refusal means, and the way on."""
    code = error.headers.get("X-Error-Code", "") if error.headers else ""
    page = f"{settings().endpoint}/{repo}"
    name = name or f"hf:{repo}"
    if code == "GatedRepo" or (error.code == 403 and code != "RepoNotFound"):
        return GatedError(
            f"{name}: the owner of {repo} asks for consent before its files may be fetched "
            f"(HTTP {error.code})",
            f"accept the terms on {page}, log in with `hf auth login` or set HF_TOKEN, and run this again",
        )
    if code == "RevisionNotFound":
        return DownloadError(
            f"{name}: {repo} has no revision {revision!r}", f"{page}/commits/main lists them"
        )
    if code == "EntryNotFound":
        return DownloadError(f"{name}: {repo} has no such file at {revision}: {error.url}", page)
    if error.code in (401, 404):
        return DownloadError(
            f"{name}: the hub shows no repository {repo} (HTTP {error.code}); it may have moved, or be private",
            f"look at {page}; a private one needs `hf auth login` or HF_TOKEN",
        )
    return DownloadError(f"{name}: {error.url} answered HTTP {error.code}", page)
