"""Adapter files: `adapter.json` to read, `adapter.safetensors` for the numbers.

The tensors are keyed by site names, so files survive renamed modules. The safetensors file carries
the manifest in its header too: it alone decides, and a save that is killed half-way leaves the old
adapter or the new one.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmadapt.core.attached import NAME, require_bank, require_name
from mmadapt.core.backbone import unwrap
from mmadapt.core.site import BIAS, offers
from mmadapt.core.table import shape_of
from mmadapt.core.upgrades import UPGRADES
from mmadapt.errors import AdapterError, AdapterFileError, WrongBackboneError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mmadapt.core.anatomy import Anatomy
    from mmadapt.core.attachment import Attachment
    from mmadapt.core.site import SiteView, Span

SCHEMA = 2
MANIFEST = "adapter.json"
TENSORS = "adapter.safetensors"


def save(
    m: Any,
    path: str | Path,
    name: str | None = None,
    *,
    licence: str | None = None,
    metrics: dict[str, Any] | None = None,
) -> Path:
    """Write one attachment to the folder `path` (created if need be) and return it.

    Only the adapter is written: `adapter.json` (what it is, where it stands, the backbone it was
    made for) and `adapter.safetensors`. Without a name exactly one must be attached. Where several
    processes train together the first one writes; where FSDP2 shards the adapter all have to call.
    """
    model, bank = require_bank(m)
    name = require_name(bank, name, "save")
    record = bank.records[name]
    tensors = {
        f"{key}/{tensor}": _whole(value.detach()).cpu().contiguous()
        for key, layer in bank.tensors_of(name)
        for tensor, value in layer.to_file().items()
    }
    manifest = {
        "schema": SCHEMA,
        "name": name,
        "adapters": [
            {**adapter.to_json(), "sites": list(sites)}
            for adapter, sites in zip(record.adapters, record.sites, strict=True)
        ],
        "backbone": _backbone_card(model, bank.anatomy, bank.entry, bank.anatomy.roles(model)),
        "tensors": {key: shape_of(value) for key, value in sorted(tensors.items())},
        "versions": _versions(),
        "licence": licence or record.metadata.get("licence"),
        "metrics": metrics or record.metadata.get("metrics") or {},
    }
    if record.metadata.get("input"):  # how images and prompts have to be given, where that is told
        manifest["input"] = record.metadata["input"]
    return write(Path(path).expanduser(), manifest, tensors)


def write(folder: Path, manifest: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    """The two files of an adapter, each whole or not at all."""
    from safetensors.torch import save as to_bytes

    try:
        text = json.dumps(manifest, indent=1, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise AdapterFileError(
            f"metrics, licence or input cannot be written as JSON: {error}",
            "use plain finite numbers and text",
        ) from None
    if folder.exists() and not folder.is_dir():
        raise AdapterFileError(f"{folder} is a file", "adapters are saved to a folder")
    if not _writes():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / TENSORS, to_bytes(tensors, metadata={"mmadapt": text}))
    replace_file(folder / MANIFEST, (text + "\n").encode())
    return folder


def _whole(tensor: Any) -> Tensor:
    """A tensor that FSDP2 sharded, gathered from all processes; any other as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _writes() -> bool:
    """Whether this is the first of the processes that train together, or the only one."""
    from torch import distributed

    return not (
        distributed.is_available() and distributed.is_initialized() and distributed.get_rank()
    )


