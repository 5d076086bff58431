"""One file from one of its mirrors: resumed at the byte, verified by digest, whole or not there."""

from __future__ import annotations

import errno
import http.client
import os
import re
import time
import urllib.error
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmadapt.errors import ChecksumError, DownloadError, OfflineError, StorageError, ZooError
from mmadapt.zoo.digests import compare, digest_of, is_page
from mmadapt.zoo.fetch import origin, reason, request, settings
from mmadapt.zoo.files import File, megabytes

BLOCK = 1 << 20
#: seconds before the second, third and fourth try
PAUSES = (0.25, 0.75, 1.5)
#: the longest wait a server may ask for
LONGEST_WAIT = 30.0
AGAIN = {408, 425, 429, 500, 502, 503, 504}
PART = ".part"

Report = Callable[[int], None]


def pause(seconds: float) -> None:
    """Wait before another try."""
    time.sleep(seconds)


def patiently(ask: Callable[[], Any], url: str) -> Any:
    """An answer to `ask`, tried again where the server is busy; silence is an error after one try."""
    for wait in (*PAUSES, None):
        try:
            return ask()
        except urllib.error.HTTPError as error:
            error.close()
            if error.code not in AGAIN:
                raise
            if wait is None:
                raise DownloadError(
                    f"{url} answers HTTP {error.code} again and again", "try again later"
                ) from None
            pause(_asked_to_wait(error, wait, url))
        except (OSError, http.client.HTTPException) as error:
            raise OfflineError(f"{url} cannot be reached: {reason(error)}") from None
    raise AssertionError("unreachable")


def _asked_to_wait(error: urllib.error.HTTPError, default: float, url: str) -> float:
    text = (error.headers or {}).get("Retry-After") or ""
    wait = float(text) if re.fullmatch(r"\d{1,6}(\.\d+)?", text) else default
    if wait > LONGEST_WAIT:
        raise DownloadError(
            f"{url} is busy (HTTP {error.code}) and asks to wait {wait:.0f} s", "try again then"
        )
    return wait


def fetch_file(
    urls: Sequence[str],
    path: Path,
    file: File,
    *,
    token: str | None = None,
    report: Report = lambda done: None,
    part: Path | None = None,
    hub: bool = False,
) -> str:
    """Put `file` at `path` from the first mirror that has it; the sha256 of what is there now.

    What an interrupted attempt has left in `part` is gone on with, by any mirror. `token` goes to the
    hub's endpoint only; where `hub` is asked, its refusals are raised as they are, for it tells why.
    """
    part = part or path.with_name(path.name + PART)
    connect = settings().connect / len(urls)
    failures: list[ZooError] = []
    for url in urls:
        own = token if origin(url) == origin(settings().endpoint) else None
        try:
            digest = _from(_Attempt(url, part, file, own, connect, report, hub))
            os.replace(part, path)
            part.with_name(part.name + ".etag").unlink(missing_ok=True)
            return digest
        except (DownloadError, ChecksumError) as error:
            failures.append(error)
    raise _all_failed(failures, path)


def _all_failed(failures: list[ZooError], path: Path) -> ZooError:
    if len(failures) == 1:
        return failures[0]
    worst = next((f for f in failures if not isinstance(f, OfflineError)), failures[0])
    told = "\n".join(f"  {failure.message}" for failure in failures)
    return type(worst)(f"{path.name}: no mirror has given it:\n{told}", worst.hint)


@dataclass(frozen=True)
class _Attempt:
    """One mirror's try at one file."""

    url: str
    part: Path
    file: File
    token: str | None
    connect: float
    report: Report
    hub: bool

    def have(self) -> int:
        """Bytes that have arrived."""
        return self.part.stat().st_size if self.part.exists() else 0


def _from(attempt: _Attempt) -> str:
    """Fill the part and verify it; the sha256. A part of an earlier run that proves wrong gets one more try."""
    part, file = attempt.part, attempt.file
    earlier = attempt.have() > 0
    while True:
        _fill(attempt)
        digests = digest_of(part)
        wrong = compare(part, file, digests)
        if not wrong:
            with open(part, "rb+") as handle:
                os.fsync(handle.fileno())
            return digests[0]
        page = is_page(part)
        part.unlink()
        if not earlier:
            break
        earlier = False
    if page:
        raise _web_page(attempt.url)
    raise ChecksumError(
        f"{attempt.url}: {wrong}; what came was deleted",
        "try again, or through another network, since this one may alter it",
    )


