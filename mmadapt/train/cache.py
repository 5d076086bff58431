"""What a frozen backbone computes again and again, computed once: features, and lower layers.

A cached tensor is named by what it depends on: the backbone's weights, its preprocessing and the
data, each by digest. It is refused when anything upstream of the features trains.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmadapt.core.attached import require_bank
from mmadapt.core.backbone import unwrap_model
from mmadapt.errors import AttachError
from mmadapt.folders import cache_folder

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mmadapt.train.prefix import PrefixCache


def weights_digest(m: Any) -> str:
    """sha256 over the names, kinds and values of a backbone's tensors, adapters left out."""
    from mmadapt.core.bank import BANK

    digest = hashlib.sha256()
    for name, tensor in sorted(unwrap_model(m).state_dict().items()):
        if BANK not in name.split("."):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(_bytes(tensor))
    return digest.hexdigest()


def data_digest(images: Sequence[Any]) -> str:
    """sha256 over the sizes and values of images or arrays, in order."""
    import numpy

    digest = hashlib.sha256()
    for image in images:
        array = numpy.asarray(image)
        digest.update(f"{array.dtype} {array.shape}".encode())
        digest.update(numpy.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


@contextlib.contextmanager
def cached_prefix(
    m: Any, budget: int | str = "1 GB", folder: str | Path | None = None
) -> Iterator[PrefixCache]:
    """Inside the block, keep what enters the first adapted layer of every tower, row by row.

    At most `budget` bytes ("500 MB", "4 GB") are kept, in memory, or with a `folder` in memory-mapped
    files there, which later runs with the same weights go on using; further rows are computed each
    time. The outputs are those without the cache; compiled code computes everything.

    Raises `AttachError` where there is nothing to keep (an adapter acts in or before the first layer,
    a backbone tensor before it trains), and `CheckError` when a pass would be wrong: dropout or batch
    norms in train mode, weights that changed, adapters that became active further down, or a model
    whose later layers use more of the earlier ones than what enters them.

        with mm.cached_prefix(model, budget="4 GB"):
            mm.fit(model, train, loss=loss, steps=3000)
    """
    from mmadapt.train.prefix import PrefixCache, towers
    from mmadapt.train.rows import parse_bytes

    model, bank = require_bank(m)
    limit = parse_bytes(budget)
    found = towers(model, bank)
    if not found:
        raise AttachError(
            "there is no frozen prefix to keep: the active adapters act in the first layer of every "
            "tower, or before it",
            "adapt the top layers only, for example at='vision.layers[-4:].mlp'",
        )
    cache = PrefixCache(found)
    for tower in found:
        tower.limit = limit // len(found)
        tower.folder = None if folder is None else Path(folder).expanduser()
        tower.open()
    try:
        yield cache
    finally:
        for tower in found:
            tower.close()


def _bytes(tensor: Tensor) -> bytes:
    import torch

    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def require_frozen(m: Any, tower: str, output: str) -> None:
    """Refuse when a backbone tensor trains, or an adapter acts in `tower` before the role `output`."""
    from mmadapt.core.bank import backbone_parameters, bank_of

    model: nn.Module = unwrap_model(m)
    bank = bank_of(model)
    if bank is not None:
        training = [name for name, p in backbone_parameters(model) if p.requires_grad]
        if training:
            raise AttachError(
                f"features cannot be cached: {len(training)} backbone tensors train, first "
                f"{training[0]!r}",
                "freeze them, or compute features anew each step",
            )
        acting = [
            hook.site.name
            for hook in bank.hooks.values()
            if hook.plan and hook.site.role.startswith(f"{tower}.") and hook.site.role != output
        ]
        if acting:
            raise AttachError(
                f"features cannot be cached: an active adapter changes them at {acting[0]}"
                + (f" and {len(acting) - 1} more sites" if len(acting) > 1 else ""),
                "use mmadapt.disabled(model) around it, or compute features anew each step",
            )


def cached(key: str, make: Callable[[], Tensor], folder: Path | None = None) -> Tensor:
    """The tensor stored under `key`, or what `make()` returns, which is stored.

    A damaged file counts as absent; a cache folder that cannot be written to is passed over.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load, save

    from mmadapt.core.store import replace_file

    path = (folder or cache_folder() / "features") / f"{key}.safetensors"
    if path.is_file():
        try:
            return load(path.read_bytes())["features"]
        except (SafetensorError, KeyError, OSError):
            pass  # made again and written over below
    value = make()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, save({"features": value.contiguous()}))
    except OSError as error:
        import warnings

        warnings.warn(f"features were not kept: {error}", stacklevel=2)
    return value
