"""A real server on this machine that speaks the hub's HTTP API, with faults on demand.

    with Hub() as hub:
        commit = hub.add("org/model", {"config.json": b"{}", "model.safetensors": b"..."})
        hub.faults.cut_after = 1_000_000       # the next answer ends after a megabyte
        ...                                    # HF_ENDPOINT=hub.url; files without a repo: hub.plain["/a.pth"]
        assert [r.range for r in hub.requests] == [None, "bytes=1000000-"]

What it answers was read from huggingface_hub's client and is exercised with it, transformers, open_clip and timm.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

RESOLVE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
MODELS = re.compile(
    r"/api/models/(?P<repo>[^/]+/[^/]+?)(?:/(?P<verb>revision|tree|preupload|commit)/(?P<revision>[^/]+))?"
)
#: what the hub keeps in large-file storage, whose digest its API tells
LARGE = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".npz", ".onnx", ".zip", ".gz", ".model")
LARGE_FILES = re.compile(
    r"/(?P<repo>[^/]+/[^/]+?)(?:\.git/info/lfs/objects/batch|/lfs/(?P<digest>[0-9a-f]{64}))"
)
BLOCK = 65536


def is_large(path: str, content: bytes) -> bool:
    return path.endswith(LARGE) or len(content) > 10_000_000


def git_blob(content: bytes) -> str:
    """The name git gives such a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Repo:
    """A repository: its commits in order, each the files it held."""

    gated: bool = False
    private: bool = False
    tags: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    @property
    def head(self) -> str:
        return next(reversed(self.commits), "0" * 40)

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits.get(self.head, {})

    def commit(self, files: dict[str, bytes]) -> str:
        """A new state of all files; the commit's name follows from it and from what was before."""
        named = b"".join(path.encode() + b"\0" + files[path] + b"\0" for path in sorted(files))
        name = hashlib.sha1(self.head.encode() + named).hexdigest()
        self.commits[name] = dict(files)
        return name

    def find(self, revision: str) -> str | None:
        """The commit a branch, tag or commit's name stands for."""
        revision = self.tags.get(revision, revision)
        return self.head if revision == "main" else revision if revision in self.commits else None


@dataclass
class Faults:
    """What goes wrong. `only` keeps it to paths that hold that text; `times` counts it down."""

    status: int | None = None
    retry_after: str | None = None
    #: ends the connection after that many bytes of a body
    cut_after: int | None = None
    #: sends that many bytes of a body and says nothing more, until the hub closes
    stall_after: int | None = None
    #: sends a body that is this much shorter than the file, and says so
    short_by: int = 0
    ignore_range: bool = False
    no_commit: bool = False
    #: other content for a path (its last part suffices)
    instead: dict[str, bytes] = field(default_factory=dict)
    content_type: str | None = None
    #: a path of this address answers instead: 302
    redirect_to: str | None = None
    #: seconds before each block of 64 kB
    delay: float = 0.0
    only: str = ""
    #: how many more answers `status` and `cut_after` spoil; None: all of them
    times: int | None = None

    def strike(self) -> bool:
        """Whether this answer is to be spoilt."""
        if self.times is None:
            return True
        self.times -= 1
        return self.times >= 0


@dataclass(frozen=True)
class Request:
    """What a client asked."""

    method: str
    path: str
    range: str | None
    token: str | None
    agent: str
    headers: dict[str, str]
    body: bytes = b""


