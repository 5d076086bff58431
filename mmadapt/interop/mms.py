"""Language adapters of the Massively Multilingual Speech models, in their own files.

Pratap et al. 2023, Scaling Speech Technology to 1,000+ Languages, arXiv:2305.13516

    h + relu(norm(h)·W₁ᵀ + b₁)·W₂ᵀ + b₂   behind every block, and an output layer of the language

A language is one file, `adapter.{language}.safetensors`, beside the backbone; its keys are
`wav2vec2.encoder.layers.{i}.adapter_layer.{norm,linear_1,linear_2}.{weight,bias}` of every block and
`lm_head.{weight,bias}`, none more and none less. `vocab.json` has the tokens of all languages,
{language: {token: id}}. Backbones that were built with `adapter_attn_dim` have room for one language
of their own: there an attachment holds the change from it. Others get it behind their blocks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmadapt.core.attached import NAME, require_bank, require_name
from mmadapt.core.backbone import unwrap
from mmadapt.core.store import replace_file
from mmadapt.errors import AdapterFileError, BackboneError
from mmadapt.interop.foreign import ForeignFile, install_tensors, refuse_keys, some
from mmadapt.interop.mms_layout import HEAD, PARTS, VOCABULARY, opened, tokens_of, vocabularies_at

if TYPE_CHECKING:
    from torch import Tensor

    from mmadapt.adapter import Adapter

LAYOUT = "mms"
OWN = tuple(f"audio.layers[*].language.{role}" for role, _ in PARTS.values())


def mms_adapters(
    m: Any, vocabulary: Sequence[str] | Mapping[str, int], width: int = 16
) -> tuple[Adapter, Adapter]:
    """What to attach for a new language: its adapter and an output layer for its tokens.

    A backbone with adapter layers of its own learns the change from the language that is loaded, as
    wide as they are; another gets new ones, `width` wide, which start as the identity.

        mm.attach(model, mm.interop.mms_adapters(model, tokens), name="deu")
    """
    from mmadapt.adapter import Bottleneck, Head, Unlock

    model, anatomy, _ = unwrap(m)
    _check_model(model, anatomy.roles(model))
    names = tokens_of(vocabulary, "vocabulary")
    own = _has_own(anatomy.roles(model))
    return (Unlock(at=OWN) if own else Bottleneck.mms(width)), Head(names=names)


def read_mms(
    m: Any,
    path: str | Path,
    language: str | None = None,
    name: str | None = None,
    replace: bool = False,
) -> ForeignFile:
    """Attach a language's adapter and output layer under its own name, or another.

    The output layer stands in for the backbone's own while the attachment is active, and its tokens
    are the `names` of its `Head`; the backbone's own head and adapter are not changed, so switching
    attachments switches language, vocabulary and head together. Strict about every key; a
    `vocab.json` that counts other tokens than the output layer has rows is refused.

        mm.interop.read_mms(model, "./mms", "deu")
        mm.set_active(model, "deu")
    """
    from mmadapt.adapter import Bottleneck, Head, Unlock

    file, stored = opened(path, language)
    model, anatomy, _ = unwrap(m)
    spans = anatomy.roles(model)
    _check_model(model, spans)
    expected = set(_keys(model, spans))
    refuse_keys(sorted(expected - stored.keys()), sorted(stored.keys() - expected))
    head = Head(file.classes, file.tokens)
    values: dict[str, Tensor] = {f"1/logits:out/{HEAD[key]}": stored[key] for key in HEAD}
    own = _has_own(spans)
    for i, part, key in _places(model, spans):
        role, tensor = PARTS[part]
        site = f"audio.layers[{i}]"
        if own:
            place = f"{site}.language.{role}"
            ours = _backbone_tensor(model, anatomy, place, spans)
            if ours.shape != stored[key].shape:
                raise AdapterFileError(
                    f"{key} is {tuple(stored[key].shape)}, and this backbone's own is "
                    f"{tuple(ours.shape)}",
                    "nothing was attached; the file is of a backbone of another size",
                )
            values[f"0/{place}:weight/change"] = stored[key].to(ours) - ours
        else:
            values[f"0/{site}:out/{tensor}"] = stored[key]
    first = Unlock(at=OWN) if own else Bottleneck.mms(file.width)
    attachment = install_tensors(m, (first, head), name or file.language, values, replace)
    notes = [f"{file.language}: {_own_classes(model)} output classes before, {file.classes} now"]
    if not file.tokens:
        notes.append(f"no {VOCABULARY} beside it names the classes")
    converted = tuple(key for _, _, key in _places(model, spans)) if own else ()
    return ForeignFile(
        LAYOUT, len(stored), notes=tuple(notes), attachment=attachment, converted=converted
    )


def write_mms(
    m: Any,
    folder: str | Path,
    language: str,
    name: str | None = None,
    vocabulary: Sequence[str] | Mapping[str, int] | None = None,
) -> ForeignFile:
    """Write an attachment as `adapter.{language}.safetensors`, as `load_adapter(language)` of
    transformers reads it, and its tokens into `vocab.json`.

    It has to be what the layout can say: `Bottleneck.mms` behind every block, or the change of the
    backbone's own adapter layers, with or without a `Head`; scales are folded. Without a `Head` the
    backbone's output layer is written. Tokens are `vocabulary`, or the names of the `Head`. Raises
    `AdapterFileError` for anything else, before a file is touched.
    """
    from safetensors.torch import save as to_bytes

    if not NAME.fullmatch(language):
        raise AdapterFileError(
            f"{language!r} names no language", 'expected letters, digits, "_" and "-", as in "deu"'
        )
    model, anatomy, _ = unwrap(m)
    spans = anatomy.roles(model)
    _check_model(model, spans)
    _, bank = require_bank(m)
    name = require_name(bank, name, "write_mms")
    record, layers = bank.records[name], dict(bank.layers_of(name))
    adapter, head, place = _split(record)
    stored = _head_tensors(model, head, layers, place[1])
    if record.adapters[place[0]].method == "unlock":
        tensors = _own_tensors(model, anatomy, spans, layers, record.sites[place[0]], place[0])
    else:
        tensors = _new_tensors(model, spans, adapter, layers, record.sites[place[0]], place[0])
    stored |= tensors
    rows = len(stored["lm_head.weight"])
    tokens = tokens_of(vocabulary, "vocabulary") if vocabulary is not None else ()
    tokens = tokens or (head.names if head is not None else ())
    if tokens and len(tokens) != rows:
        raise AdapterFileError(
            f"the vocabulary has {len(tokens)} tokens, and the output layer has {rows} rows",
            "give a token for each row, in the order of their ids",
        )
    target = Path(folder).expanduser()
    vocabularies = vocabularies_at(target / VOCABULARY) if tokens else {}
    note = {"language": language, "attachment": name, "adapter": adapter.to_json()}
    metadata = {"format": "pt", "mmadapt": json.dumps(note)}
    target.mkdir(parents=True, exist_ok=True)
    bytes_ = to_bytes({key: value.contiguous() for key, value in stored.items()}, metadata)
    replace_file(target / f"adapter.{language}.safetensors", bytes_)
    notes = []
    if tokens:
        vocabularies[language] = {token: place for place, token in enumerate(tokens)}
        text = json.dumps(vocabularies, indent=2, ensure_ascii=False) + "\n"
        replace_file(target / VOCABULARY, text.encode())
    else:
        notes.append(f"no tokens are known, so {VOCABULARY} was not written")
    if not getattr(model.config, "do_stable_layer_norm", False):
        notes.append(
            "transformers has no room for it in this backbone, whose norms follow branches"
        )
    return ForeignFile(LAYOUT, len(stored), notes=tuple(notes))


# -- the backbone -----------------------------------------------------------------------------------


def _check_model(model: Any, spans: Mapping[str, Any]) -> None:
    if "audio.layers[0]" not in spans or not hasattr(model, "lm_head"):
        raise BackboneError(
            f"{type(model).__name__} is no encoder of speech with a head for tokens",
            "take a class such as transformers.Wav2Vec2ForCTC",
        )


def _has_own(spans: Mapping[str, Any]) -> bool:
    return "audio.layers[0].language" in spans


def _depth(spans: Mapping[str, Any]) -> int:
    return sum(bool(re.fullmatch(r"audio\.layers\[\d+\]", role)) for role in spans)


def _places(model: Any, spans: Mapping[str, Any]) -> Iterator[tuple[int, str, str]]:
    """(block, part, key) of every tensor of a language's adapter."""
    for i in range(_depth(spans)):
        for part in PARTS:
            yield i, part, f"{model.base_model_prefix}.encoder.layers.{i}.adapter_layer.{part}"


