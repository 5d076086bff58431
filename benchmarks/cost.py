"""What adapters cost: mmadapt beside PEFT and AdapterHub, in environments this command makes.

    python benchmarks/cost.py                       # everything, about twenty minutes
    python benchmarks/cost.py --parts launch,life   # some parts again, the rest stays
    python benchmarks/cost.py --quick               # a tiny model, few rounds: does it run?

Writes `cost.json` beside itself and the tables into `docs/performance.md`; `--quick` prints the
tables and writes nothing. The peers are installed by pip without their dependencies into folders
that come before the packages of this environment, which must have mmadapt, transformers 5 and timm;
torch is shared. `--keep FOLDER` keeps those folders and finds them there again.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from cost_clock import quartiles
from cost_tables import write
from machine import processor

HERE = Path(__file__).resolve().parent
RESULTS, DOCUMENT = HERE / "cost.json", HERE.parent / "docs" / "performance.md"

#: what each overlay holds; AdapterHub cannot run on the transformers that mmadapt needs
OVERLAYS = {
    "peft": ["peft==0.21.2", "accelerate==1.15.0", "psutil==7.2.2"],
    "adapterhub": [
        "adapters==1.3.0",
        "transformers==4.57.6",
        "huggingface-hub==0.36.2",
        "tokenizers==0.22.2",
    ],
}
#: per part: the processes it takes, as (overlay or "", libraries measured in it)
PROCESSES = {
    "launch": [("peft", ["mmadapt", "PEFT", "by hand", "timm"]), ("adapterhub", ["AdapterHub"])],
    "vit_b": [("peft", ["mmadapt", "PEFT"]), ("adapterhub", ["AdapterHub"])],
    "life": [("", ["mmadapt"]), ("peft", ["PEFT"]), ("adapterhub", ["AdapterHub"])],
    "import": [
        ("", ["mmadapt"]),
        ("", ["torch"]),
        ("", ["mmadapt.attach"]),
        ("peft", ["peft"]),
        ("adapterhub", ["adapters"]),
    ],
}
IMPORTS = 5


def machine() -> str:
    """What the milliseconds were measured on."""
    return f"{processor()}, {os.cpu_count()} cores"


def overlay(name: str, folder: Path) -> Path:
    """The folder of packages that come first for a peer, installed if it is not there yet."""
    target = folder / name
    if not (target / "complete").exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        subprocess.run([*pip, "--target", str(target), *OVERLAYS[name]], check=True)
        (target / "complete").touch()
    return target


def worker(part: str, libraries: list[str], first: Path | None, quick: bool) -> dict[str, Any]:
    """What one process measured."""
    paths = [str(first)] if first else []
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*paths, str(HERE.parent)]),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",  # nothing is asked over the network while the clock runs
    }
    command = [sys.executable, str(HERE / "cost_worker.py"), part, *libraries]
    done = subprocess.run(
        command + ["--quick"] * quick, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(part: str, folder: Path, quick: bool) -> dict[str, Any]:
    """All processes of one part, one after another."""
    rows: list[dict[str, Any]] = []
    versions: dict[str, dict[str, str]] = {}
    for name, libraries in PROCESSES[part]:
        first = overlay(name, folder) if name else None
        print(f"{part}: {', '.join(libraries)}", flush=True)
        if part == "import":
            several = [
                worker(part, libraries, first, quick) for _ in range(2 if quick else IMPORTS)
            ]
            milliseconds = quartiles(one["ms"] for one in several)
            rows.append(
                {"what": libraries[0], "ms": milliseconds, "modules": several[0]["modules"]}
            )
            continue
        found = worker(part, libraries, first, quick)
        versions[name or "mmadapt"] = found["versions"]
        process = name or "mmadapt"
        rows += [{"process": process, **row} for row in found["rows"]]
    today = datetime.date.today().isoformat()
    return {"date": today, "machine": machine(), "threads": 1, "versions": versions, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--parts", default=",".join(PROCESSES))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--keep", type=Path, help="folder for the peers' packages")
    options = parser.parse_args()
    parts = options.parts.split(",")
    for part in parts:
        if part not in PROCESSES:
            parser.error(f"no part {part!r}; the parts are {', '.join(PROCESSES)}")
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    with tempfile.TemporaryDirectory() as temporary:
        for part in parts:
            results[part] = measure(part, options.keep or Path(temporary), options.quick)
    if options.quick:
        print(json.dumps({part: results[part] for part in parts}, indent=1))
        return
    RESULTS.write_text(json.dumps(results, indent=None, separators=(", ", ": ")) + "\n")
    DOCUMENT.write_text(write(DOCUMENT.read_text(), results))


if __name__ == "__main__":
    main()
