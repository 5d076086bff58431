"""The laws as a function: what mmadapt promises of every method, checked on a model and an adapter.

Compiling and exporting, and files read by a second process, are left to the package's own suite.
"""

from __future__ import annotations

import copy
import pickle
import random
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree
from torch.utils.checkpoint import checkpoint

from mmadapt.adapter import Adapter, adapters, from_json
from mmadapt.core.attach import attach, attachments, detach, disabled, set_active
from mmadapt.core.backbone import Backbone, unwrap
from mmadapt.core.bank import BANK, bank_of
from mmadapt.core.check import outside_inference, tensors_in, total
from mmadapt.core.merge import merge, unmerge
from mmadapt.core.restore import load_folder
from mmadapt.core.snapshot import changed, distance, hook_tables, randomise, state, values
from mmadapt.core.store import save
from mmadapt.core.subject import Broken, Outputs, Subject, require_difference, require_equal
from mmadapt.core.table import Table
from mmadapt.errors import AdapterError, CheckError, MergeError

_UNPICKLABLE = (pickle.PicklingError, AttributeError, RuntimeError, TypeError)


def verify(m: Any, adapter: Adapter, batch: Any, at: str | Sequence[str] | None) -> Table:
    """See `mmadapt.check_laws`."""
    model, anatomy, entry = unwrap(m)
    if adapters().get(adapter.method) is not type(adapter):
        raise AdapterError(
            f"{type(adapter).__name__} is not registered as {adapter.method!r}, and files name methods",
            "set `method` and put @mmadapt.register_adapter above the dataclass",
        )
    if from_json(adapter.to_json()) != adapter:
        raise AdapterError(
            f"{adapter!r} does not come back from its own JSON",
            "fields are plain JSON values, or tuples of them",
        )
    table = Table(("law", "verdict"))
    broken = []
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
        bare = copy.deepcopy(model)
        if bank_of(bare) is not None:
            detach(bare)
        backbone = Backbone(bare.eval(), anatomy=anatomy, entry=entry)
        subject = Subject(backbone, adapter, at, outside_inference(batch))
        for law, holds in LAWS.items():
            try:
                table.rows.append((law, holds(subject) or "holds"))
            except Broken as seen:
                broken.append(f"{law}: {seen}")
    if broken:
        raise CheckError(
            f"{len(broken)} of {len(LAWS)} laws do not hold for {adapter!r} on "
            f"{type(model).__name__}:\n  " + "\n  ".join(broken),
            "the others hold; mend these before the method is used",
        )
    table.title = f"{adapter!r} on {type(model).__name__}"
    return table


# -- the laws -----------------------------------------------------------------------------------


def _identity(subject: Subject) -> str:
    m, _ = subject.attached()
    bare = subject.frozen()
    if not subject.adapter.starts_as_identity():
        require_difference(
            subject.quietly(m), subject.quietly(bare), "it declares a start that it has not"
        )
        return f"declared: {subject.adapter.not_identity}"
    require_equal(subject.quietly(m), subject.quietly(bare), "the start is off")
    require_equal(
        subject.outputs(m), subject.outputs(bare), "the start with gradients is off", 1e-5
    )
    return ""


def _acts(subject: Subject) -> str:
    acting, bare = subject.quietly(subject.acting()[0]), subject.quietly(subject.frozen())
    require_difference(acting, bare, "with random tensors the outputs are the backbone's")
    return ""


def _random_state(subject: Subject) -> str:
    import numpy

    before = torch.get_rng_state(), random.getstate(), str(numpy.random.get_state())
    drawn = [[p.detach() for p in subject.attached(seed=1)[1].parameters()] for _ in range(2)]
    if not torch.equal(torch.get_rng_state(), before[0]):
        raise Broken("building a layer moved torch's random state: draw from `generator`")
    if before[1:] != (random.getstate(), str(numpy.random.get_state())):
        raise Broken("building a layer moved the random state of Python or numpy")
    if not all(map(torch.equal, *drawn)):
        raise Broken("one seed gave two starts")
    return ""