def _keys(model: Any, spans: Mapping[str, Any]) -> Iterator[str]:
    yield from (key for _, _, key in _places(model, spans))
    yield from HEAD


def _own_classes(model: Any) -> int:
    return len(model.lm_head.weight)


def _backbone_tensor(model: Any, anatomy: Any, role: str, spans: Mapping[str, Any]) -> Tensor:
    view = anatomy.view(model, role, "weight", spans[role])
    return view.holder.get_parameter(view.parameter).detach()


# -- the attachment ---------------------------------------------------------------------------------


def _split(record: Any) -> tuple[Any, Any, tuple[int, int]]:
    """The language's adapter, its Head or None, and which of the attachment's adapters they are."""
    methods = [adapter.method for adapter in record.adapters]
    heads = [i for i, method in enumerate(methods) if method == "head"]
    others = [i for i, method in enumerate(methods) if method in ("bottleneck", "unlock")]
    if len(others) != 1 or len(heads) > 1 or len(methods) != len(heads) + 1:
        raise AdapterFileError(
            f"an MMS file holds a bottleneck behind every block and an output layer, and this "
            f"attachment has {', '.join(map(repr, record.adapters))}",
            "attach mmadapt.interop.mms_adapters(model, tokens)",
        )
    head = record.adapters[heads[0]] if heads else None
    if head is not None and (head.norm or record.sites[heads[0]] != ("logits:out",)):
        raise AdapterFileError(
            f"{head!r} at {', '.join(record.sites[heads[0]])} is no plain output layer at 'logits'",
            "mmadapt.Head(names=tokens) is one",
        )
    return record.adapters[others[0]], head, (others[0], heads[0] if heads else -1)


