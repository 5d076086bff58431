"""The libraries that build backbones: an empty model and its preprocessing from a folder or an entry."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmadapt.core.backbone import Backbone
from mmadapt.core.known import KNOWN
from mmadapt.errors import MissingDependencyError, ZooError
from mmadapt.zoo import weights
from mmadapt.zoo.entries import Entry

if TYPE_CHECKING:
    import torch
    from torch import nn

#: a feature extractor of transformers -> "module:class" of ours, with `from_folder`
PREPROCESS = {"ASTFeatureExtractor": "mmadapt.tasks.audio.spectrum:SpectrumFeatures"}

Dtype = Any  # torch.dtype | None, without torch at import


def build(folder: Path, item: Entry | None, dtype: torch.dtype | None) -> Backbone:
    """The backbone in a folder: by the entry's builder where it names one file, else by what lies there."""
    provider, _, argument = (item.builder if item else "").partition(":")
    if provider == "segment_anything":
        return _segment_anything(folder, item, argument, dtype)
    if provider == "timm" and not (folder / "config.json").is_file():
        return _timm(folder, item, {"architecture": argument, **_config(item)}, dtype)
    if (folder / "open_clip_config.json").is_file() and provider != "timm":
        return _open_clip(folder, item, dtype)
    if not (folder / "config.json").is_file():
        raise ZooError(
            f"{folder} holds neither open_clip_config.json nor config.json",
            "point at the folder with the model's configuration and weights",
        )
    config = _json(folder / "config.json")
    if "log_mel" in config:
        return Backbone(_log_mel(folder, dtype), None, _characters(folder), entry=item)
    if "architecture" in config and "pretrained_cfg" in config:
        return _timm(folder, item, config, dtype)
    model = _transformers(folder, config, item, argument, dtype)
    reads = _characters if type(model).__name__.endswith("ForCTC") else _tokenizer
    return Backbone(model, _preprocess(folder), reads(folder), entry=item)


def _config(item: Entry | None) -> dict[str, Any]:
    return dict(item.config) if item else {}


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ZooError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(data, dict):
        raise ZooError(f"{path} holds a {type(data).__name__}, expected a table of settings")
    return data


def _weights(folder: Path, item: Entry | None, *preferred: str) -> Path:
    """The one file with all weights: the entry's, a preferred name, or the only safetensors there."""
    if item is not None and any(file.role == "weights" for file in item.files):
        return folder / next(file.path for file in item.files if file.role == "weights")
    named = [folder / name for name in preferred if (folder / name).is_file()]
    found = [*named, *sorted(folder.glob("*.safetensors"))]
    if not found:
        raise ZooError(f"{folder} has no safetensors weights", "convert them to safetensors first")
    return found[0]


# -- transformers ---------------------------------------------------------------------------------


def _transformers(
    folder: Path, config: dict[str, Any], item: Entry | None, name: str, dtype: Dtype
) -> nn.Module:
    """A model of the class and precision its configuration names; the global random state stays.

    A class without an anatomy of its own, such as one for pretraining, gives its bare encoder.
    """
    import torch
    import transformers
    from transformers.utils import logging

    safe = any((folder / f"model.safetensors{end}").is_file() for end in ("", ".index.json"))
    for path in folder.iterdir():
        # beside safetensors transformers opens nothing pickled, such as a Trainer's state
        if not (safe and path.suffix in weights.PICKLED):
            weights.require_readable(path, item.globals if item else ())
    name = name or (config.get("architectures") or [""])[0]
    cls = getattr(transformers, name, transformers.AutoModel)
    if f"{cls.__module__}.{cls.__qualname__}" not in KNOWN:
        cls = transformers.AutoModel
    settings = {} if dtype is None else {"dtype": dtype}
    shown = logging.is_progress_bar_enabled()
    if item is not None:  # mapped in a moment: no bar is needed
        logging.disable_progress_bar()
    try:
        with torch.random.fork_rng(devices=[]):
            model = cls.from_pretrained(folder, local_files_only=True, **settings)
    except (ValueError, OSError, KeyError, RuntimeError) as error:  # the last for shapes
        raise ZooError(
            f"transformers cannot load {folder}: {str(error)[:400]}",
            "is it a model of another library, or of a newer transformers?",
        ) from error
    finally:
        if shown:
            logging.enable_progress_bar()
    return model


