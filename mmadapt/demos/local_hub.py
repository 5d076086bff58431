"""A hub of models on this machine, so that downloads and uploads can be tried without the real one.

It answers what mmadapt asks of the hub's API, and huggingface_hub for uploads, on a free port of
127.0.0.1, keeps everything in memory, and can be made to fail.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "local"
_FILE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
_MODEL = re.compile(r"/api/models/([^/]+/[^/]+?)(?:/(revision|preupload|commit)/([^/]+))?")
_BLOCK = 1 << 16


@dataclass
class Answer:
    """What was asked for a file, and which of its bytes were sent."""

    path: str
    start: int
    size: int
    sent: int = 0


@dataclass
class _Repository:
    """The files of each commit, the newest last."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def commit(self, files: Mapping[str, bytes]) -> str:
        """Add or replace files; the new commit's 40 hex digits, which follow from all that came before."""
        last = next(reversed(self.commits), "")
        whole = {**self.commits.get(last, {}), **files}
        digests = "".join(
            name + hashlib.sha1(whole[name]).hexdigest() for name in sorted(whole)
        )  # as git names content
        name = hashlib.sha1((last + digests).encode()).hexdigest()
        self.commits[name] = whole
        return name

    def find(self, revision: str) -> str:
        """The commit that a branch or a commit's name stands for; empty where there is none."""
        newest = next(reversed(self.commits), "")
        return newest if revision == "main" else revision if revision in self.commits else ""


class LocalHub(ThreadingHTTPServer):
    """A hub at `url`, until `close()`; `environment` is what makes mmadapt use it.

    `break_after` is how many more bytes of files it sends before its cable is pulled; None mends it.
    `altered` holds other contents for files, by path, which are sent as if they were the right ones.
    `answers` are the files that were asked for, `requests` counts requests of any kind.

        with LocalHub() as hub:
            commit = hub.add("lab/model", {"config.json": b"{}"})
            os.environ |= hub.environment
    """

    daemon_threads = True

    def __init__(self) -> None:
        self.repositories: dict[str, _Repository] = {}
        self.break_after: int | None = None
        self.altered: dict[str, bytes] = {}
        self.answers: list[Answer] = []
        self.requests = 0
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def environment(self) -> dict[str, str]:
        """Variables that lead the hub's clients here, with a token that only this hub knows."""
        return {"HF_ENDPOINT": self.url, "HF_TOKEN": TOKEN, "no_proxy": "127.0.0.1"}

    def add(self, repository: str, files: Mapping[str, bytes]) -> str:
        """Put files into a repository ("org/name"), made where there is none; the commit's name."""
        return self.repositories.setdefault(repository, _Repository()).commit(files)

    def close(self) -> None:
        """Answer no more."""
        self.shutdown()
        self.server_close()

    def __exit__(self, *error: object) -> None:
        self.close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: LocalHub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.server.requests += 1
        if self.server.break_after == 0:  # no answer at all
            self.close_connection = True
            return
        path = unquote(urlsplit(self.path).path)
        file, model = _FILE.fullmatch(path), _MODEL.fullmatch(path)
        repository = self.server.repositories.get((file or model or [path, ""])[1])
        if path == "/api/whoami-v2":
            known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            return self._json({"type": "user", "name": "me", "orgs": []}, 200 if known else 401)
        if repository is None:
            return self._json({"error": "not found"}, 404, "RepoNotFound")
        commit = repository.find((file[2] if file else model and model[3]) or "main")
        if not commit:
            return self._json({"error": "not found"}, 404, "RevisionNotFound")
        if file is None:
            assert model is not None
            return self._json(_information(model[1], commit, repository.commits[commit]))
        content = repository.commits[commit].get(file[3])
        if content is None:
            return self._json({"error": "not found"}, 404, "EntryNotFound")
        self._file(file[3], self.server.altered.get(file[3], content), commit)

    def do_POST(self) -> None:
        hub = self.server
        hub.requests += 1
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._json({"error": "who is this?"}, 401)
        if self.path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            hub.repositories.setdefault(name, _Repository())
            return self._json({"url": f"{hub.url}/{name}", "name": name, "id": name})
        match = _MODEL.fullmatch(urlsplit(self.path).path)
        if match is None or match[1] not in hub.repositories:
            return self._json({"error": "not found"}, 404, "RepoNotFound")
        if match[2] == "preupload":
            plain = {"uploadMode": "regular", "shouldIgnore": False}
            return self._json(
                {"files": [{"path": f["path"], **plain} for f in json.loads(body)["files"]]}
            )
        lines = [json.loads(line) for line in body.splitlines()]
        sent = [line["value"] for line in lines if line["key"] == "file"]
        commit = hub.add(match[1], {f["path"]: base64.b64decode(f["content"]) for f in sent})
        url = f"{hub.url}/{match[1]}/commit/{commit}"
        self._json({"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})

    def _json(self, value: Any, status: int = 200, error: str = "") -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if error:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        self.wfile.write(body)

    def _file(self, path: str, content: bytes, commit: str) -> None:
        """A file, or what is asked for of it, as far as the cable holds."""
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        start = min(int(asked[1]), len(content)) if asked else 0
        answer = Answer(path, start, len(content))
        self.server.answers.append(answer)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("X-Repo-Commit", commit)
        self.end_headers()
        while (done := start + answer.sent) < len(content):
            left = self.server.break_after
            if left == 0:
                self.close_connection = True
                return
            block = content[done : done + (_BLOCK if left is None else min(_BLOCK, left))]
            self.wfile.write(block)
            answer.sent += len(block)
            if left is not None:
                self.server.break_after = left - len(block)


def _information(name: str, commit: str, files: Mapping[str, bytes]) -> dict[str, Any]:
    """What the hub tells of a repository: its files with sizes and digests, the head of its page."""
    listed = []
    for path, content in sorted(files.items()):
        large = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
        listed.append({"rfilename": path, "size": len(content), "lfs": large})
    page = files.get("README.md", b"").decode()
    licence = re.search(r"\A---\n.*?^license: *(\S+)", page, re.MULTILINE | re.DOTALL)
    told = {"license": licence[1]} if licence else {}
    return {"id": name, "sha": commit, "gated": False, "cardData": told, "siblings": listed}
