"""What adapting speech models costs beside PEFT's LoRA: step, forward pass and generation.

    python benchmarks/speech_cost.py                    # everything, about twenty minutes
    python benchmarks/speech_cost.py --parts whisper    # a part again, the rest stays
    python benchmarks/speech_cost.py --quick            # tiny shapes, few rounds: does it run?

Models have the size of Whisper base and wav2vec 2.0 base and random weights. Both libraries are
measured in one process, in interleaved rounds, on one thread. Writes `speech_cost.json` beside itself
and the table of docs/speech_backbones.md; `--quick` prints and writes nothing. Where PEFT is not
installed, pip puts it into a folder of its own; `--keep FOLDER` keeps it there. It refuses to measure
on a machine that is busy, unless `--busy` says so.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS, DOCUMENT = HERE / "speech_cost.json", HERE.parent / "docs" / "speech_backbones.md"
MARK = "<!-- cost table -->"
PARTS = ("whisper", "wav2vec2")
RANK, WIDTH, SAID = 32, 32, 24
#: load of the machine, a minute's mean, above which nothing is measured
QUIET = 1.0


@dataclass
class Case:
    """One set-up: who made it, what it is, and the model."""

    library: str
    name: str
    model: Any

    @property
    def key(self) -> str:
        return f"{self.library}: {self.name}"


def backbone(part: str, quick: bool) -> tuple[Any, dict[str, Any]]:
    """A model of the part's size with random weights, and a batch with labels."""
    import torch
    import transformers

    torch.manual_seed(0)
    if part == "whisper":
        small = {
            "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
            "vocab_size": 64, "max_source_positions": 50,
        }  # fmt: skip
        base = {
            "d_model": 512, "encoder_layers": 6, "decoder_layers": 6, "encoder_ffn_dim": 2048,
            "decoder_ffn_dim": 2048, "encoder_attention_heads": 8, "decoder_attention_heads": 8,
        }  # fmt: skip
        config = transformers.WhisperConfig(
            **(small if quick else base), pad_token_id=0, bos_token_id=1, eos_token_id=2,
            decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None,
        )  # fmt: skip
        model: Any = transformers.WhisperForConditionalGeneration(config).eval()
        frames = 2 * config.max_source_positions
        return model, {
            "input_features": torch.randn(1, config.num_mel_bins, frames),
            "labels": torch.randint(3, config.vocab_size, (1, SAID)),
        }
    small = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 64, "num_conv_pos_embedding_groups": 4,
    }  # fmt: skip
    config = transformers.Wav2Vec2Config(
        **(small if quick else {}), mask_time_prob=0.0, ctc_loss_reduction="mean"
    )
    model = transformers.Wav2Vec2ForCTC(config).eval()
    samples = 4000 if quick else 64_000
    return model, {
        "input_values": torch.randn(2, samples),
        "labels": torch.randint(1, config.vocab_size, (2, 4)),
    }


def twin(model: Any) -> Any:
    """A copy with modules of its own and the same weights, so that all have one memory."""
    tensors = (*model.parameters(), *model.buffers())
    try:
        return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    except RuntimeError:  # a parametrised convolution is copied with its weights
        return copy.deepcopy(model)


def cases(part: str, model: Any, libraries: list[str]) -> Iterator[Case]:
    """The set-ups of both libraries; LoRA of one rank at the same projections."""
    bare = twin(model).requires_grad_(False)
    yield Case("bare", "frozen", bare)
    if "mmadapt" in libraries:
        import mmadapt as mm

        sites = ("*.layers[*].*.q", "*.layers[*].*.v")
        methods: dict[str, Any] = {
            "LoRA on q, v": mm.LoRA(RANK, at=sites),
            "Bottleneck beside the MLP": mm.Bottleneck(
                WIDTH, placement="parallel", at="*.layers[*].mlp"
            ),
            "ConvAdapter in the encoder": mm.ConvAdapter(WIDTH),
        }
        for name, adapter in methods.items():
            adapted = twin(model)
            mm.attach(adapted, adapter)
            yield Case("mmadapt", name, adapted)
    if "PEFT" in libraries:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["q_proj", "v_proj"])
        yield Case("PEFT", "LoRA on q, v", get_peft_model(twin(model), config).eval())


