"""The mean of adapter files: checkpoints of one run, or runs that differ in their seed."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmadapt.core.attached import check_name
from mmadapt.core.restore import read
from mmadapt.core.store import write
from mmadapt.errors import AdapterFileError

if TYPE_CHECKING:
    from torch import Tensor


def average(
    paths: Sequence[str | Path],
    into: str | Path,
    weights: Sequence[float] | None = None,
    name: str | None = None,
) -> Path:
    """Write the mean of adapters that `save` wrote to the folder `into`, and return it.

    They have to be alike: the same adapters with the same hyper-parameters at the same sites, made for
    the same backbone. Tensors are averaged one by one, by `weights` (divided by their sum) or equally;
    factors of a product, as LoRA's, are averaged as they are, which is the mean of the updates only
    where one of them is the same in all. The name is the first one's, or `name`; metrics are left
    behind. Raises `AdapterFileError` that says which file differs in what, and writes nothing.

        mm.average(["./deu-800", "./deu-900", "./deu-1000"], "./deu")
    """
    folders = [Path(path).expanduser() for path in _several(paths)]
    shares = _shares(weights, len(folders))
    if name is not None:
        check_name(name)
    manifests, tensors = zip(*[read(folder) for folder in folders], strict=True)
    for folder, manifest, own in zip(folders[1:], manifests[1:], tensors[1:], strict=True):
        _check_alike(folders[0], manifests[0], tensors[0], folder, manifest, own)
    mean = {key: _mean(key, [own[key] for own in tensors], shares) for key in tensors[0]}
    licences = {manifest["licence"] for manifest in manifests}
    first = manifests[0]
    made = {
        **first,
        "name": first["name"] if name is None else name,
        "licence": licences.pop() if len(licences) == 1 else None,
        "metrics": {},
    }
    return write(Path(into).expanduser(), made, mean)


def _several(paths: Any) -> list[Any]:
    if isinstance(paths, (str, Path)) or not isinstance(paths, Sequence) or not paths:
        raise AdapterFileError(
            f"paths is {paths!r}, expected the folders of one adapter or several",
            'for example mmadapt.average(["./a", "./b"], "./mean")',
        )
    return list(paths)


def _shares(weights: Any, count: int) -> list[float]:
    """A share of the whole for each file."""
    if weights is None:
        return [1 / count] * count
    real = isinstance(weights, Sequence) and all(
        isinstance(w, numbers.Real) and 0 <= float(w) < float("inf") for w in weights
    )
    if not real or len(weights) != count or not sum(weights):
        raise AdapterFileError(
            f"weights is {weights!r}, expected {count} numbers of at least 0, not all of them 0"
        )
    return [float(weight) / sum(weights) for weight in weights]


def _check_alike(
    one: Path,
    manifest: dict[str, Any],
    tensors: dict[str, Tensor],
    other: Path,
    others: dict[str, Any],
    own: dict[str, Tensor],
) -> None:
    differing = [
        part
        for part, known, found in (
            ("adapters or sites", manifest["adapters"], others["adapters"]),
            *(
                (f"backbone's {part}", manifest["backbone"].get(part), others["backbone"].get(part))
                for part in ("family", "facts", "widths", "sha256")
            ),
            ("input", manifest.get("input"), others.get("input")),
            ("tensors", _kinds(tensors), _kinds(own)),
        )
        if known != found
    ]
    if differing:
        raise AdapterFileError(
            f"{other} differs from {one} in its {', '.join(differing)}",
            "only adapters that are alike have a mean; load them as several attachments instead",
        )


def _kinds(tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {key: (tuple(value.shape), value.dtype) for key, value in tensors.items()}


def _mean(key: str, values: list[Tensor], shares: list[float]) -> Tensor:
    import torch

    first = values[0]
    if not first.is_floating_point():
        if any(not torch.equal(value, first) for value in values[1:]):
            raise AdapterFileError(
                f"{key} holds {first.dtype} that differ between the files, and they have no mean"
            )
        return first
    total = torch.zeros(first.shape, dtype=torch.float64)
    for value, share in zip(values, shares, strict=True):
        total += share * value.to(torch.float64)
    return total.to(first.dtype)
