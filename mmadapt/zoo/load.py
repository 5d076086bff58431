"""From a zoo name or a folder to a backbone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmadapt.core.backbone import Backbone
from mmadapt.core.known import KNOWN
from mmadapt.errors import MissingDependencyError, ZooError
from mmadapt.zoo.manifest import Entry, data_folder, entry

if TYPE_CHECKING:
    from torch import nn


#: a feature extractor of transformers -> "module:class" of ours, with `from_folder`
PREPROCESS = {"ASTFeatureExtractor": "mmadapt.tasks.audio.spectrum:SpectrumFeatures"}


def load(name: str | Path) -> Backbone:
    """A backbone by zoo name, or from a folder (a `Path`, or text that starts with ./, / or ~).

    Folders hold an open_clip model (`open_clip_config.json`) or a transformers one (`config.json`)
    with safetensors weights. The model is in eval mode; the global random state is left alone.

        clip = mm.load("tiny/clip")
    """
    if isinstance(name, Path) or (
        isinstance(name, str) and name.startswith(("./", "../", "/", "~"))
    ):
        return _from_folder(Path(name).expanduser(), None)
    if not isinstance(name, str):
        raise ZooError(
            f"expected a zoo name or a folder, got {type(name).__name__}",
            'mmadapt.load("tiny/clip")',
        )
    if name.startswith("hf:"):
        raise ZooError(
            f"hub ids such as {name!r} cannot be fetched by this version",
            "download the files yourself and pass their folder: mmadapt.load('./folder')",
        )
    item = entry(name)
    folder = data_folder() / item.source["bundled"]
    _verify(folder, item)
    return _from_folder(folder, item)


def _verify(folder: Path, item: Entry) -> None:
    """Every file of an entry is there, with its size and digest."""
    import hashlib

    for file in item.files:
        path = folder / file["path"]
        if not path.is_file():
            raise ZooError(f"{item.name}: {file['path']} is missing", "reinstall mmadapt")
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != file["sha256"]:
            raise ZooError(
                f"{item.name}: {file['path']} is damaged ({len(content)} bytes, expected "
                f"{file['size']} with sha256 {file['sha256'][:12]}…)",
                "reinstall mmadapt",
            )


def _from_folder(folder: Path, item: Entry | None) -> Backbone:
    if not folder.is_dir():
        raise ZooError(f"no folder at {folder}", "zoo names have no leading './' or '/'")
    if (folder / "open_clip_config.json").is_file():
        return _open_clip(folder, item)
    if (folder / "config.json").is_file():
        config = json.loads((folder / "config.json").read_text())
        if "log_mel" in config:
            model = _log_mel(folder)
        else:
            model = _transformers(folder, config, quiet=item is not None)
        reads = _characters if type(model).__name__.endswith("ForCTC") else _tokenizer
        return Backbone(model, _preprocess(folder), reads(folder), entry=item)
    raise ZooError(
        f"{folder} holds neither open_clip_config.json nor config.json",
        "point at the folder with the model's configuration and weights",
    )


def _transformers(folder: Path, config: dict[str, Any], quiet: bool) -> nn.Module:
    """A model of the class and precision its configuration names; the global random state stays.

    A class without an anatomy of its own, such as one for pretraining, gives its bare encoder. `quiet`
    keeps transformers' progress bar away, which a model of a few megabytes does not need.
    """
    import torch
    import transformers
    from transformers.utils import logging

    cls = getattr(transformers, (config.get("architectures") or [""])[0], transformers.AutoModel)
    if f"{cls.__module__}.{cls.__qualname__}" not in KNOWN:
        cls = transformers.AutoModel
    shown = logging.is_progress_bar_enabled()
    if quiet:
        logging.disable_progress_bar()
    try:
        with torch.random.fork_rng(devices=[]):
            return cls.from_pretrained(folder).eval()
    finally:
        if shown:
            logging.enable_progress_bar()


def _tokenizer(folder: Path) -> Any:
    """The tokenizer that lies beside the model, None where there is none; nothing is fetched."""
    if not (folder / "tokenizer_config.json").is_file():
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _log_mel(folder: Path) -> nn.Module:
    """A wav2vec 2.0 with a CTC head, and a log-mel spectrogram as its front end."""
    import torch
    from transformers import Wav2Vec2Config

    from mmadapt.backbones.log_mel import build

    with torch.random.fork_rng(devices=[]):
        model = build(Wav2Vec2Config.from_pretrained(folder))
    _fill(model, folder)
    return model.eval()


def _characters(folder: Path) -> Any:
    """The tokenizer of a folder with a `vocab.json`, which adds no tokens of its own; else None."""
    if not (folder / "vocab.json").is_file():
        return None
    from transformers import Wav2Vec2CTCTokenizer

    if (folder / "tokenizer_config.json").is_file():
        return Wav2Vec2CTCTokenizer.from_pretrained(folder)
    none: Any = None
    return Wav2Vec2CTCTokenizer(
        str(folder / "vocab.json"), unk_token=none, bos_token=none, eos_token=none
    )


def _preprocess(folder: Path) -> Any:
    """What turns clips into a sound model's inputs, or None for other kinds of models."""
    import importlib

    path = folder / "preprocessor_config.json"
    settings = json.loads(path.read_text()) if path.is_file() else {}
    module, _, name = PREPROCESS.get(settings.get("feature_extractor_type", ""), "").partition(":")
    return getattr(importlib.import_module(module), name).from_folder(folder) if module else None


def _open_clip(folder: Path, item: Entry | None) -> Backbone:
    _require_fitting_torchvision()
    from open_clip.tokenizer import SimpleTokenizer

    from mmadapt.backbones.images import OpenClipPreprocess

    config = json.loads((folder / "open_clip_config.json").read_text())
    model_config = config["model_cfg"]
    model = _open_clip_model(model_config)
    _fill(model, folder)
    merges = folder / "bpe.txt.gz"
    settings: dict[str, Any] = {"context_length": model_config["text_cfg"]["context_length"]}
    if merges.is_file():
        settings["bpe_path"] = str(merges)
    tokenize = SimpleTokenizer(**settings)
    preprocess = OpenClipPreprocess(
        model_config["vision_cfg"]["image_size"], config.get("preprocess_cfg", {})
    )
    return Backbone(model.eval(), preprocess, tokenize, entry=item)


def _require_fitting_torchvision() -> None:
    """open_clip needs torchvision, whose compiled part fits one torch only; say so in one sentence."""
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        from importlib.metadata import version

        raise MissingDependencyError(
            f"torchvision {version('torchvision')} does not fit torch {version('torch')} ({error})",
            "install both from the same index, for example pip install torch==2.11.0 torchvision==0.26.0",
        ) from error


def _open_clip_model(config: dict[str, Any]) -> nn.Module:
    """A model with values still to come; building it must not move the global random state."""
    import torch
    from open_clip.model import CLIP, CustomTextCLIP

    config = {key: value for key, value in config.items() if key != "custom_text"}
    custom = any(key in config.get("text_cfg", {}) for key in ("hf_model_name", "proj_type"))
    with torch.random.fork_rng(devices=[]):
        return (CustomTextCLIP if custom else CLIP)(**config)


def _fill(model: nn.Module, folder: Path) -> None:
    from safetensors.torch import load_file

    path = next(iter(sorted(folder.glob("*.safetensors"))), None)
    if path is None:
        raise ZooError(f"{folder} has no safetensors weights", "convert them to safetensors first")
    model.load_state_dict(load_file(path))
