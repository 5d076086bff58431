"""What a language's file of the MMS models holds: its keys, shapes and tokens, without a backbone."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmadapt.errors import AdapterFileError
from mmadapt.interop.foreign import load_tensors, refuse_keys, some

if TYPE_CHECKING:
    from torch import Tensor

VOCABULARY = "vocab.json"
_FILE = re.compile(r"adapter\.([A-Za-z0-9_-]+)\.(?:safetensors|bin)")
_KEY = re.compile(
    r"(\w+)\.encoder\.layers\.(\d+)\.adapter_layer\.(norm|linear_1|linear_2)\.(weight|bias)"
)
#: word of theirs -> role of a backbone's own adapter, tensor of a Bottleneck
PARTS = {
    "norm.weight": ("norm", "norm_weight"),
    "norm.bias": ("norm.bias", "norm_bias"),
    "linear_1.weight": ("down", "down"),
    "linear_1.bias": ("down.bias", "down_bias"),
    "linear_2.weight": ("up", "up"),
    "linear_2.bias": ("up.bias", "up_bias"),
}
#: of the output layer: theirs -> tensor of a Head
HEAD = {"lm_head.weight": "matrix", "lm_head.bias": "bias"}


@dataclass(frozen=True)
class MMSFile:
    """What a language's file holds, as its shapes say."""

    path: Path
    language: str
    layers: int
    channels: int
    width: int
    classes: int
    #: tokens by id, where a `vocab.json` beside it has the language
    tokens: tuple[str, ...] = ()


def mms_file(path: str | Path, language: str | None = None) -> MMSFile:
    """Look into `adapter.{language}.safetensors` (or `.bin`), in a folder or by its own path.

    Needs no backbone. Raises `AdapterFileError` for another layout, naming the keys.
    """
    return opened(path, language)[0]


def opened(path: str | Path, language: str | None) -> tuple[MMSFile, dict[str, Tensor]]:
    """A language's file and its tensors, checked key by key."""
    path = _found(Path(path).expanduser(), language)
    stored = load_tensors(path)
    matches = {key: _KEY.fullmatch(key) for key in stored if key not in HEAD}
    layers = {int(match[2]) for match in matches.values() if match}
    unexpected = [key for key, match in matches.items() if match is None]
    prefix = next((match[1] for match in matches.values() if match), "wav2vec2")
    wanted = [
        f"{prefix}.encoder.layers.{i}.adapter_layer.{part}"
        for i in sorted(layers)
        for part in PARTS
    ]
    missing = [key for key in (*wanted, *HEAD) if key not in stored]
    refuse_keys(missing, unexpected)
    if not layers:
        raise AdapterFileError(f"{path} holds no adapter of a language, but {some(stored)}")
    width, channels = stored[
        f"{prefix}.encoder.layers.{min(layers)}.adapter_layer.linear_1.weight"
    ].shape
    match = _FILE.fullmatch(path.name)
    spoken = str(match[1]) if match else path.stem
    classes = len(stored["lm_head.weight"])
    tokens = _known_tokens(path.parent / VOCABULARY, spoken, classes)
    return MMSFile(path, spoken, len(layers), channels, width, classes, tokens), stored


def _found(path: Path, language: str | None) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise AdapterFileError(
            f"there is no file or folder {path}",
            "give the folder that holds adapter.{language}.safetensors; huggingface_hub's "
            "hf_hub_download fetches one of a model on the hub",
        )
    files = sorted(match[1] for match in map(_FILE.fullmatch, _listed(path)) if match)
    if language is None and len(set(files)) == 1:
        language = files[0]
    for suffix in ("safetensors", "bin"):
        if language and (path / f"adapter.{language}.{suffix}").is_file():
            return path / f"adapter.{language}.{suffix}"
    raise AdapterFileError(
        f"{path} has no adapter.{language or '{language}'}.safetensors",
        f"it has the languages {', '.join(dict.fromkeys(files))}" if files else "",
    )


def _listed(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir()]


def vocabularies_at(path: Path) -> dict[str, dict[str, int]]:
    """The tokens of all languages; empty where there is no file yet."""
    found = _vocabulary(path)
    if not _by_language(found):
        raise AdapterFileError(
            f"{path} has the tokens of no or of one language without its name",
            "expected {language: {token: id}}",
        )
    return found


def _vocabulary(path: Path) -> Any:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise AdapterFileError(f"{path} is not JSON: {error}") from None


def _by_language(vocabulary: Any) -> bool:
    several = isinstance(vocabulary, dict)
    return several and all(isinstance(tokens, dict) for tokens in vocabulary.values())


def _known_tokens(path: Path, language: str, classes: int) -> tuple[str, ...]:
    """The language's tokens in the order of their ids, checked against the rows of its head."""
    found = _vocabulary(path)
    if not _by_language(found) or language not in found:  # one vocabulary, or of other languages
        return ()
    tokens = tokens_of(found[language], f"{path}, {language!r},")
    if len(tokens) != classes:
        raise AdapterFileError(
            f"{path} has {len(tokens)} tokens of {language!r}, and its output layer has {classes} rows",
            "the two do not belong together; nothing was attached",
        )
    return tokens


def tokens_of(vocabulary: Any, what: str) -> tuple[str, ...]:
    """Tokens in the order of their ids, of a sequence or of {token: id}."""
    if isinstance(vocabulary, Mapping):
        ids = sorted(vocabulary.values())
        if ids != list(range(len(ids))):
            raise AdapterFileError(
                f"{what} has the ids {some(map(str, ids))}, expected 0 to {len(ids) - 1}, each once"
            )
        vocabulary = sorted(vocabulary, key=vocabulary.__getitem__)
    tokens = tuple(vocabulary)
    if not tokens or not all(isinstance(token, str) and token for token in tokens):
        raise AdapterFileError(f"{what} is {vocabulary!r:.60}, expected tokens, one a class")
    return tokens