def _train(subject: Subject, m: Backbone, attachment: Any) -> set[str]:
    """Two steps; the names of the tensors that got a gradient other than zero."""
    reached: set[str] = set()
    for _ in range(2):
        loss = total(subject.outputs(m))
        if not loss.requires_grad:
            break
        loss.backward()
        with torch.no_grad():
            for name, parameter in attachment.named_parameters():
                if parameter.grad is not None and bool(parameter.grad.any()):
                    reached.add(name)
                    parameter -= 0.01 * parameter.grad / parameter.grad.abs().max()
                parameter.grad = None
    return reached


def _untouched(subject: Subject) -> str:
    m = subject.fresh()
    keys, before = list(m.model.state_dict()), values(m.model)
    attachment = attach(m, subject.adapter, "law", at=subject.at)
    _train(subject, m, attachment)
    moved = changed(before, values(m.model))
    if moved:
        raise Broken(f"{len(moved)} tensors of the backbone changed, first {moved[0]!r}")
    extra = [key for key in m.model.state_dict() if key not in keys]
    stray = [key for key in extra if not key.startswith(f"{BANK}.")]
    if stray or [key for key in m.model.state_dict() if key in keys] != keys:
        raise Broken(f"the backbone's own keys changed, or others came: {stray[:3]}")
    return ""


def _gradients_reach(subject: Subject) -> str:
    m, attachment = subject.attached()
    named = dict(attachment.named_parameters())
    if not named:
        return "nothing to train"
    missed = sorted(set(named) - _train(subject, m, attachment))
    if missed:
        raise Broken(f"no gradient in two steps for {', '.join(missed[:4])}")
    ours = {id(parameter) for parameter in named.values()}
    leaking = [n for n, p in m.model.named_parameters() if p.requires_grad and id(p) not in ours]
    if leaking:
        raise Broken(f"the backbone's {leaking[0]!r} requires a gradient")
    return ""


def _detach(subject: Subject) -> str:
    m = subject.fresh()
    seen, before, outputs = state(m.model), values(m.model), subject.quietly(m)
    randomise(attach(m, subject.adapter, "law", at=subject.at))
    subject.quietly(m)
    detach(m)
    if state(m.model) != seen or changed(before, values(m.model)):
        raise Broken("keys, hooks, flags, attributes or values are not what they were")
    require_equal(subject.quietly(m), outputs, "outputs are off")
    return ""


def _disabled(subject: Subject) -> str:
    m, _ = subject.acting()
    acting = subject.quietly(m)
    with disabled(m):
        require_equal(subject.quietly(m), subject.quietly(subject.frozen()), "disabled, it is off")
    require_equal(subject.quietly(m), acting, "enabled again, it is off")
    return ""


def _files(subject: Subject) -> str:
    m, _ = subject.acting()
    with tempfile.TemporaryDirectory() as folder:
        one, two = Path(folder, "one"), Path(folder, "two")
        save(m, one)
        other = subject.fresh()
        load_folder(other, one)
        save(other, two)
        require_equal(subject.quietly(other), subject.quietly(m), "what was loaded is off")
        for path in one.iterdir():
            if path.read_bytes() != (two / path.name).read_bytes():
                raise Broken(f"saved again, {path.name} is another file")
    return ""


def _copies(subject: Subject) -> str:
    m, _ = subject.acting()
    expected = subject.quietly(m)
    twins = [copy.deepcopy(m.model)]
    try:
        twins.append(pickle.loads(pickle.dumps(m.model)))
    except _UNPICKLABLE as error:
        if _pickles(subject.backbone.model):  # else it is not the adapter's fault
            raise Broken(f"the adapted model does not pickle: {error}") from error
    for twin in twins:
        require_equal(subject.quietly(twin), expected, "a copy is off")
        randomise(next(iter(attachments(twin).values())), seed=9)
        require_difference(
            subject.quietly(twin), expected, "changing a copy's adapter changes nothing"
        )
        require_equal(subject.quietly(m), expected, "changing a copy changed the original")
    return ""


def _pickles(model: nn.Module) -> bool:
    try:
        pickle.dumps(model)
    except _UNPICKLABLE:
        return False
    return True


