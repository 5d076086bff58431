"""The verb that loads an adapter from anywhere, whoever wrote it.

Where it comes from is told by the argument, whose layout it has by the contents: mmadapt's own files,
PEFT's, AdapterHub's, languages of MMS and the checkpoints that methods' authors released.
"""

from __future__ import annotations

import contextlib
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmadapt.core.backbone import unwrap
from mmadapt.core.restore import load_folder
from mmadapt.core.store import MANIFEST, TENSORS
from mmadapt.errors import AdapterFileError, ZooError
from mmadapt.interop.archive import unpacked
from mmadapt.interop.foreign import checkpoint_keys, some
from mmadapt.interop.peft_config import CONFIG, read_json

if TYPE_CHECKING:
    from mmadapt.core.attachment import Attachment
    from mmadapt.interop.foreign import ForeignFile

#: what AdapterHub writes beside several adapters
_TOGETHER = {"adapter_fusion_config.json": "a fusion", "adapter_setup.json": "a composition"}
_FILES = (".zip", ".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".adapter", ".tar")
#: what is fetched of a repository on the hub: adapters of mmadapt, PEFT and AdapterHub at its top
_ON_THE_HUB = (
    "adapter.json", "adapter.safetensors", "adapter_config.json", "adapter_model.safetensors",
    "adapter_model.bin", "pytorch_adapter.bin", "head_config.json", "model_head.safetensors",
    "pytorch_model_head.bin", *_TOGETHER,
)  # fmt: skip
#: what a key of a released checkpoint matches -> its reader in `mmadapt.interop`
_KEYS: tuple[tuple[str, str], ...] = (
    (r"encoder_dict\Z", "read_three_d_sam"),
    (r"(.*\.)?image_encoder\.blocks\.\d+\.Adapter\.", "read_sam_med2d"),
    (r"(.*\.)?image_encoder\.blocks\.\d+\.\w+_Adapter\.", "read_med_sa"),
    (r"\w+\.encoder\.layers\.\d+\.adapter_layer\.", "read_mms"),
    (r"(adapter_query|visual_query)\.weight\Z", "read_llama_adapter"),
    (r"transformer\.h\.\d+\.attn\.(adapter_wte|gating_factor)", "read_llama_adapter"),
    (r"layers\.\d+\.\w+\.w\w+_(scale|bias)\Z", "read_llama_adapter"),
)


def load_adapter(
    m: Any, path_or_id: str | Path, name: str | None = None, replace: bool = False
) -> Attachment:
    """Attach an adapter from a folder, a zip, a file, the hub or the zoo, under its own name or another.

    A folder or file is a `Path` or starts with ./, / or ~; `hf:org/repo[@rev]` is a hub id; any other
    text is a zoo name. What is there is recognised by its contents: mmadapt's own files, LoRA and
    adaption prompts of PEFT, bottlenecks and LoRA of AdapterHub, languages of MMS, and checkpoints that
    `mmadapt.interop` reads without being told more.

    Everything is checked before the backbone is touched, and nothing is loaded in part: missing,
    unexpected and mis-shaped tensors are listed. Raises `AdapterFileError`, for another backbone
    `WrongBackboneError`, for a source that cannot be reached `ZooError`.

        mm.load_adapter(clip, "./sketch")
    """
    with _opened(_located(m, path_or_id)) as path, _opened(_found(path)) as found:
        return _load(m, found, name, replace)


def _located(m: Any, source: Any) -> Path:
    """The folder or file a path, hub id or zoo name stands for, fetched where need be."""
    if isinstance(source, str) and not source.startswith(("./", "../", "/", "~")):
        return _fetched(m, source)
    if not isinstance(source, (str, Path)):
        raise AdapterFileError(
            f"expected a path, a hub id or a zoo name, got {type(source).__name__}",
            'for example mmadapt.load_adapter(model, "./sketch")',
        )
    path = Path(source).expanduser()
    if not path.exists():
        raise AdapterFileError(
            f"there is no adapter at {path}",
            "give the folder mmadapt.save wrote, a zip of it, or a zoo name, which is not a path",
        )
    return path


def _fetched(m: Any, name: str) -> Path:
    from mmadapt.zoo.obtain import get, resolve

    try:
        item = resolve(name)
    except ZooError as error:
        if Path(name).exists():
            raise ZooError(
                error.message, f"for the folder or file of that name: './{name}'"
            ) from None
        raise
    if name.startswith("hf:"):
        return get(item, patterns=_ON_THE_HUB)
    if item.kind != "adapter":
        raise ZooError(f"{item.name} is a backbone", f"mmadapt.load({item.name!r}) loads it")
    item.require_base(unwrap(m)[2])
    return get(item)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Path]:
    """The path itself, or the folder a zip was unpacked to."""
    if not _is_archive(path):
        yield path
        return
    with unpacked(path) as folder:
        try:
            yield folder
        except AdapterFileError as error:  # told of the file that was given
            text = error.message.replace(str(folder), str(path))
            raise type(error)(text, error.hint) from None


