"""What zero-initialised attention costs: mmadapt beside PEFT's adaption_prompt and the bare decoder.

    python benchmarks/zero_init_cost.py [--quick] [--write]

Needs `peft` beside mmadapt; without it the rows of PEFT are left out. Writes `zero_init_cost.json`
beside itself and a table into docs/llama.md. CPU time of one thread, all cases in every round. The
load of the machine while it ran stands in the file, and in the table where it was not idle.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import importlib.metadata
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cost_clock import interleaved, peak_increase, quartiles, ratios
from machine import processor
from pages import fill

import mmadapt as mm

HERE = Path(__file__).resolve().parent
RESULTS, DOCUMENT = HERE / "zero_init_cost.json", HERE.parent / "docs" / "llama.md"
LENGTH = 10
SMALL = {
    "vocab_size": 128, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8,
    "num_attention_heads": 8, "num_key_value_heads": 8,
}  # fmt: skip
#: the shapes of a Llama of one billion numbers, with two of its sixteen layers
LARGE = {
    "vocab_size": 128, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 2,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
}  # fmt: skip
TINY = {**SMALL, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
CALM = 0.3  # load from others, in cores, under which the machine counts as idle


def build(shape: dict[str, int]) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**shape)).eval()


def cases(shape: dict[str, int]) -> dict[str, Any]:
    """The same decoder, bare and with ten tokens in every layer; the adapted ones share weights."""
    found = {"bare": build(shape)}
    frozen = build(shape).requires_grad_(False)
    layers = shape["num_hidden_layers"]

    def twin() -> Any:
        tensors = (*frozen.parameters(), *frozen.buffers())
        return copy.deepcopy(frozen, {id(tensor): tensor for tensor in tensors})

    for name, gate in (
        ("mmadapt, a gate per head", "head"),
        ("mmadapt, a gate per layer", "layer"),
    ):
        model = found[name] = twin()
        mm.attach(model, mm.LlamaAdapter(LENGTH, gate=gate, layers=layers))
    off = found["mmadapt, switched off"] = twin()
    mm.attach(off, mm.LlamaAdapter(LENGTH, layers=layers))
    mm.set_active(off)
    try:
        import peft
    except ImportError:
        return found
    config = peft.AdaptionPromptConfig(
        adapter_len=LENGTH, adapter_layers=layers, task_type="CAUSAL_LM"
    )
    found["PEFT adaption_prompt"] = peft.get_peft_model(twin(), config).eval()
    return found


def forward(model: Any, ids: torch.Tensor) -> Callable[[], Any]:
    def call() -> None:
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)

    return call


def step(model: Any, ids: torch.Tensor) -> Callable[[], Any]:
    """Forward and backward into what is trained."""
    trained = [p for p in model.parameters() if p.requires_grad]

    def call() -> None:
        for parameter in trained:
            parameter.grad = None
        model(input_ids=ids, use_cache=False).logits.square().mean().backward()

    return call


def timed(calls: dict[str, Callable[[], Any]], rounds: int, repeat: int) -> dict[str, Any]:
    times = interleaved(calls, rounds, repeat)
    base = times["bare"]
    return {
        name: {"ms": quartiles(own), "ratio": quartiles(ratios(own, base))}
        for name, own in times.items()
    }


def measure(quick: bool) -> dict[str, Any]:
    """Forward passes and steps of the small decoder, step and memory of the large one."""
    models = cases(TINY if quick else SMALL)
    ids = torch.randint(0, 128, (4, 64), generator=torch.Generator().manual_seed(0))
    rounds = 3 if quick else 21
    found: dict[str, Any] = {}
    for name, own, turns in (("64 tokens", ids, rounds), ("one token", ids[:, :1], 5 * rounds)):
        found[name] = timed({n: forward(m, own) for n, m in models.items()}, turns, 3)
    training = {n: m for n, m in models.items() if n != "mmadapt, switched off"}
    found["step, 64 tokens"] = timed({n: step(m, ids) for n, m in training.items()}, rounds // 2, 1)
    del models, training
    large = cases(TINY if quick else LARGE)
    large.pop("mmadapt, switched off")
    calls = {n: step(m, ids[:1]) for n, m in large.items()}
    found["large, step"] = timed(calls, 3, 1)
    found["large, bytes of a step"] = {n: peak_increase(call) for n, call in calls.items()}
    return found


def table(found: dict[str, Any] | None) -> str:
    """Markdown, a row a case; a sentence where nothing was measured yet."""
    if found is None:
        return "Not run yet; `python benchmarks/zero_init_cost.py` does, on a machine that is idle."
    rows = found["rows"]
    lines = [
        "| | 64 tokens | one token | a step, 64 tokens | large: a step | large: memory of a step |",
        "|---|---|---|---|---|---|",
    ]
    for name in rows["64 tokens"]:
        cells = []
        for part in ("64 tokens", "one token", "step, 64 tokens", "large, step"):
            own = rows[part].get(name)
            cells.append(f"{own['ms'][1]:.3g} ms, {own['ratio'][1]:.2f}×" if own else "–")
        size = rows["large, bytes of a step"].get(name)
        cells.append(f"{size / 1e6:.0f} MB" if size else "–")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    others = max(found["load_of_others"])
    calm = others <= CALM
    caveat = "" if calm else f" Other processes kept up to {others:.1f} cores busy meanwhile."
    lines.append(
        f"\nMedian CPU time of one thread and its ratio to the bare decoder's in the same round, 4 rows "
        f"(large: 1 row of 64 tokens, two layers of the shapes of a Llama of a billion numbers), "
        f"{LENGTH} tokens in every layer; a step of the bare decoder trains all of it. {found['machine']}, "
        f"{found['date']}.{caveat} `python benchmarks/zero_init_cost.py` writes it."
    )
    return "\n".join(lines)


def known() -> dict[str, Any] | None:
    """What is committed."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else None


def write(document: str, found: dict[str, Any] | None) -> str:
    return fill(document, {"cost": table(found)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model, few rounds, no file")
    parser.add_argument("--write", action="store_true", help="run nothing, only write the table")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.write:
        DOCUMENT.write_text(write(DOCUMENT.read_text(), known()))
        return
    before = max(0.0, os.getloadavg()[0])
    rows = measure(options.quick)
    versions = {}
    for name in ("torch", "transformers", "peft", "mmadapt"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    found = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{processor()}, {os.cpu_count()} cores, 1 thread",
        "versions": versions,
        "load_of_others": [round(before, 2), round(max(0.0, os.getloadavg()[0] - 1), 2)],
        "rows": rows,
    }
    if options.quick:
        print(json.dumps(found, indent=1))
        return
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))
    if DOCUMENT.exists():
        DOCUMENT.write_text(write(DOCUMENT.read_text(), found))


if __name__ == "__main__":
    main()