def _head_tensors(
    model: Any, head: Any, layers: Mapping[str, Any], place: int
) -> dict[str, Tensor]:
    if head is None:
        own = model.lm_head
        return {key: getattr(own, key.partition(".")[2]).detach().cpu().clone() for key in HEAD}
    layer = layers[f"{place}/logits:out"]
    return {key: getattr(layer, word).detach().cpu().clone() for key, word in HEAD.items()}


def _own_tensors(
    model: Any, anatomy: Any, spans: Any, layers: Any, sites: Sequence[str], place: int
) -> dict[str, Tensor]:
    """The backbone's own adapter layers with the changes of the attachment."""
    known = {f"audio.layers[{i}].language.{PARTS[part][0]}" for i, part, _ in _places(model, spans)}
    others = [site for site in sites if site.rpartition(":")[0] not in known]
    if others or not _has_own(spans):
        raise AdapterFileError(
            f"an MMS file has no place for what the attachment changes at {some(others or sites)}",
            "attach mmadapt.interop.mms_adapters(model, tokens)",
        )
    found = {}
    for i, part, key in _places(model, spans):
        role = f"audio.layers[{i}].language.{PARTS[part][0]}"
        value = _backbone_tensor(model, anatomy, role, spans)
        layer = layers.get(f"{place}/{role}:weight")
        found[key] = (value if layer is None else value + layer.change.detach()).cpu().clone()
    return found


def _new_tensors(
    model: Any, spans: Any, adapter: Any, layers: Any, sites: Sequence[str], place: int
) -> dict[str, Tensor]:
    """A bottleneck behind every block."""
    wanted = {f"audio.layers[{i}]:out" for i in range(_depth(spans))}
    shape = (adapter.activation, adapter.norm, adapter.placement)
    if shape != ("relu", "before", "sequential") or set(sites) != wanted:
        raise AdapterFileError(
            f"an MMS file holds a bottleneck with ReLU and a norm before it behind every block; this is "
            f"{adapter!r} at {some(sites)}",
            "train mmadapt.Bottleneck.mms(16), or save it with mmadapt.save",
        )
    if _has_own(spans):
        raise AdapterFileError(
            "this backbone's own adapter layers act beside the bottlenecks, and an MMS file takes their "
            "place",
            "attach mmadapt.interop.mms_adapters(model, tokens), which change them",
        )
    found = {}
    for i, part, key in _places(model, spans):
        layer = layers[f"{place}/audio.layers[{i}]:out"]
        value = getattr(layer, PARTS[part][1]).detach()
        if part.startswith("linear_2"):
            scale = layer.scale if isinstance(layer.scale, float) else layer.scale.detach()
            per_row = getattr(scale, "ndim", 0) and value.ndim > 1
            value = value * (scale[:, None] if per_row else scale)  # type: ignore[index]
        found[key] = value.cpu().clone()
    return found
