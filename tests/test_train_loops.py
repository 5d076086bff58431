"""Other people's loops train, checkpoint and resume an adapted model: transformers' Trainer, Lightning, a plain one."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from fitting import pictures
from snapshot import assert_equal, assert_same_values, flags, values
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import mmadapt as mm
from mmadapt.core.bank import BANK


class Pictures(Dataset):
    """Twelve small pictures in three classes."""

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(5)
        self.pixels = torch.randn(12, 3, 8, 8, generator=draw)

    def __len__(self) -> int:
        return 12

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {"pixel_values": self.pixels[row], "labels": row % 3}


def adapted() -> tuple[Any, Any]:
    """A classifier of transformers, with dropout, and an adapter with dropout in it."""
    model = pictures(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    return model, mm.attach(model, mm.Bottleneck(4, dropout=0.1), name="task")


def tensors(attachment: Any) -> tuple[Tensor, ...]:
    return tuple(p.detach().clone() for p in attachment.parameters())


class Modes:
    """Notes which modules of a model were in train mode at each call of its classifier."""

    def __init__(self, model: Any) -> None:
        self.seen: list[set[str]] = []
        self.model = model
        self.handle = model.classifier.register_forward_pre_hook(self)

    def __call__(self, module: nn.Module, args: tuple) -> None:
        self.seen.append({name for name, m in self.model.named_modules() if m.training})


def only_the_adapter(names: set[str]) -> bool:
    return bool(names) and all(name.startswith(f"{BANK}.layers.task") for name in names)


# -- transformers' Trainer --------------------------------------------------------------------------


def trainer(model: Any, folder: Path, steps: int, **options: Any) -> Any:
    import transformers

    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        save_steps=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        use_cpu=True,
        **options,
    )
    return transformers.Trainer(model, arguments, train_dataset=Pictures())


def test_the_trainer_trains_checkpoints_and_resumes_bit_by_bit(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    whole, expected = adapted()
    before = values(whole)
    with mm.train_mode(whole):
        trainer(whole, tmp_path / "whole", 8).train()
    assert_same_values(before, values(whole))

    first, _ = adapted()
    with mm.train_mode(first):
        trainer(first, tmp_path / "cut", 4).train()
    second, resumed = adapted()
    with mm.train_mode(second):
        trainer(second, tmp_path / "cut", 8).train(
            resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-4")
        )
    assert_equal(tensors(resumed), tensors(expected))


def test_keys_that_transformers_renames_on_saving_come_back(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model, attachment = adapted()
    start = tensors(attachment)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    own = {name for name, _ in model.named_parameters() if BANK in name.split(".")}
    assert not own & set(saved)  # this model's files say encoder.layer where it says layers
    with torch.no_grad():
        for parameter in attachment.parameters():
            parameter.zero_()
    missing, unexpected = model.load_state_dict(saved, strict=False)
    assert not [key for key in (*missing, *unexpected) if BANK in key]
    assert_equal(tensors(attachment), start)


def test_train_mode_holds_the_backbone_in_eval_mode_against_the_trainer(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model, _ = adapted()
    before, hooks = flags(model), list(model._forward_pre_hooks)
    modes = Modes(model)
    with mm.train_mode(model):
        own = trainer(model, tmp_path, 2)
        own.train()
        assert len(modes.seen) == 2 and all(map(only_the_adapter, modes.seen))
        modes.seen.clear()
        own.evaluate(Pictures())
        assert modes.seen and not any(modes.seen)  # evaluation turns the adapter's dropout off
    modes.handle.remove()
    assert flags(model) == before
    assert list(model._forward_pre_hooks) == hooks
    bare = Modes(model)
    trainer(model, tmp_path, 1).train()
    assert "classifier" in bare.seen[0]  # without it, the Trainer puts everything into train mode


# -- Lightning --------------------------------------------------------------------------------------


def lightning_module(model: Any) -> Any:
    lightning = pytest.importorskip("lightning")

    class Task(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def on_train_epoch_start(self) -> None:
            mm.train_mode(self.model)

        def training_step(self, batch: Any, index: int) -> Tensor:
            return self.model(**batch).loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], 1e-2)

    return Task()


def lightning_fit(task: Any, folder: Path, epochs: int, path: Any = None) -> Any:
    import lightning

    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(task, DataLoader(Pictures(), batch_size=4), ckpt_path=path, weights_only=False)
    return trainer


def test_lightning_trains_checkpoints_and_resumes(tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    first, attachment = adapted()
    before, start = values(first), tensors(attachment)
    modes = Modes(first)
    lightning_fit(lightning_module(first), tmp_path / "cut", 2)
    assert len(modes.seen) == 6 and all(map(only_the_adapter, modes.seen))
    assert_same_values(before, values(first))
    assert not any(map(torch.equal, start, tensors(attachment)))
    (path,) = (tmp_path / "cut").rglob("*.ckpt")

    second, resumed = adapted()
    after = lightning_fit(lightning_module(second), tmp_path / "more", 2, path)
    assert after.global_step == 6  # nothing was left to do
    assert_equal(tensors(resumed), tensors(attachment))
    third, further = adapted()
    after = lightning_fit(lightning_module(third), tmp_path / "more", 3, path)
    assert after.global_step == 9
    assert not any(map(torch.equal, tensors(further), tensors(attachment)))


# -- a plain loop -----------------------------------------------------------------------------------


def plain(model: Any, optimiser: Any, epochs: int) -> None:
    with mm.train_mode(model):
        for _ in range(epochs):
            for batch in DataLoader(Pictures(), batch_size=4):
                model(**batch).loss.backward()
                optimiser.step()
                optimiser.zero_grad()


def test_a_plain_loop_trains_checkpoints_and_resumes_bit_by_bit(tmp_path: Path) -> None:
    def setting() -> tuple[Any, Any, Any]:
        model, attachment = adapted()
        return model, attachment, torch.optim.AdamW(attachment.parameters(), lr=1e-2)

    whole, expected, optimiser = setting()
    torch.manual_seed(3)
    plain(whole, optimiser, 4)

    model, _, optimiser = setting()
    torch.manual_seed(3)
    plain(model, optimiser, 2)
    torch.save(
        {
            "model": model.state_dict(),
            "optimiser": optimiser.state_dict(),
            "random": torch.get_rng_state(),
        },
        tmp_path / "state.pt",
    )
    model, resumed, optimiser = setting()
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    model.load_state_dict(state["model"])
    optimiser.load_state_dict(state["optimiser"])
    torch.set_rng_state(state["random"])
    plain(model, optimiser, 2)
    assert_equal(tensors(resumed), tensors(expected))