def _is_archive(path: Path) -> bool:
    """Whether it is a zip, and none of torch's, which are zips too."""
    if not path.is_file() or path.suffix == ".safetensors":
        return False
    if path.suffix == ".zip" or not zipfile.is_zipfile(path):
        return path.suffix == ".zip"
    try:
        with zipfile.ZipFile(path) as archive:
            return not any(name.endswith("data.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError):
        return True


def _load(m: Any, path: Path, name: str | None, replace: bool) -> Attachment:
    if path.is_dir() and (path / CONFIG).is_file():
        return _attached(_of_a_peer(m, path, name, replace))
    if path.is_dir():
        return load_folder(m, path, name, replace)
    return _attached(_of_a_checkpoint(m, path, name, replace))


def _found(folder: Path) -> Path:
    """The folder of the adapter, or its file: this one, the only one in it, or an error that lists them."""
    if not folder.is_dir():
        return folder
    names = {entry.name for entry in folder.iterdir()}
    for file, what in _TOGETHER.items():
        if file in names:
            raise AdapterFileError(
                f"{folder} holds {what} of adapters of AdapterHub ({file}), which cannot be read",
                "load the adapters one by one from their folders",
            )
    if names & {CONFIG, MANIFEST, TENSORS}:
        return folder
    below = sorted(one for one in folder.iterdir() if one.is_dir() and _holds(one))
    files = sorted(one for one in folder.iterdir() if one.is_file() and one.suffix in _FILES)
    found = below or files
    if len(found) > 1:
        raise AdapterFileError(
            f"{folder} holds several adapters: {some(one.name for one in found)}",
            f"give one of them, for example {str(found[0])!r}",
        )
    if not found:
        raise AdapterFileError(
            f"{folder} holds no adapter; it holds {', '.join(sorted(names)) or 'nothing'}",
            f"an adapter is a folder with {MANIFEST} and {TENSORS}, or one of PEFT or AdapterHub with {CONFIG}",
        )
    return found[0]


def _holds(folder: Path) -> bool:
    return (folder / CONFIG).is_file() or (folder / MANIFEST).is_file()


def _of_a_peer(m: Any, folder: Path, name: str | None, replace: bool) -> ForeignFile:
    from mmadapt.interop.adapterhub import read_adapterhub
    from mmadapt.interop.llama_adapter import read_llama_adapter
    from mmadapt.interop.peft import read_peft

    config = read_json(folder / CONFIG)
    kind = config.get("peft_type")
    if kind == "ADAPTION_PROMPT":
        return read_llama_adapter(m, folder, name or "default", replace=replace)
    if kind == "LORA":
        return read_peft(m, folder, name or "default", replace)
    if kind is not None:
        raise AdapterFileError(
            f"{folder} holds PEFT's {kind}, which cannot be read",
            "LORA and ADAPTION_PROMPT are read",
        )
    if isinstance(config.get("config"), dict):
        return read_adapterhub(m, folder, name, replace)
    raise AdapterFileError(
        f"{folder / CONFIG} is neither PEFT's nor AdapterHub's: it has {some(sorted(config))}",
        "PEFT's has a peft_type, AdapterHub's a config and a model_type",
    )


def _of_a_checkpoint(m: Any, path: Path, name: str | None, replace: bool) -> ForeignFile:
    from mmadapt import interop

    if path.name in (MANIFEST, TENSORS, CONFIG):
        raise AdapterFileError(
            f"{path} is one file of an adapter", f"give its folder, {str(path.parent)!r}"
        )
    keys = checkpoint_keys(path)
    reader = next(
        (reader for pattern, reader in _KEYS if any(re.match(pattern, key) for key in keys)), None
    )
    if reader is None:
        raise AdapterFileError(
            f"{path} is no adapter that is known: it holds {some(keys)}",
            "give the whole folder; docs/sharing.md lists what is read",
        )
    read: Callable[..., ForeignFile] = getattr(interop, reader)
    named = {"name": name} if name is not None else {}
    try:
        return read(m, path, replace=replace, **named)
    except AdapterFileError as error:
        hint = f"{error.hint}; " if error.hint else ""
        raise type(error)(
            error.message, f"{hint}mmadapt.interop.{reader} takes what the file does not say"
        ) from None


def _attached(report: ForeignFile) -> Attachment:
    attachment = report.attachment
    assert attachment is not None  # readers attach or raise
    attachment.metadata["origin"] = str(report)
    return attachment