def _fill(attempt: _Attempt) -> None:
    """Bring the part to its full length, over as many requests as it takes while each gets further."""
    file, url = attempt.file, attempt.url
    begun = furthest = attempt.have()
    tries = 0
    while True:
        attempt.report(attempt.have())
        if file.size is not None and attempt.have() == file.size:
            return
        try:
            if _receive(attempt):
                return
            failure = "the connection was cut"
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == 416:  # the server has less than what is here
                attempt.part.unlink(missing_ok=True)
                failure = "the server's file is shorter than what had arrived"
            elif error.code in AGAIN and tries < len(PAUSES):
                pause(_asked_to_wait(error, PAUSES[tries], url))
                tries += 1
                continue
            else:
                raise _http_error(error, attempt) from None
        except (OSError, http.client.HTTPException) as error:
            number = getattr(error, "errno", None)
            if number in (errno.ENOSPC, errno.EDQUOT):
                raise _full(attempt) from None
            if number in (errno.EROFS, errno.EACCES, errno.EPERM):
                raise
            failure = reason(error)
            if isinstance(error, urllib.error.URLError) and attempt.have() <= begun:
                raise _stopped(attempt, failure) from None  # nobody there: again would be the same
            if isinstance(error, TimeoutError):
                tries += 1  # silence has cost its seconds already
        if attempt.have() > furthest:
            furthest, tries = attempt.have(), 0
        if tries >= len(PAUSES):
            raise _stopped(attempt, failure)
        pause(PAUSES[tries])
        tries += 1


def _receive(attempt: _Attempt) -> bool:
    """Append what one answer brings; whether that was all of it."""
    part, file = attempt.part, attempt.file
    have = attempt.have()
    tag = part.with_name(part.name + ".etag")
    headers: dict[str, str] = {}
    if have and file.pinned:
        headers = {"Range": f"bytes={have}-"}
    elif have and tag.exists():  # only the server can tell whether it is still the same file
        headers = {"Range": f"bytes={have}-", "If-Range": tag.read_text()}
    with request(
        attempt.url, headers=headers, token=attempt.token, connect=attempt.connect
    ) as answer:
        if not _continues(answer, have):
            have = 0
        total = _announced(answer, have)
        _refuse_other(answer, attempt.url, file, total)
        etag = answer.headers.get("ETag") or ""
        if not file.pinned and etag and not etag.startswith("W/"):
            tag.write_text(etag)
        elif not have:  # an earlier answer's tag does not speak of these bytes
            tag.unlink(missing_ok=True)
        with open(part, "r+b" if have else "wb") as out:
            out.seek(have)
            out.truncate()
            while block := answer.read1(BLOCK):
                out.write(block)
                have += len(block)
                attempt.report(have)
    return total is None or have >= total


def _continues(answer: Any, have: int) -> bool:
    begins = re.match(r"bytes (\d+)-", answer.headers.get("Content-Range") or "")
    return answer.status == 206 and begins is not None and int(begins[1]) == have


def _announced(answer: Any, have: int) -> int | None:
    """How long the whole file is, by this answer."""
    length = answer.headers.get("Content-Length") or ""
    return have + int(length) if re.fullmatch(r"\d{1,18}", length) else None


def _refuse_other(answer: Any, url: str, file: File, total: int | None) -> None:
    """Stop before the first byte of what cannot be the file."""
    kind = (answer.headers.get("Content-Type") or "").partition(";")[0].strip().lower()
    if kind == "text/html" and not file.path.endswith((".html", ".htm")):
        raise _web_page(url)
    if total is not None and file.size is not None and total != file.size:
        raise ChecksumError(
            f"{url} offers {total} bytes, expected {file.size}",
            "it is another file or a part of it; nothing was fetched",
        )


def _web_page(url: str) -> ChecksumError:
    return ChecksumError(
        f"{url}: the server sent a web page instead of the file (a login, a notice, or a redirect to one)",
        "open the address in a browser to see what it says",
    )


def _http_error(
    error: urllib.error.HTTPError, attempt: _Attempt
) -> DownloadError | urllib.error.HTTPError:
    if attempt.hub and error.code in (401, 403, 404):
        return error
    if 300 <= error.code < 400:
        return DownloadError(f"{attempt.url} leads astray: {error.reason}")
    return DownloadError(
        f"{attempt.url} answered HTTP {error.code}", "look at the address in a browser"
    )


def _stopped(attempt: _Attempt, failure: str) -> OfflineError:
    have, size = attempt.have(), attempt.file.size
    if not have:
        return OfflineError(f"{attempt.url} cannot be reached: {failure}")
    share = f" ({100 * have / size:.0f} %)" if size else ""
    return OfflineError(
        f"{attempt.url} stopped: {failure}; {megabytes(have)}{share} are kept in {attempt.part}",
        "run this again to go on from there",
    )


def _full(attempt: _Attempt) -> StorageError:
    size = attempt.file.size
    return StorageError(
        f"no room for {attempt.file.path} in {attempt.part.parent}: the disk or a quota is full; "
        f"{megabytes(attempt.have())}{f' of {megabytes(size)}' if size else ''} are kept",
        "`mmadapt zoo rm` frees room, MMADAPT_CACHE moves the cache",
    )