def measure(part: str, libraries: list[str], quick: bool) -> list[dict[str, Any]]:
    """One row a set-up: milliseconds of a forward pass, a step and a text, and what backward keeps."""
    import torch
    from cost_clock import interleaved, quartiles, ratios

    from mmadapt.train.kept import kept_for_backward

    torch.set_num_threads(1)
    model, batch = backbone(part, quick)
    several = {case.key: case for case in cases(part, model, libraries)}
    rounds = 2 if quick else 7

    def passes(case: Case) -> Callable[[], Any]:
        def call() -> None:
            with torch.no_grad():
                case.model(**batch)

        return call

    def steps(case: Case) -> Callable[[], Any]:
        trained = [p for p in case.model.parameters() if p.requires_grad]

        def call() -> None:
            for parameter in trained:
                parameter.grad = None
            case.model(**batch).loss.backward()

        return call

    def texts(case: Case) -> Callable[[], Any]:
        return lambda: case.model.generate(
            input_features=batch["input_features"], do_sample=False,
            min_new_tokens=SAID, max_new_tokens=SAID,
        )  # fmt: skip

    trains = {key: case for key, case in several.items() if case.library != "bare"}
    times = {
        "forward": interleaved({k: passes(c) for k, c in several.items()}, rounds, 1, warm=quick),
        "step": interleaved({k: steps(c) for k, c in trains.items()}, rounds, 1, warm=quick),
    }
    if part == "whisper":
        times["text"] = interleaved(
            {k: texts(c) for k, c in several.items()}, rounds, 1, warm=quick
        )
    rows = []
    for key, case in several.items():
        row: dict[str, Any] = {"library": case.library, "case": case.name}
        for kind, found in times.items():
            if key in found:
                row[kind] = {"ms": quartiles(found[key])}
                base = found.get("bare: frozen")
                if base:
                    row[kind]["ratio"] = quartiles(ratios(found[key], base))
        if key in trains:
            row["trained"] = sum(p.numel() for p in case.model.parameters() if p.requires_grad)
            row["saved_bytes"] = kept_for_backward(case.model, lambda c=case: c.model(**batch).loss)
        rows.append(row)
    return rows


def table(results: dict[str, Any]) -> str:
    """The rows of all parts as one table of Markdown."""
    lines = [
        "| backbone | set-up | trained | forward, ms | step, ms | 24 tokens, ms | kept for backward |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for part, found in results.items():
        for row in found["rows"]:
            cells = [part, f"{row['library']}: {row['case']}", f"{row.get('trained', 0):,}"]
            for kind in ("forward", "step", "text"):
                cells.append(f"{row[kind]['ms'][1]:.0f}" if kind in row else "")
            kept = row.get("saved_bytes")
            cells.append("" if kept is None else f"{kept / 2**20:.0f} MiB")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def write(document: str, results: dict[str, Any]) -> str:
    """The page with the table and what it was measured on behind its mark."""
    before, _, behind = document.partition(MARK)
    _, _, rest = behind.partition(MARK)
    one = next(iter(results.values()))
    said = (
        f"Medians of interleaved rounds on one thread of {one['machine']}, {one['date']}; torch "
        f"{one['versions']['torch']}, transformers {one['versions']['transformers']}, PEFT "
        f"{one['versions']['peft']}."
    )
    return f"{before}{MARK}\n{said}\n\n{table(results)}\n{MARK}{rest}"


def worker(part: str, first: Path | None, quick: bool) -> dict[str, Any]:
    """What a process of its own measured of one part."""
    paths = [str(first)] if first else []
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*paths, str(HERE.parent), str(HERE)]),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", part]
    command += ["--quick"] * quick
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument(
        "--busy", action="store_true", help="measure on a busy machine all the same"
    )
    parser.add_argument("--keep", type=Path, help="folder for PEFT where it is not installed")
    parser.add_argument("--libraries", default="mmadapt,PEFT", help=argparse.SUPPRESS)
    parser.add_argument("--worker", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        rows = measure(options.worker, options.libraries.split(","), options.quick)
        names = [n for n in ("torch", "transformers", "peft") if importlib.util.find_spec(n)]
        versions = {name: importlib.metadata.version(name) for name in names}
        print(json.dumps({"versions": versions, "rows": rows}))
        return
    load = os.getloadavg()[0]
    if load > QUIET and not (options.quick or options.busy):
        raise SystemExit(
            f"the load of this machine is {load:.1f}, above {QUIET}; wait, or pass --busy"
        )
    parts = options.parts.split(",")
    for part in parts:
        if part not in PARTS:
            parser.error(f"no part {part!r}; the parts are {', '.join(PARTS)}")
    from cost import machine, overlay

    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    with tempfile.TemporaryDirectory() as temporary:
        first = None
        if importlib.util.find_spec("peft") is None:
            first = overlay("peft", options.keep or Path(temporary))
        for part in parts:
            print(part, flush=True)
            today = datetime.date.today().isoformat()
            found = worker(part, first, options.quick)
            results[part] = {"date": today, "machine": machine(), "threads": 1, **found}
    if options.quick:
        print(table({part: results[part] for part in parts}))
        return
    RESULTS.write_text(json.dumps(results, separators=(", ", ": ")) + "\n")
    DOCUMENT.write_text(write(DOCUMENT.read_text(), results))


if __name__ == "__main__":
    main()