def replace_file(path: Path, content: bytes) -> None:
    """Write a file so that a reader, or a crash, sees the old content or the new, never a part."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load_adapter(
    m: Any, path: str | Path, name: str | None = None, replace: bool = False
) -> Attachment:
    """Attach the adapter saved in the folder `path`, under its own name or another.

    Everything is checked before the backbone is touched: schema, methods, that it was made for this
    backbone, and that every tensor is there, is expected and has its shape. Raises
    `AdapterFileError` or `WrongBackboneError`, and nothing is attached.
    """
    import warnings

    from mmadapt.core.install import install

    folder = Path(path).expanduser()
    manifest, tensors = read(folder)
    model, anatomy, entry = unwrap(m)
    spans = anatomy.roles(model)
    _check_backbone(folder, manifest["backbone"], model, anatomy, spans)
    adapters, sites = [], []
    for index, data in enumerate(manifest["adapters"]):
        adapter, chosen = _rebuild(folder, data, model, anatomy, spans)
        adapters.append(adapter)
        sites.append(chosen)
        for saved, site in zip(data["sites"], chosen, strict=True):
            _rename(tensors, f"{index}/{saved}/", f"{index}/{site.name}/")
    try:
        attachment = install(
            model,
            anatomy,
            entry,
            tuple(adapters),
            sites,
            manifest["name"] if name is None else name,
            replace=replace,
            tensors=tensors,
        )
    except (AdapterFileError, AdapterError) as error:
        raise AdapterFileError(f"{folder}: {error.message}", error.hint) from None
    for part in ("licence", "metrics", "input"):
        if part in manifest:
            attachment.metadata[part] = manifest[part]
    trained_on, here = manifest["backbone"].get("sha256"), getattr(entry, "sha256", None)
    if trained_on and here and trained_on != here:
        warnings.warn(
            f"{folder} was trained on weights {trained_on[:12]}…, this backbone has {here[:12]}…",
            stacklevel=2,
        )
    return attachment


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The manifest (upgraded to the present schema) and tensors of an adapter folder, checked."""
    from safetensors import SafetensorError, safe_open

    if not folder.is_dir():
        raise AdapterFileError(
            f"no adapter folder at {folder}",
            "give the folder mmadapt.save wrote; a zoo name is not a path",
        )
    for part in (TENSORS, MANIFEST):
        if not (folder / part).is_file():
            raise AdapterFileError(
                f"{folder} has no {part}; it holds {', '.join(sorted(os.listdir(folder))) or 'nothing'}",
                "an adapter is a folder with adapter.json and adapter.safetensors",
            )
    try:
        with safe_open(folder / TENSORS, framework="pt") as file:
            header = (file.metadata() or {}).get("mmadapt")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterFileError(
            f"{folder / TENSORS} is damaged or not a safetensors file: {error}",
            "copy or save it again",
        ) from None
    # the header decides: a save killed between its two files leaves a stale adapter.json
    text = header if header is not None else (folder / MANIFEST).read_text(errors="replace")
    return _parse(folder, text, tensors)


