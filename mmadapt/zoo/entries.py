"""Zoo entries: what is known of a backbone or an adapter before a byte of it is read."""

from __future__ import annotations

import html
import re
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from mmadapt.core.table import count
from mmadapt.errors import WrongBackboneError, ZooError, did_you_mean
from mmadapt.zoo.files import File, megabytes, require_inside

NAME = re.compile(r"[a-z0-9][a-z0-9.+-]*(/[a-z0-9][a-z0-9.+-]*){1,4}")
HUB_NAME = re.compile(r"hf:[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
SOURCES = ("bundled", "hf", "manual", "urls")
#: licences of weights that allow any use with attribution at most
PERMISSIVE = {"Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "CC0-1.0", "MIT"}


@dataclass(frozen=True)
class Entry:
    """One backbone or published adapter: how to get it, how to build it, and on which terms.

    `source` is one of `{"hf": "org/repo"}`, `{"urls": [...]}` with mirrors in order (whole addresses of
    a single file, or folders ending in `/`), `{"bundled": "tiny/clip"}` and `{"manual": "page"}` for what
    only a browser can fetch. `builder` is `provider:argument`, empty where nothing here builds it. `licence` speaks of the weights:
    `weights` (SPDX, or "unknown"), `declared_by`, and where known `url`, `restrictions`, `gated`, `note`.
    `globals` are the only classes a pickled file may name beyond tensors.

        zoo.register(Entry("lab/vit-s", "our ViT", "timm:vit_small_patch16_224", {"urls": ["https://…"]},
                           licence={"weights": "MIT", "declared_by": "us"}, files=(File("vit.pth"),)))
    """

    name: str
    summary: str
    builder: str
    source: dict[str, Any]
    files: tuple[File, ...] = ()
    licence: dict[str, Any] = field(default_factory=dict)
    kind: Literal["backbone", "adapter"] = "backbone"
    parameters: int | None = None
    revision: str = ""
    aliases: tuple[str, ...] = ()
    modality: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    anatomy: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    input: dict[str, Any] = field(default_factory=dict)
    output: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    recipe: str = ""
    cite: str = ""
    homepage: str = ""
    base: str = ""
    base_sha256: str = ""
    requires: dict[str, str] = field(default_factory=dict)
    globals: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("files", "aliases", "modality", "tasks", "globals"):
            if not isinstance(getattr(self, name), (list, tuple)):
                raise self._wrong(name, "expected several, as in a list")
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not isinstance(self.name, str) or not (
            (NAME.fullmatch(self.name) and "--" not in self.name) or HUB_NAME.fullmatch(self.name)
        ):
            raise ZooError(
                f"{self.name!r} is no zoo name",
                "family/variant or family/variant/tag, of lower-case letters, digits, '.', '+' and '-'",
            )
        for name, kind in _TYPES.items():
            if not isinstance(getattr(self, name), kind):
                raise self._wrong(name, f"expected {kind.__name__}")
        if self.kind not in ("backbone", "adapter"):
            raise self._wrong("kind", "expected 'backbone' or 'adapter'")
        if self.parameters is not None and (
            type(self.parameters) is not int or self.parameters < 0
        ):
            raise self._wrong("parameters", "expected a count")
        if not all(isinstance(file, File) for file in self.files):
            raise self._wrong("files", "expected File objects")
        if not isinstance(self.licence.get("weights"), str) or not self.licence["weights"]:
            raise self._wrong(
                "licence", "expected the licence of the weights under 'weights', or 'unknown'"
            )
        if not isinstance(self.licence.get("declared_by"), str):
            raise self._wrong("licence", "expected who says so under 'declared_by'")
        self._check_source()

    def _check_source(self) -> None:
        if len(self.source) != 1 or next(iter(self.source)) not in SOURCES:
            raise self._wrong("source", f"expected one of {', '.join(SOURCES)}")
        kind, where = next(iter(self.source.items()))
        if kind == "hf":
            if not isinstance(where, str) or not HUB_NAME.fullmatch(f"hf:{where}"):
                raise self._wrong("source", "expected {'hf': 'org/repo'}")
        elif kind == "urls":
            if not isinstance(where, (list, tuple)) or not where:
                raise self._wrong("source", "expected a list of addresses")
            if not all(
                isinstance(url, str) and re.match(r"https?://[^/]", url, re.IGNORECASE)
                for url in where
            ):
                raise self._wrong("source", "expected addresses that start with https://")
            if not self.files:
                raise self._wrong("files", "addresses need the files they lead to")
            if len(self.files) > 1 and not all(url.endswith("/") for url in where):
                raise self._wrong("source", "several files need folders that end in '/'")
        elif not isinstance(where, str):
            raise self._wrong("source", "expected text")
        elif kind == "bundled":
            require_inside(where)

    def _wrong(self, name: str, hint: str) -> ZooError:
        return ZooError(f"{self.name}: {name} is {getattr(self, name)!r}", hint)

    @property
    def size(self) -> int | None:
        """Bytes of all files, None where that is not known before a download."""
        sizes = [file.size for file in self.files]
        return None if not sizes or None in sizes else sum(size or 0 for size in sizes)

    @property
    def pinned(self) -> bool:
        """Whether size and digest of every file are known, so that no other content can pass for it."""
        return bool(self.files) and all(file.pinned for file in self.files)

    @property
    def sha256(self) -> str:
        """Digest of the file that holds the weights; empty where it is not pinned."""
        return next((file.sha256 for file in self.files if file.role == "weights"), "")

    @property
    def page(self) -> str:
        """Where a person reads about it."""
        if "hf" in self.source:
            return f"https://huggingface.co/{self.source['hf']}"
        return self.homepage or self.source.get("manual") or self.source.get("urls", [""])[0]

    def require_base(self, other: Entry | None) -> None:
        """Refuse an adapter for another backbone than `other`; one of no zoo, or of the hub, may be any.

        A backbone's variants for several libraries hold the same weights and differ in their last part.
        """
        if not self.base or other is None or other.name.startswith("hf:"):
            return
        if other.name == self.base or other.name.startswith((f"{self.base}/", f"{self.base}-")):
            return
        if self.base_sha256 and self.base_sha256 == other.sha256:
            return
        raise WrongBackboneError(
            f"{self.name} was made for {self.base}, this is {other.name}",
            f'load it into mmadapt.load("{self.base}")',
        )

    def terms(self) -> str:
        """Size and licence in one line, as it is shown before a download."""
        size = "size not known yet" if self.size is None else megabytes(self.size)
        limits = self.licence.get("restrictions") or []
        gated = ["access by request"] if self.licence.get("gated") else []
        return ", ".join([size, f"licence {self.licence['weights']}", *limits, *gated])

    def __repr__(self) -> str:
        numbers = "" if self.parameters is None else f"{count(self.parameters)} parameters, "
        if self.kind == "adapter":
            load = f'mmadapt.load_adapter(backbone, "{self.name}")'
        else:
            load = f'mmadapt.load("{self.name}")'
        pinned = "" if self.pinned else "\n  not pinned: the first download records what it got"
        return f"{self.name}: {self.summary}\n  {numbers}{self.terms()}\n  load: {load}{pinned}"

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(self.card())}</pre>"

    def card(self) -> str:
        """Everything known, as text."""
        lines = [repr(self)]
        for name in ("aliases", "modality", "tasks", "anatomy", "builder", "base", "revision"):
            value = getattr(self, name)
            if value:
                lines.append(f"  {name}: {value if isinstance(value, str) else ', '.join(value)}")
        kind, where = next(iter(self.source.items()))
        shown = where if isinstance(where, str) else ", ".join(where)
        lines += [f"  from: {kind} {shown}", f"  page: {self.page}"] if kind != "bundled" else []
        for key, value in sorted(self.licence.items()):
            if key not in ("weights", "gated", "restrictions"):
                lines.append(f"  licence {key.replace('_', ' ')}: {value}")
        for name in ("input", "output"):
            for key, value in getattr(self, name).items():
                lines.append(f"  {name} {key}: {value}")
        for file in self.files:
            size = "size unknown" if file.size is None else megabytes(file.size)
            lines.append(f"  {file.path}  {size}  {file.sha256 or 'no digest known'}")
        lines += [f"  cite: {self.cite}"] if self.cite else []
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """What a manifest holds: fields that say something."""
        empty = {item.name: item for item in fields(self)}
        data: dict[str, Any] = {}
        for name, value in asdict(self).items():
            if name == "files":
                value = [
                    {key: part for key, part in file.items() if part not in (None, "")}
                    for file in value
                ]
            if name in ("name", "summary", "source", "licence") or value not in (
                None,
                "",
                (),
                [],
                {},
            ):
                data[name] = list(value) if isinstance(value, tuple) else value
        if data["kind"] == empty["kind"].default:
            del data["kind"]
        return data


_TYPES: dict[str, type] = {
    "summary": str,
    "builder": str,
    "source": dict,
    "licence": dict,
    "revision": str,
    "anatomy": str,
    "config": dict,
    "input": dict,
    "output": dict,
    "metrics": dict,
    "recipe": str,
    "cite": str,
    "homepage": str,
    "base": str,
    "base_sha256": str,
    "requires": dict,
}


def from_json(data: Any, where: str = "manifest") -> Entry:
    """An entry from what a manifest holds; unknown fields and wrong values are named."""
    if not isinstance(data, dict) or not isinstance(data.get("name"), str):
        raise ZooError(f"{where}: expected an entry with a name, got {str(data)[:60]!r}")
    known = [item.name for item in fields(Entry)]
    for key in data:
        if key not in known:
            raise ZooError(f"{where}: {data['name']}: unknown field {key!r}", _near(key, known))
    lists = {
        name: data[name]
        for name in ("files", "aliases", "modality", "tasks", "globals")
        if name in data
    }
    for name, value in lists.items():
        kind = dict if name == "files" else str
        if not isinstance(value, list) or not all(isinstance(part, kind) for part in value):
            raise ZooError(f"{where}: {data['name']}: {name} is no list of {kind.__name__}")
    missing = {"summary", "source", "licence"} - set(data)
    if missing:
        raise ZooError(f"{where}: {data['name']}: no {', '.join(sorted(missing))}")
    try:
        files = tuple(_file(part) for part in data.get("files", ()))
        return Entry(**{"builder": "", **data, "files": files})
    except ZooError as error:
        raise ZooError(f"{where}: {error.message}", error.hint) from None


def _file(data: dict[str, Any]) -> File:
    known = [item.name for item in fields(File)]
    for key in data:
        if key not in known:
            raise ZooError(f"a file has the unknown field {key!r}", _near(key, known))
    if not isinstance(data.get("path"), str) or not isinstance(data.get("role", ""), str):
        raise ZooError(f"a file has no path or a role that is no text: {str(data)[:80]}")
    return File(**data)


def _near(key: str, known: list[str]) -> str:
    return did_you_mean(str(key), known) or "this mmadapt may be older than the manifest"