class Hub(ThreadingHTTPServer):
    """The server, on a free port of `host`; `with` closes it. `tokens` may write, `readers` only read."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(
        self,
        tokens: tuple[str, ...] = ("good",),
        readers: tuple[str, ...] = (),
        host: str = "127.0.0.1",
        repos: dict[str, Repo] | None = None,
    ) -> None:
        self.repos = {} if repos is None else repos
        self.plain: dict[str, bytes] = {}
        #: how large files are to be sent: with the commit, or "lfs" before it
        self.mode = "regular"
        self.large: dict[str, bytes] = {}
        self.tokens, self.readers = tokens, readers
        self.faults = Faults()
        self.requests: list[Request] = []
        self.closing = threading.Event()
        self.guard = threading.Lock()
        super().__init__((host, 0), _Handler)
        self.url = f"http://{host}:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def add(
        self, repo: str, files: dict[str, bytes], gated: bool = False, private: bool = False
    ) -> str:
        """Put `files` into a repository, made where there is none; the commit's 40 hex digits."""
        kept = self.repos.setdefault(repo, Repo(gated=gated, private=private))
        return kept.commit({**kept.files, **files})

    def fetched(self, name: str = "") -> list[Request]:
        """The GET requests for paths that hold `name`."""
        return [r for r in self.requests if r.method == "GET" and name in r.path]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news."""

    def __exit__(self, *error: object) -> None:
        self.closing.set()
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    # ---- answers

    def _answer(self) -> None:
        hub, faults = self.server, self.server.faults
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        asked = Request(
            self.command,
            self.path,
            self.headers.get("Range"),
            token,
            self.headers.get("User-Agent", ""),
            dict(self.headers),
            body,
        )
        with hub.guard:
            hub.requests.append(asked)
            spoilt = faults.only in self.path and faults.status and faults.strike()
        if spoilt:
            wait = {"Retry-After": faults.retry_after} if faults.retry_after else {}
            return self._send(faults.status or 500, b"", **wait)
        parts = urlsplit(self.path)
        path = (
            self.path if self.path in hub.plain else unquote(parts.path)
        )  # whole, as proxies get it
        if path in hub.plain:
            return self._file(path, hub.plain[path], {})
        if match := RESOLVE.fullmatch(path):
            return self._resolve(match, token)
        if match := LARGE_FILES.fullmatch(path):
            return self._large(match["repo"], match["digest"], token, body)
        if path.startswith("/api/"):
            return self._api(path, parse_qs(parts.query), token, body)
        self._send(404)

    def _send(self, code: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: Any, code: int = 200) -> None:
        self._send(code, json.dumps(value).encode(), Content_Type="application/json")

    def _fail(self, code: int, error: str, message: str = "", **headers: str) -> None:
        self._send(
            code,
            json.dumps({"error": message or error}).encode(),
            X_Error_Code=error,
            X_Error_Message=message or error,
            Content_Type="application/json",
            **headers,
        )

    def _repo(self, name: str, token: str | None) -> Repo | None:
        """The repository, where whoever asks may know of it; else the answer is sent."""
        hub = self.server
        known = token in (*hub.tokens, *hub.readers)
        repo = hub.repos.get(name)
        if repo is None or (repo.private and not known):
            self._fail(404 if known else 401, "RepoNotFound", "Repository not found")
            return None
        return repo

    # ---- files

    def _resolve(self, match: re.Match[str], token: str | None) -> None:
        hub = self.server
        repo = self._repo(match["repo"], token)
        if repo is None:
            return
        if repo.gated and token not in (*hub.tokens, *hub.readers):
            message = f"Access to model {match['repo']} is restricted."
            return self._fail(403 if token else 401, "GatedRepo", message)
        commit = repo.find(match["revision"])
        if commit is None:
            return self._fail(404, "RevisionNotFound", f"Invalid rev id: {match['revision']}")
        content = repo.commits[commit].get(match["path"])
        if content is None:
            return self._fail(404, "EntryNotFound", "Entry not found", X_Repo_Commit=commit)
        large = is_large(match["path"], content)
        tag = hashlib.sha256(content).hexdigest() if large else git_blob(content)
        headers = {"ETag": f'"{tag}"'}
        if large:
            headers |= {"X-Linked-Size": str(len(content)), "X-Linked-Etag": f'"{tag}"'}
        if not hub.faults.no_commit:
            headers["X-Repo-Commit"] = commit
        self._file(match["path"], content, headers)

    def _file(self, path: str, content: bytes, headers: dict[str, str]) -> None:
        faults = self.server.faults
        concerned = faults.only in self.path.partition("?")[0]
        if concerned and faults.redirect_to:
            return self._send(302, b"", Location=faults.redirect_to + self.path, **headers)
        total = len(content)
        if concerned:
            content = faults.instead.get(path, faults.instead.get(path.split("/")[-1], content))
            content = content[: len(content) - faults.short_by]
        headers = {"Accept-Ranges": "bytes", **headers}
        if concerned and faults.content_type:
            headers["Content-Type"] = faults.content_type
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        start = 0 if asked is None or (concerned and faults.ignore_range) else int(asked[1])
        if start and start >= len(content):
            return self._send(416, b"", Content_Range=f"bytes */{total}")
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{total}"
        self.send_response(206 if start else 200)
        for name, value in {"Content-Length": str(len(content) - start), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = faults.cut_after
        if not (concerned and cut is not None and faults.strike()):
            cut = None
        self._body(content[start:], cut, faults.stall_after if concerned else None)

    def _body(self, content: bytes, cut: int | None, stall: int | None) -> None:
        hub = self.server
        end = min(x for x in (len(content), cut, stall) if x is not None)
        for i in range(0, end, BLOCK):
            if hub.faults.delay:
                hub.closing.wait(hub.faults.delay)
            self.wfile.write(content[i : min(i + BLOCK, end)])
        if stall is not None:
            hub.closing.wait()
        if end < len(content):
            self.close_connection = True

    def _large(self, name: str, digest: str | None, token: str | None, body: bytes) -> None:
        """Large-file storage: where to send a file, then the file itself, checked by its digest."""
        hub = self.server
        if digest is not None:
            if hashlib.sha256(body).hexdigest() != digest:
                return self._fail(400, "", "this is not the file that was announced")
            hub.large[digest] = body
            return self._send(200)
        if token not in hub.tokens:
            return self._fail(403 if token else 401, "", "you have no right to write here")
        objects = [
            {**one, "actions": {"upload": {"href": f"{hub.url}/{name}/lfs/{one['oid']}"}}}
            for one in json.loads(body)["objects"]
        ]
        self._json({"transfer": "basic", "objects": objects})

    # ---- the API

    def _api(self, path: str, query: dict[str, list[str]], token: str | None, body: bytes) -> None:
        hub = self.server
        if path == "/api/whoami-v2":
            if token not in (*hub.tokens, *hub.readers):
                return self._fail(401, "", "Invalid credentials in Authorization header")
            role = "write" if token in hub.tokens else "read"
            auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": role}}
            return self._json({"type": "user", "name": "me", "orgs": [], "auth": auth})
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self._create(json.loads(body), token)
        match = MODELS.fullmatch(path)
        if match is None:
            return self._send(404)
        repo = self._repo(match["repo"], token)
        if repo is None:
            return
        if match["verb"] in ("preupload", "commit") and token not in hub.tokens:
            return self._fail(403 if token else 401, "", "you have no right to write here")
        if match["verb"] == "preupload":
            asked = json.loads(body)["files"]
            known = {name: git_blob(content) for name, content in repo.files.items()}
            return self._json(
                {
                    "files": [
                        {
                            "path": file["path"],
                            "uploadMode": hub.mode if file["path"].endswith(LARGE) else "regular",
                            "shouldIgnore": False,
                            "oid": known.get(file["path"]),
                        }
                        for file in asked
                    ]
                }
            )
        if match["verb"] == "commit":
            return self._commit(match["repo"], repo, body)
        commit = repo.find(match["revision"] or "main")
        if commit is None:
            return self._fail(404, "RevisionNotFound", f"Invalid rev id: {match['revision']}")
        if match["verb"] == "tree":
            return self._json(list(_tree(repo.commits[commit])))
        self._json(_information(match["repo"], repo, commit, blobs="blobs" in query))

    def _create(self, asked: dict[str, Any], token: str | None) -> None:
        hub = self.server
        if token not in hub.tokens:
            return self._fail(403 if token else 401, "", "you have no right to create this")
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if name in hub.repos:
            return self._json({"url": f"{hub.url}/{name}", "error": "exists already"}, 409)
        private = asked.get("private") or asked.get("visibility") == "private"
        hub.repos[name] = Repo(private=bool(private))
        self._json({"url": f"{hub.url}/{name}", "name": name, "id": name})

    def _commit(self, name: str, repo: Repo, body: bytes) -> None:
        files = dict(repo.files)
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.server.large[value["oid"]]
            elif item["key"] == "deletedFile":
                files.pop(value["path"], None)
            elif item["key"] != "header":
                return self._fail(400, "", f"this hub takes no {item['key']}")
        commit = repo.commit(files)
        url = f"{self.server.url}/{name}/commit/{commit}"
        self._json({"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})


def _tree(files: dict[str, bytes]) -> Iterator[dict[str, Any]]:
    for path, content in sorted(files.items()):
        item = {"type": "file", "path": path, "size": len(content), "oid": git_blob(content)}
        yield item | _large(path, content, "oid")


def _large(path: str, content: bytes, key: str) -> dict[str, Any]:
    if not is_large(path, content):
        return {}
    digest = hashlib.sha256(content).hexdigest()
    return {"lfs": {key: digest, "size": len(content), "pointerSize": 130}}


def _information(name: str, repo: Repo, commit: str, blobs: bool) -> dict[str, Any]:
    siblings: list[dict[str, Any]] = []
    for path, content in sorted(repo.commits[commit].items()):
        more = {"size": len(content), "blobId": git_blob(content)} if blobs else {}
        large = _large(path, content, "sha256") if blobs else {}
        siblings.append({"rfilename": path, **more, **large})
    card = repo.files.get("README.md", b"")
    return {
        "id": name,
        "modelId": name,
        "sha": commit,
        "private": repo.private,
        "gated": "manual" if repo.gated else False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": [],
        "cardData": _front_matter(card),
        "siblings": siblings,
    }


def _front_matter(card: bytes) -> dict[str, str]:
    """The plain `key: value` lines at the head of a model card."""
    match = re.match(rb"---\n(.*?)\n---", card, re.DOTALL)
    lines = match[1].decode().splitlines() if match else []
    pairs = (line.split(":", 1) for line in lines if re.match(r"\w[\w-]*: *\S", line))
    return {key: value.strip() for key, value in pairs}


def wait_until(true: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait for something another thread or process does; an error when it never does."""
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            raise AssertionError("what was waited for did not happen")
        time.sleep(0.005)