def _parse(
    folder: Path, text: str, tensors: dict[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        manifest = json.loads(text)
    except ValueError as error:
        raise AdapterFileError(f"{folder / MANIFEST} is not JSON: {error}") from None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("schema"), int):
        raise AdapterFileError(f"{folder / MANIFEST} is not an adapter manifest: it has no schema")
    schema = manifest["schema"]
    if schema > SCHEMA:
        raise AdapterFileError(
            f"{folder} has schema {schema}; this mmadapt reads up to {SCHEMA}", "upgrade mmadapt"
        )
    while manifest["schema"] < SCHEMA:
        upgrade = UPGRADES.get(manifest["schema"])
        if upgrade is None:
            raise AdapterFileError(f"{folder} has the unknown schema {schema}")
        manifest, tensors = upgrade(manifest, tensors)
    expected = {
        "name": str,
        "adapters": list,
        "backbone": dict,
        "tensors": dict,
        "versions": dict,
        "metrics": dict,
    }
    for key, kind in expected.items():
        if not isinstance(manifest.get(key), kind):
            raise AdapterFileError(
                f"{folder / MANIFEST}: {key!r} is {manifest.get(key)!r:.60}, expected a {kind.__name__}"
            )
    if not manifest["adapters"]:
        raise AdapterFileError(f"{folder / MANIFEST} holds no adapter")
    if not NAME.fullmatch(manifest["name"]):
        raise AdapterFileError(f"{folder / MANIFEST}: {manifest['name']!r} names no attachment")
    manifest.setdefault("licence", None)
    return manifest, tensors


def _rebuild(
    folder: Path, data: Any, model: nn.Module, anatomy: Anatomy, spans: dict[str, Span]
) -> tuple[Any, list[SiteView]]:
    """One adapter of a manifest and its sites in this backbone."""
    from mmadapt.adapter import from_json

    if not isinstance(data, dict) or not isinstance(data.get("sites"), list):
        raise AdapterFileError(f"{folder / MANIFEST}: an adapter lacks its list of sites")
    fields = {key: value for key, value in data.items() if key != "sites"}
    try:
        adapter = from_json(fields)
    except (AdapterError, TypeError) as error:
        raise AdapterFileError(
            f"{folder / MANIFEST}: {getattr(error, 'message', error)}",
            getattr(error, "hint", "") or "install the package that defines the method",
        ) from None
    former = anatomy.former(spans)
    chosen = []
    for site in data["sites"]:
        role, _, port = str(site).rpartition(":")
        role = role if role in spans else former.get(role, role)
        twin = {"out": "weight", "weight": "out"}.get(port)
        if role in spans and port not in spans[role].ports and twin in spans[role].ports:
            # one library calls the linear, the other reads its weight: the same change, met elsewhere
            port = twin if twin in adapter.ports and spans[role].weight else port
        if role not in spans or port not in offers(spans[role]):
            raise WrongBackboneError(
                f"{folder}: site {site!r} is not in this {type(model).__name__}",
                did_you_mean(role, spans),
            )
        chosen.append(anatomy.view(model, role, port, spans[role]))
    return adapter, chosen


def _rename(tensors: dict[str, Tensor], before: str, after: str) -> None:
    for key in [key for key in tensors if key.startswith(before)] if before != after else ():
        tensors[after + key.removeprefix(before)] = tensors.pop(key)


def _backbone_card(
    model: nn.Module, anatomy: Anatomy, entry: Any, spans: dict[str, Span]
) -> dict[str, Any]:
    return {
        "zoo": getattr(entry, "name", None),
        "revision": getattr(entry, "revision", None),
        "sha256": getattr(entry, "sha256", None),
        "class": _class_name(model),
        "family": anatomy.family,
        "facts": anatomy.facts(model) if anatomy.facts else {},
        "widths": _widths(model, anatomy, spans),
    }


def _class_name(model: nn.Module) -> str:
    """The model's own class, where FSDP2 has put one of its making before it."""
    own = next(c for c in type(model).__mro__ if not c.__module__.startswith("torch.distributed."))
    return f"{own.__module__}.{own.__qualname__}"


def _widths(model: nn.Module, anatomy: Anatomy, spans: dict[str, Span]) -> dict[str, list[int]]:
    """[inputs, outputs] of the first site of each kind: alike sites are alike in every layer."""
    found: dict[str, list[int]] = {}
    for role, span in spans.items():
        kind = re.sub(r"\[\d+\]", "[*]", role)
        if kind not in found and not kind.endswith(f".{BIAS}"):  # as wide as what it stands beside
            view = anatomy.view(model, role, span.ports[0], span)
            found[kind] = [view.width_in, view.width]
    return found


def _check_backbone(
    folder: Path, card: dict[str, Any], model: nn.Module, anatomy: Anatomy, spans: dict[str, Span]
) -> None:
    """Refuse a backbone that differs in family, facts or widths; the class may differ."""
    made_for = card.get("zoo") or card.get("class")
    if card.get("family") != anatomy.family:
        raise WrongBackboneError(
            f"{folder} was made for {made_for} (family {card.get('family')!r}); this is a "
            f"{type(model).__name__} (family {anatomy.family!r})"
        )
    here = _backbone_card(model, anatomy, None, spans)
    for part in ("facts", "widths"):
        there = card.get(part)
        if not isinstance(there, dict):
            raise AdapterFileError(f"{folder / MANIFEST}: backbone.{part} is not a table")
        # sites one implementation lacks (an embedding that is no module there) are no difference
        keys = there.keys() & here[part].keys() if part == "widths" else there.keys() | here[part]
        differing = [key for key in sorted(keys) if there.get(key) != here[part].get(key)]
        if differing:
            listed = "; ".join(
                f"{key} is {here[part].get(key)!r} here and {there.get(key)!r} in the file"
                for key in differing[:4]
            )
            raise WrongBackboneError(
                f"{folder} was made for another backbone ({made_for}): {listed}",
                f"load it into {made_for}",
            )


def _versions() -> dict[str, str]:
    import torch

    import mmadapt

    return {"mmadapt": mmadapt.__version__, "torch": torch.__version__}
