"""What an adapter costs outside of forward passes: attach, switch, save, load, size; for `cost.py`.

Each library in a process of its own, as its users have it, on ViT-B.
"""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cost_cases import MANY, RANK, Bench, Shape
from cost_clock import quartiles


def life(library: str, shape: Shape, times: int) -> list[dict[str, Any]]:
    """CPU milliseconds of each act, and bytes on disk, for one library."""
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        found = LIVES[library](Bench(shape), times, Path(folder) / "saved")
    return [{"library": library, **row} for row in found]


def _timed(times: int, act: Callable[[Any], Any], prepare: Callable[[], Any] = lambda: None):
    """Quartiles of `act`'s CPU milliseconds; `prepare` makes what it is given, untimed."""
    act(prepare())  # imports, caches
    found = []
    for _ in range(times):
        given = prepare()
        start = time.process_time()
        act(given)
        found.append(1000 * (time.process_time() - start))
    return quartiles(found)


def _switching(times: int, switch: Callable[[str], Any]) -> list[float]:
    """Quartiles of one switch, between two of those attached; ten at a time, since one is short."""

    def ten(_: Any) -> None:
        for _ in range(5):
            switch("a0")
            switch("a1")

    return [float(f"{value / 10:.4g}") for value in _timed(times, ten)]


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _row(act: str, what: str, ms: list[float] | None = None, **more: Any) -> dict[str, Any]:
    return {"act": act, "what": what, **({} if ms is None else {"ms": ms}), **more}


def _of_mmadapt(bench: Bench, times: int, folder: Path) -> list[dict[str, Any]]:
    import mmadapt as mm

    lora, bottleneck = mm.LoRA(RANK), mm.Bottleneck.pfeiffer(bench.shape.bottleneck)
    return [
        *_acts_of_mmadapt(bench, times, folder / "lora", "LoRA", lora),
        *_acts_of_mmadapt(bench, times, folder / "bottleneck", "bottleneck", bottleneck),
    ]


def _acts_of_mmadapt(
    bench: Bench, times: int, saved: Path, what: str, adapter: Any
) -> list[dict[str, Any]]:
    import mmadapt as mm

    model = bench.twin()

    def bare() -> Any:
        if mm.attachments(model):
            mm.detach(model)
        return model

    def attach(count: int) -> None:
        bare()
        for index in range(count):
            mm.attach(model, adapter, name=f"a{index}")

    def switch(name: str) -> None:
        mm.set_active(model, name)

    found = [
        _row("attach", what, _timed(times, lambda m: mm.attach(m, adapter, name="a0"), bare)),
        _row("save", what, _timed(times, lambda _: mm.save(model, saved))),
        _row("load", what, _timed(times, lambda m: mm.load_adapter(m, saved), bare)),
        _row("size", what, bytes=_bytes(saved)),
    ]
    for count in (2, MANY):
        attach(count)
        found.append(_row(f"switch, {count} attached", what, _switching(times, switch)))
    for name in ("a0", "a1"):
        switch(name)
        model(bench.pixels).last_hidden_state.mean().backward()
    found.append(_row("switch while training", what, _switching(times, switch)))
    return found


def _of_peft(bench: Bench, times: int, folder: Path) -> list[dict[str, Any]]:
    from peft import LoraConfig, PeftModel, get_peft_model

    def config() -> Any:
        return LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["q_proj", "v_proj"])

    found = [
        _row("attach", "LoRA", _timed(times, lambda m: get_peft_model(m, config()), bench.twin))
    ]
    model: Any = get_peft_model(bench.twin(), config())
    found.append(_row("save", "LoRA", _timed(times, lambda _: model.save_pretrained(str(folder)))))
    load = _timed(times, lambda m: PeftModel.from_pretrained(m, str(folder)), bench.twin)
    found.append(_row("load", "LoRA", load))
    found.append(_row("size", "LoRA", bytes=_bytes(folder)))
    for count in (2, MANY):
        model = get_peft_model(bench.twin(), config(), "a0")
        for index in range(1, count):
            model.add_adapter(f"a{index}", config())
        found.append(
            _row(f"switch, {count} attached", "LoRA", _switching(times, model.set_adapter))
        )
    return found


def _of_adapterhub(bench: Bench, times: int, folder: Path) -> list[dict[str, Any]]:
    from adapters import LoRAConfig, SeqBnConfig

    lora, bottleneck = (
        LoRAConfig(r=RANK, alpha=RANK),
        SeqBnConfig(reduction_factor=bench.shape.reduction),
    )
    return [
        *_acts_of_adapterhub(bench, times, folder / "lora", "LoRA", lora),
        *_acts_of_adapterhub(bench, times, folder / "bottleneck", "bottleneck", bottleneck),
    ]


def _acts_of_adapterhub(
    bench: Bench, times: int, saved: Path, what: str, config: Any
) -> list[dict[str, Any]]:
    import adapters

    saved.mkdir(parents=True)

    def ready() -> Any:
        model = bench.twin()
        adapters.init(model)
        return model

    def attach(model: Any) -> Any:
        adapters.init(model)
        model.add_adapter("a0", config=config)
        model.train_adapter("a0")
        return model

    def load(model: Any) -> None:
        model.load_adapter(str(saved), use_safetensors=True, set_active=True)

    model = attach(bench.twin())
    found = [
        _row("attach", what, _timed(times, attach, bench.twin)),
        _row(
            "save",
            what,
            _timed(times, lambda _: model.save_adapter(str(saved), "a0", use_safetensors=True)),
        ),
        _row("load", what, _timed(times, load, ready)),
        _row("size", what, bytes=_bytes(saved)),
    ]
    for count in (2, MANY):
        several = attach(bench.twin())
        for index in range(1, count):
            several.add_adapter(f"a{index}", config=config)
        ms = _switching(times, several.set_active_adapters)
        found.append(_row(f"switch, {count} attached", what, ms))
    return found


LIVES: dict[str, Callable[[Bench, int, Path], list[dict[str, Any]]]] = {
    "mmadapt": _of_mmadapt,
    "PEFT": _of_peft,
    "AdapterHub": _of_adapterhub,
}
