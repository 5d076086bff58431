"""One process of `cost.py`: measures one part for some libraries and prints JSON.

python benchmarks/cost_worker.py launch mmadapt PEFT
python benchmarks/cost_worker.py launch mmadapt --quick --only "LoRA on q, v"
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
import time
from typing import Any

#: (rounds, calls in each) of a forward pass and of a step
ROUNDS = {"launch": ((61, 5), (31, 3)), "vit_b": ((7, 1), (5, 1))}


def passes(part: str, libraries: list[str], quick: bool, only: str | None) -> list[dict[str, Any]]:
    """Forward passes, steps and memory of every case."""
    from cost_cases import LAUNCH, TINY, VIT_B, cases
    from cost_clock import interleaved, peak_increase, quartiles, ratios

    from mmadapt.train.kept import kept_for_backward

    small = part == "launch"
    shape = TINY if quick else LAUNCH if small else VIT_B
    several = cases(libraries, shape, small)
    several = [c for c in several if only is None or only in c.key or c.library in ("bare", "timm")]
    forward, step = ((3, 1), (3, 1)) if quick else ROUNDS[part]
    training = [case for case in several if case.trains]
    forwards = interleaved({case.key: case.forward for case in several}, *forward, warm=small)
    steps = interleaved({case.key: case.step for case in training}, *step, warm=small)
    bases = {
        "ViT": ("bare: forward", "bare: full fine-tuning"),
        "timm": ("timm: bare", "timm: bare"),
    }
    found = []
    for case in several:
        forward_base, step_base = bases[case.base]
        row: dict[str, Any] = {
            "library": case.library,
            "case": case.name,
            "base": case.base,
            "sites": case.sites,
            "forward": {
                "ms": quartiles(forwards[case.key]),
                "ratio": quartiles(ratios(forwards[case.key], forwards[forward_base])),
            },
        }
        if case.trains:
            row["step"] = {
                "ms": quartiles(steps[case.key]),
                "ratio": quartiles(ratios(steps[case.key], steps[step_base])),
            }
            row["saved_bytes"] = kept_for_backward(case.model, case.loss)
            if not small:
                for parameter in case.trained:
                    parameter.grad = None
                row["peak_bytes"] = peak_increase(case.step)
                for parameter in case.trained:
                    parameter.grad = None
        found.append(row)
    return found


def importing(modules: list[str]) -> dict[str, Any]:
    """CPU milliseconds to import these, in this process, and how many modules that loads."""
    before, start = len(sys.modules), time.process_time()
    for module in modules:
        if module == "mmadapt.attach":  # the facade finds its verbs on first use
            import mmadapt

            mmadapt.attach  # noqa: B018
        else:
            __import__(module)
    milliseconds = 1000 * (time.process_time() - start)
    return {"ms": milliseconds, "modules": len(sys.modules) - before}


def versions() -> dict[str, str]:
    found = {}
    for name in ("torch", "transformers", "timm", "mmadapt", "peft", "adapters"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("part", choices=("launch", "vit_b", "life", "import"))
    parser.add_argument("libraries", nargs="+")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only")
    options = parser.parse_args()
    if options.part == "import":
        print(json.dumps(importing(options.libraries)))
        return
    import torch

    torch.set_num_threads(1)
    if options.part == "life":
        from cost_cases import TINY, VIT_B
        from cost_life import life

        shape, times = (TINY, 3) if options.quick else (VIT_B, 11)
        rows = [row for library in options.libraries for row in life(library, shape, times)]
    else:
        rows = passes(options.part, options.libraries, options.quick, options.only)
    print(json.dumps({"versions": versions(), "rows": rows}))


if __name__ == "__main__":
    main()
