"""Fill what can be measured into `zoo/manifest.json`: revisions, sizes, digests, numbers of the tiny weights.

    python zoo/pin.py                    # everything; needs network, and HF_TOKEN for gated repositories
    python zoo/pin.py tiny/clip sam2/*   # entries whose names match

Run it after a recipe has rebuilt tiny weights, and when upstream has moved. What people wrote in the manifest
stays; an entry that cannot be reached is left as it is and named.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mmadapt.errors import MmadaptError
from mmadapt.zoo import hub
from mmadapt.zoo.digests import digest_of
from mmadapt.zoo.entries import Entry, from_json
from mmadapt.zoo.fetch import settings
from mmadapt.zoo.files import File, choose, role_of
from mmadapt.zoo.obtain import get
from mmadapt.zoo.places import read_record

ZOO = Path(__file__).resolve().parent
ROLES = {"metrics.json": "metrics", "clips.opus": "clips", "clips.json": "clips"}


def pinned(entry: Entry) -> Entry:
    """The entry with what its files say."""
    if "bundled" in entry.source:
        return _bundled(entry)
    if "hf" in entry.source:
        return _hub(entry)
    return _urls(entry) if "urls" in entry.source else entry


def _bundled(entry: Entry) -> Entry:
    from safetensors import safe_open

    folder = ZOO / entry.source["bundled"]
    files = []
    for path in sorted(folder.iterdir()):
        role = ROLES.get(path.name) or role_of(path.name)
        files.append(File(path.name, role, path.stat().st_size, digest_of(path)[0]))
    with safe_open(folder / "model.safetensors", framework="np") as weights:
        parameters = sum(weights.get_tensor(key).size for key in weights.keys())  # noqa: SIM118
    metrics = json.loads((folder / "metrics.json").read_text())
    return replace(entry, files=tuple(files), parameters=parameters, metrics=metrics)


def _hub(entry: Entry) -> Entry:
    """The commit that main is now, or the one that is pinned, and the files it has."""
    revision = entry.revision or "main"
    found = hub.listing(entry.source["hf"], revision, settings().token, entry.name)
    there = {file.path: file for file in found.files}
    wanted = entry.files or choose(found.files, None)
    missing = [file.path for file in wanted if file.path not in there]
    if missing:
        raise MmadaptError(f"{entry.name}: {entry.source['hf']} has no {', '.join(missing)}")
    said = found.licence.lower()
    if said != "unknown" and said not in (entry.licence["weights"].lower(), "other"):
        print(
            f"{entry.name}: the hub says {found.licence}, the manifest {entry.licence['weights']}"
        )
    files = tuple(replace(there[file.path], role=file.role) for file in wanted)
    if entry.kind == "adapter" and not entry.files:
        files = ()  # a collection, of which patterns choose
    return replace(entry, revision=found.commit, files=files)


def _urls(entry: Entry) -> Entry:
    """Fetched where a size or digest is not known yet, and not kept."""
    if all(file.size is not None and file.sha256 for file in entry.files):
        return entry
    with tempfile.TemporaryDirectory() as folder:
        record = read_record(get(entry, to=folder))
        assert record is not None
        return replace(entry, files=record.files)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("patterns", nargs="*", default=["*"])
    parser.add_argument("--manifest", type=Path, default=ZOO / "manifest.json")
    chosen = parser.parse_args(arguments)
    data = json.loads(chosen.manifest.read_text())
    entries = [from_json(item) for item in data["entries"]]
    failed = 0
    for place, entry in enumerate(entries):
        if not any(fnmatchcase(entry.name, pattern) for pattern in chosen.patterns):
            continue
        try:
            entries[place] = pinned(entry)
        except MmadaptError as error:
            failed += 1
            print(f"left as it was: {error}", file=sys.stderr)
    data["entries"] = [entry.to_json() for entry in sorted(entries, key=lambda entry: entry.name)]
    text = json.dumps(data, indent=1, sort_keys=True, ensure_ascii=False)
    chosen.manifest.write_text(text + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