def _switching(subject: Subject) -> str:
    alone = [subject.quietly(subject.acting(name, k)[0]) for name, k in (("a", 1), ("b", 2))]
    m, _ = subject.acting("a", 1)
    randomise(attach(m, subject.adapter, "b", at=subject.at), seed=2)
    subject.quietly(m)
    tables = hook_tables(m.model)
    for name, expected in (("a", alone[0]), ("b", alone[1]), ("a", alone[0])):
        set_active(m, name)
        require_equal(subject.quietly(m), expected, f"two are attached, and {name!r} is off")
    if hook_tables(m.model) != tables:
        raise Broken("switching touched the hook tables")
    return ""


def _recomputed(subject: Subject) -> str:
    m, attachment = subject.acting()
    wanted = list(attachment.parameters())
    if not wanted:
        return "nothing to train"
    leaves, shape = _pytree.tree_flatten(subject.batch)

    def run(*tensors: Any) -> Outputs:
        return subject.outputs(m, _pytree.tree_unflatten(list(tensors), shape))

    def gradients(outputs: Outputs) -> Outputs:
        return torch.autograd.grad(total(outputs), wanted, materialize_grads=True)

    plain = run(*leaves)
    again: Any = checkpoint(run, *leaves, use_reentrant=False)
    require_equal(again, plain, "the checkpointed pass is off")
    require_equal(gradients(again), gradients(plain), "its gradients are off", 1e-6)
    return ""


def _rows(subject: Subject) -> str:
    def take(row: int) -> Any:
        return _pytree.tree_map(
            lambda v: v[row : row + 1] if isinstance(v, Tensor) and v.ndim else v, subject.batch
        )

    def worst(m: Any) -> float:
        whole = subject.quietly(m)
        found = 0.0
        for row in range(count):
            alone = subject.quietly(m, take(row))
            own = tuple(t[row : row + 1] for t in whole if t.ndim and len(t) == count)
            found = max(found, distance(tuple(t for t in alone if t.ndim and len(t) == 1), own))
        return found

    count = next((len(tensor) for tensor in tensors_in(subject.batch) if tensor.ndim), 0)
    if count < 2:
        raise Broken(
            f"the batch has {'one row' if count else 'no tensor'}; give it two or more rows"
        )
    if worst(subject.frozen()) > 5e-5:
        return "not checked: rows see each other in the backbone itself"
    found = worst(subject.acting()[0])
    if found > 5e-5:
        raise Broken(f"a row alone and among others is off by {found:.1e} of the largest value")
    return ""


def _half_precision(subject: Subject) -> str:
    m, attachment = subject.acting()
    device = next(m.model.parameters()).device.type
    with torch.autocast(device, torch.bfloat16):
        outputs = subject.outputs(m)
    found = list(outputs)
    if any(True for _ in attachment.parameters()):
        wanted = list(attachment.parameters())
        found += torch.autograd.grad(total(outputs), wanted, materialize_grads=True)
    if not all(bool(torch.isfinite(tensor).all()) for tensor in found):
        raise Broken("outputs or gradients are not finite")
    return ""


def _merging(subject: Subject) -> str:
    m, _ = subject.acting()
    before, kept = subject.quietly(m), values(m.model)
    try:
        merge(m)
    except MergeError as refused:
        return f"refused: {refused.message.partition(': ')[2] or refused.message}"
    require_equal(subject.quietly(m), before, "merged, it is off", 1e-4)
    unmerge(m)
    if changed(kept, values(m.model)):
        raise Broken("unmerged, the backbone's weights are not what they were")
    require_equal(subject.quietly(m), before, "unmerged, it is off")
    return ""


#: law, in words -> its verification: "" where it holds, else why it does not apply; or raises
LAWS: dict[str, Callable[[Subject], str]] = {
    "starts as the identity": _identity,
    "acts once it has learned": _acts,
    "draws from its own generator only": _random_state,
    "leaves the backbone untouched": _untouched,
    "gradients reach all of it, and nothing else": _gradients_reach,
    "disabled, the model is the backbone": _disabled,
    "detached, nothing is left": _detach,
    "a file brings back the same": _files,
    "copies are equal and independent": _copies,
    "two of them switch without a trace": _switching,
    "recomputed in backward, it is the same": _recomputed,
    "no row sees its batch mates": _rows,
    "bfloat16 stays finite": _half_precision,
    "merges, or says why not": _merging,
}
