"""Fill sizes, digests, parameter counts and measured numbers into `zoo/manifest.json`.

    python zoo/recipes/pin.py

Run it after a recipe has rebuilt tiny weights; what people wrote in the manifest stays.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

ZOO = Path(__file__).resolve().parent.parent
ROLES = {
    "model.safetensors": "weights",
    "config.json": "config",
    "open_clip_config.json": "config",
    "preprocessor_config.json": "preprocessing",
    "bpe.txt.gz": "tokenizer",
    "chat_template.jinja": "tokenizer",
    "generation_config.json": "config",
    "tokenizer.json": "tokenizer",
    "tokenizer_config.json": "tokenizer",
    "vocab.json": "tokenizer",
    "metrics.json": "metrics",
    "clips.opus": "clips",
    "clips.json": "clips",
}


def pinned(entry: dict) -> dict:
    """The entry with what its files say."""
    from safetensors import safe_open

    folder = ZOO / entry["source"]["bundled"]
    files = []
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        files.append(
            {"path": path.name, "role": ROLES[path.name], "size": len(content), "sha256": digest}
        )
    with safe_open(folder / "model.safetensors", framework="np") as weights:
        parameters = sum(weights.get_tensor(key).size for key in weights.keys())  # noqa: SIM118
    metrics = json.loads((folder / "metrics.json").read_text())
    return {**entry, "files": files, "parameters": parameters, "metrics": metrics}


def main() -> None:
    manifest = ZOO / "manifest.json"
    data = json.loads(manifest.read_text())
    data["entries"] = [pinned(entry) for entry in data["entries"]]
    manifest.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
