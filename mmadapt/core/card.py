"""The page that lies beside an adapter: what it is, what it was made from, how to load and to cite it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmadapt.adapter import Adapter, from_json
from mmadapt.core.site import stem
from mmadapt.core.table import count

CARD = "README.md"
_MARK = "<!-- written by mmadapt from adapter.json; saving again writes it anew -->"


def may_replace(path: Path) -> bool:
    """Whether there is no page yet, or one that `card` wrote."""
    return not path.exists() or is_ours(path.read_text(encoding="utf-8", errors="replace"))


def is_ours(page: str) -> bool:
    """Whether `card` wrote a page."""
    return _MARK in page


def card(manifest: Mapping[str, Any], source: str = "") -> str:
    """The page of an adapter with this manifest: of a hub id, or of the folder it lies in."""
    adapters = [
        from_json({key: value for key, value in item.items() if key != "sites"})
        for item in manifest["adapters"]
    ]
    rows = "\n".join(f"| {what} | {_cell(text)} |" for what, text in _facts(manifest, adapters))
    name, backbone = manifest["name"], manifest["backbone"]
    zoo = backbone.get("zoo")
    load = (
        f"backbone = mm.load({json.dumps(zoo)})"
        if zoo
        else f"backbone = ...  # of class {backbone['class']}"
    )
    where = f"{json.dumps(source)})" if source else '"./adapter")  # the folder of this page'
    papers = dict.fromkeys(paper for adapter in adapters for paper in adapter.source.split("; "))
    return f"""---
{_front(manifest, adapters)}
---
{_MARK}

# {name}

{" and ".join(dict.fromkeys(type(one).__name__ for one in adapters))} for {zoo or backbone["class"]}.

| | |
|---|---|
{rows}

## How to load

```python
import mmadapt as mm

{load}
mm.load_adapter(backbone, {where}
```

Another backbone is refused. `mm.set_active`, `mm.disabled` and `mm.detach` switch it.

## How to cite

{_listed(papers) or "The method has no paper of its own."}
"""


def _front(manifest: Mapping[str, Any], adapters: list[Adapter]) -> str:
    """The head of the page as the hub reads it."""
    tags = ["mmadapt", "adapter", *dict.fromkeys(adapter.method for adapter in adapters)]
    lines = ["library_name: mmadapt", "tags:", *(f"- {tag}" for tag in tags)]
    licence = str(manifest.get("licence") or "")
    if re.fullmatch(r"[\w.+-]+", licence):
        lines.append(f"license: {licence.lower()}")
    elif licence:
        lines.append("license: other")
    base = manifest["backbone"].get("hub")
    if base:
        lines += [f"base_model: {base}", "base_model_relation: adapter"]
    return "\n".join(lines)


def _facts(manifest: Mapping[str, Any], adapters: list[Adapter]) -> Iterator[tuple[str, Any]]:
    backbone = manifest["backbone"]
    yield "backbone", f"{backbone.get('zoo') or 'not of the zoo'}, `{backbone['class']}`"
    if backbone.get("revision"):
        yield "revision of the backbone", backbone["revision"]
    yield "sha256 of its weights", backbone.get("sha256") or "not told"
    for adapter, item in zip(adapters, manifest["adapters"], strict=True):
        stems = dict.fromkeys(stem(site) for site in item["sites"])
        places = ", ".join(f"`{one}`" for one in stems)
        yield "method", f"`{adapter!r}` at {len(item['sites'])} sites: {places}"
    sizes = [_size(shape) for shape in manifest["tensors"].values()]
    yield "parameters", count(sum(sizes))
    yield "trained on", manifest.get("data") or "not told"
    metrics = manifest.get("metrics") or {}
    yield "metrics", ", ".join(f"{key} {value}" for key, value in metrics.items()) or "not told"
    yield "licence", manifest.get("licence") or "not told"
    for part in ("input", "origin"):
        if manifest.get(part):
            yield part, str(manifest[part])
    yield "made with", ", ".join(f"{key} {value}" for key, value in manifest["versions"].items())


def _size(shape: str) -> int:
    """How many numbers a tensor printed as "f32[8,16]" has."""
    total = 1
    for size in filter(None, shape.partition("[")[2].rstrip("]").split(",")):
        total *= int(size)
    return total


def _cell(text: Any) -> str:
    return re.sub(r"\s+", " ", str(text)).replace("|", "\\|").replace("<", "&lt;")


def _listed(papers: Mapping[str, None]) -> str:
    return "\n".join(f"- {paper}" for paper in papers if paper)
