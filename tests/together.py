"""What several processes do together, or one alone; started by tests/test_train_processes.py.

    python together.py FOLDER SCENARIO ...

Each scenario leaves FOLDER/scenario-rank.pt with the trained tensors and the losses.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fitting import at_call, distance, interrupt
from handmade import hidden, small
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import mmadapt as mm
from mmadapt.errors import AttachError, CheckError, DataError
from mmadapt.train.processes import Processes

torch.set_num_threads(1)
TARGETS = torch.randn(16, 5, 4, generator=torch.Generator().manual_seed(4))
DATA = (hidden(16), TARGETS)
ALONE = Processes().size == 1


def adapted() -> tuple[mm.Backbone, Any]:
    backbone = small()
    torch.manual_seed(6)
    return backbone, mm.attach(backbone, mm.Bottleneck(4), at="layers[*].mlp")


def fit(m: Any, data: Any = DATA, **options: Any) -> mm.History:
    defaults = {"loss": distance, "steps": 6, "batch_size": 8, "lr": 1e-2, "progress": False}
    return mm.fit(m, data, **{**defaults, **options})


def gradients(folder: Path) -> Any:
    """One plain step of rate 1: what changes is the gradient."""
    backbone, attachment = adapted()
    recipe = mm.Optimiser(
        clip=None,
        warmup=0.0,
        schedule="constant",
        weight_decay=0.0,
        build=lambda groups: torch.optim.SGD(groups, lr=1.0),
    )
    start = [p.detach().clone() for p in attachment.parameters()]
    history = fit(backbone, steps=1, accumulate=2, optimiser=recipe)
    return [a - b.detach() for a, b in zip(start, attachment.parameters(), strict=True)], history


def rows(folder: Path) -> Any:
    backbone, attachment = adapted()
    history = fit(backbone, accumulate=2, evaluation=mm.Evaluation(lambda m: 1.0, every=3))
    mm.save(backbone, folder / f"adapter-{Processes().rank}")
    return attachment.parameters(), history


def turns(folder: Path) -> Any:
    """A shuffled DataLoader: two processes take its batches in turns, one takes two a step."""
    backbone, attachment = adapted()
    loader = DataLoader(TensorDataset(*DATA), batch_size=4, shuffle=True)
    torch.manual_seed(8 + Processes().rank)  # the first process's order counts
    history = fit(backbone, loader, accumulate=2 if ALONE else 1)
    return attachment.parameters(), history


def passed_by(folder: Path) -> Any:
    """The loss calls parts of the model, each time others, so that some adapters have no gradient."""
    backbone, attachment = adapted()
    calls: list[int] = []

    def loss(model: Any, batch: Any) -> Tensor:
        calls.append(1)
        return model.blocks[len(calls) % 3](batch[0]).square().mean()

    history = fit(backbone, loss=loss, steps=4)
    return attachment.parameters(), history


def dropout(folder: Path) -> Any:
    """Every process draws its own."""
    backbone, _ = adapted()
    drawn: list[Tensor] = []

    def loss(model: Any, batch: Any) -> Tensor:
        drawn.append(F.dropout(torch.ones(64)))
        return distance(model, batch)

    loader = DataLoader(TensorDataset(*DATA), batch_size=4, shuffle=True)
    history = fit(backbone, loader, loss=loss, steps=1)
    return drawn, history


def cut(folder: Path) -> Any:
    """Interrupted in all processes, in the fourth step."""
    backbone, attachment = adapted()
    history = fit(backbone, loss=at_call(4, interrupt), checkpoint=folder / "run.pt")
    return attachment.parameters(), history


def resumed(folder: Path) -> Any:
    backbone, attachment = adapted()
    history = fit(backbone, checkpoint=folder / "run.pt")
    assert "at step 3" in history.notes[0], history.notes
    return attachment.parameters(), history


def plain(folder: Path) -> Any:
    backbone, attachment = adapted()
    return attachment.parameters(), fit(backbone)


def refused(folder: Path) -> Any:
    """A loss that is not finite in one process ends all, at the same step and with the same values."""
    backbone, attachment = adapted()
    calls: list[int] = []

    def loss(model: Any, batch: Any) -> Tensor:
        calls.append(1)
        bad = len(calls) == 3 and Processes().rank == Processes().size - 1
        return distance(model, batch) * (float("nan") if bad else 1.0)

    with pytest.raises(CheckError, match="the loss is nan at step 2"):
        fit(backbone, loss=loss)
    return attachment.parameters(), mm.History()


def uneven(folder: Path) -> Any:
    text = r"a batch of 7 rows cannot be shared equally by 2 processes(.|\n)*batch_size=6"
    with pytest.raises(DataError, match=text):
        fit(adapted()[0], batch_size=7)
    return [], mm.History()


# -- FSDP2 --------------------------------------------------------------------------------------


def sharded() -> tuple[mm.Backbone, Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    backbone, attachment = adapted()
    mesh = init_device_mesh("cpu", (Processes().size,))
    for block in backbone.model.get_submodule("blocks").children():
        fully_shard(block, mesh=mesh)
    fully_shard(backbone.model, mesh=mesh)
    return backbone, attachment


def full(attachment: Any) -> list[Tensor]:
    return [p.full_tensor() for p in attachment.parameters()]


def fsdp(folder: Path) -> Any:
    """Sharded, evaluated on the way, saved once and whole, and trained again."""
    backbone, attachment = sharded()
    look = mm.Evaluation(lambda m: float(m(hidden(4)).sum()), every=3, patience=5)
    kind = type(next(backbone.model.parameters()))
    history = fit(backbone, accumulate=2, steps=4)
    assert all(type(p.data) is not Tensor for p in attachment.parameters()), kind
    mm.save(backbone, folder / f"fsdp-{Processes().rank}")
    other, _ = sharded()
    seen = fit(other, evaluation=look, accumulate=2)
    assert len(seen.evaluations) == 2
    again = fit(other, steps=1)
    assert len(again.losses) == 1
    return full(attachment), history


def four(folder: Path) -> Any:
    """What `fsdp` should have learned."""
    backbone, attachment = adapted()
    history = fit(backbone, accumulate=2, steps=4)
    mm.save(backbone, folder / "alone")
    return attachment.parameters(), history


def fsdp_cut(folder: Path) -> Any:
    backbone, attachment = sharded()
    history = fit(backbone, loss=at_call(4, interrupt), checkpoint=folder / "run.pt")
    return full(attachment), history


def fsdp_resumed(folder: Path) -> Any:
    backbone, attachment = sharded()
    history = fit(backbone, checkpoint=folder / "run.pt")
    assert "at step 3" in history.notes[0], history.notes
    return full(attachment), history


def fsdp_launched(folder: Path) -> Any:
    """As under `accelerate launch --use_fsdp --fsdp_version 2`, which accelerate knows on GPUs only.

    Its state is told so by hand; what follows is accelerate's and torch's own, over gloo.
    """
    from accelerate import Accelerator, PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    os.environ["ACCELERATE_USE_FSDP"] = "true"
    state = Accelerator().state
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Block"],
        cpu_ram_efficient_loading=False,
    )
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    state._shared_state.update(distributed_type=DistributedType.FSDP, fsdp_plugin=plugin)
    backbone, _ = adapted()
    history = fit(backbone, accumulate=2, steps=4)
    assert type(backbone.model).__name__ == "FSDPSmall"
    mm.save(backbone, folder / f"launched-{Processes().rank}")
    with torch.no_grad():
        assert bool(backbone.model(hidden(2)).isfinite().all())
    assert fit(backbone, steps=1).losses[0] < history.losses[0]
    backbone.model.reshard()  # type: ignore
    del os.environ["ACCELERATE_USE_FSDP"]
    other = small()
    trained = mm.load_adapter(other, folder / "launched-0").parameters()
    return trained, history


def fsdp_late(folder: Path) -> Any:
    """An adapter that came after sharding has gradients of its own process only: refused."""
    from torch.distributed.fsdp import fully_shard

    backbone = small()
    fully_shard(backbone.model)
    mm.attach(backbone, mm.Bottleneck(4), at="layers[*].mlp")
    with pytest.raises(AttachError, match="attach first, then fully_shard"):
        fit(backbone)
    return [], mm.History()


def main(folder: Path, *names: str) -> None:
    rank = Processes().rank
    if any(name.startswith("fsdp") for name in names):
        torch.distributed.is_initialized() or torch.distributed.init_process_group("gloo")
    for name in names:
        scenario: Callable[[Path], Any] = globals()[name]
        tensors, history = scenario(folder)
        values = [tensor.detach().clone() for tensor in tensors]
        torch.save({"values": values, "losses": history.losses}, folder / f"{name}-{rank}.pt")
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        # Everything is written. gloo's threads may still hold tensors of Python, and abort the
        # process when they give them back to an interpreter that is being taken down.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