def _tokenizer(folder: Path) -> Any:
    """The tokenizer that lies beside the model, None where there is none; nothing is fetched."""
    if not (folder / "tokenizer_config.json").is_file():
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


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
    """What turns images or clips into a model's inputs; None where the folder does not say."""
    import importlib

    from mmadapt.backbones.images import ProcessorPreprocess

    path = folder / "preprocessor_config.json"
    settings = _json(path) if path.is_file() else {}
    named = PREPROCESS.get(settings.get("feature_extractor_type", ""))
    if named:
        module, _, name = named.partition(":")
        return getattr(importlib.import_module(module), name).from_folder(folder)
    is_image = "image_processor_type" in settings or "image_mean" in settings
    return ProcessorPreprocess(folder, settings) if is_image else None


def _log_mel(folder: Path, dtype: Dtype) -> nn.Module:
    """A wav2vec 2.0 with a CTC head, and a log-mel spectrogram as its front end."""
    from transformers import Wav2Vec2Config

    from mmadapt.backbones.log_mel import build as build_log_mel

    config = Wav2Vec2Config.from_pretrained(folder)
    with weights.without_values():
        model = build_log_mel(config)
    path = _weights(folder, None)
    weights.fill(model, weights.read(path), path, dtype)
    return model


# -- open_clip ------------------------------------------------------------------------------------


def _open_clip(folder: Path, item: Entry | None, dtype: Dtype) -> Backbone:
    _require_fitting_torchvision()
    from mmadapt.backbones.images import OpenClipPreprocess

    config = _json(folder / "open_clip_config.json")
    settings = {**config["model_cfg"], **_config(item).get("model_cfg", {})}
    with weights.without_values():
        model = _open_clip_model(settings)
    path = _weights(folder, item, "open_clip_model.safetensors")
    weights.fill(model, weights.read(path, item.globals if item else ()), path, dtype)
    size = settings["vision_cfg"]["image_size"]
    preprocess = OpenClipPreprocess(size, config.get("preprocess_cfg", {}))
    return Backbone(model, preprocess, _open_clip_tokenizer(folder, settings), entry=item)


def _open_clip_tokenizer(folder: Path, config: dict[str, Any]) -> Any:
    text = config["text_cfg"]
    if "hf_tokenizer_name" in text:  # its files lie beside the weights
        from open_clip import get_tokenizer

        return get_tokenizer(f"local-dir:{folder}")
    from open_clip.tokenizer import SimpleTokenizer

    merges = folder / "bpe.txt.gz"
    own: dict[str, Any] = {"bpe_path": str(merges)} if merges.is_file() else {}
    return SimpleTokenizer(context_length=text["context_length"], **own)


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
    from open_clip.model import CLIP, CustomTextCLIP

    text = config.get("text_cfg", {})
    custom = config.get("custom_text") or any(key in text for key in ("hf_model_name", "proj_type"))
    config = {key: value for key, value in config.items() if key != "custom_text"}
    return (CustomTextCLIP if custom else CLIP)(**config)


# -- segment_anything and timm ----------------------------------------------------------------------


def _segment_anything(folder: Path, item: Entry | None, size: str, dtype: Dtype) -> Backbone:
    try:
        from segment_anything import sam_model_registry
    except ImportError as error:
        raise MissingDependencyError(
            f"{item.name if item else folder} needs segment_anything", "pip install 'mmadapt[sam]'"
        ) from error
    if size not in sam_model_registry:
        raise ZooError(
            f"segment_anything has no {size!r}", f"there are {', '.join(sam_model_registry)}"
        )
    with weights.without_values():
        model = sam_model_registry[size]()
    path = _weights(folder, item)
    weights.fill(model, weights.read(path, item.globals if item else ()), path, dtype)
    return Backbone(model, entry=item)


def _timm(folder: Path, item: Entry | None, config: dict[str, Any], dtype: Dtype) -> Backbone:
    try:
        import timm
        from timm.data.config import resolve_model_data_config
    except ImportError as error:
        raise MissingDependencyError(f"{folder} needs timm", "pip install timm") from error
    from mmadapt.backbones.images import TimmPreprocess

    name = config["architecture"]
    own = {
        key: config[key] for key in ("num_classes", "global_pool") if config.get(key) is not None
    }
    try:
        with weights.without_values():
            model = timm.create_model(
                name,
                pretrained=False,
                pretrained_cfg=config.get("pretrained_cfg"),
                **own,
                **config.get("model_args", {}),
            )
    except RuntimeError as error:
        raise ZooError(f"timm cannot build {name!r}: {error}") from None
    path = _weights(folder, item, "model.safetensors")
    weights.fill(model, weights.read(path, item.globals if item else ()), path, dtype)
    settings = resolve_model_data_config(model)
    return Backbone(model, TimmPreprocess(settings), entry=item)
