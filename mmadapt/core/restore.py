"""Adapter files, read: everything is checked before the backbone is touched."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmadapt.core.attached import NAME
from mmadapt.core.backbone import unwrap
from mmadapt.core.site import offers
from mmadapt.core.store import MANIFEST, SCHEMA, TENSORS, TOLD, backbone_card
from mmadapt.core.upgrades import UPGRADES
from mmadapt.errors import AdapterError, AdapterFileError, WrongBackboneError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mmadapt.core.anatomy import Anatomy
    from mmadapt.core.attachment import Attachment
    from mmadapt.core.site import SiteView, Span


def load_folder(
    m: Any, path: str | Path, name: str | None = None, replace: bool = False
) -> Attachment:
    """Attach the adapter that `save` wrote to the folder `path`, under its own name or another.

    Everything is checked before the backbone is touched: schema, methods, that it was made for this
    backbone, and that every tensor is there, is expected and has its shape. Raises
    `AdapterFileError` or `WrongBackboneError`, and nothing is attached.
    """
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
    for part in ("licence", "metrics", *TOLD):
        if part in manifest:
            attachment.metadata[part] = manifest[part]
    trained_on, here = manifest["backbone"].get("sha256"), getattr(entry, "sha256", None)
    if trained_on and here and trained_on != here:
        warnings.warn(
            f"{folder} was trained on weights {trained_on[:12]}…, this backbone has {here[:12]}…",
            stacklevel=4,  # whoever called load_adapter
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
    here = backbone_card(model, anatomy, None, spans)
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
