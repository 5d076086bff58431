"""How long a backbone takes from its file to ready, by the zoo and by its own library.

    python benchmarks/zoo_load.py              # every model
    python benchmarks/zoo_load.py --only CLIP  # those; what was measured of others before stays

Random weights of the real shapes in a temporary folder of 4 GB, one thread; each measurement is a process of
its own that has imported its libraries before. Writes zoo_load.json beside itself and the table in docs/zoo.md.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from machine import processor
from pages import fill

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "zoo_load.json"
ROUNDS = 3
#: what is loaded -> (builder of the zoo, file, what its own library does)
CASES = {
    "SAM ViT-H": ("segment_anything:vit_h", "sam_vit_h.pth", "sam_model_registry(checkpoint=…)"),
    "SAM ViT-B": ("segment_anything:vit_b", "sam_vit_b.pth", "sam_model_registry(checkpoint=…)"),
    "CLIP ViT-B/32, open_clip": (
        "open_clip:ViT-B-32",
        "model.safetensors",
        "create_model(pretrained=…)",
    ),
    "CLIP ViT-B/32, transformers": (
        "transformers:CLIPModel",
        "model.safetensors",
        "from_pretrained",
    ),
}


def entry(case: str) -> Any:
    """A zoo entry for the files of this benchmark."""
    from mmadapt.zoo import Entry, File

    builder, file, _ = CASES[case]
    files = [File(file), *([] if file.endswith(".pth") else [File("config.json", "config")])]
    if builder.startswith("open_clip"):
        files[1] = File("open_clip_config.json", "config")
    name = "bench/" + case.lower().replace(" ", "-").replace("/", "").replace(",", "").replace(
        "_", "-"
    )
    licence = {"weights": "unknown", "declared_by": "random"}
    return Entry(name, case, builder, {"manual": "made here"}, tuple(files), licence)


def write_weights(case: str, folder: Path) -> None:
    """Random weights as they are published: a pickled state dict, or safetensors with a configuration."""
    import torch
    from safetensors.torch import save_file

    from mmadapt.zoo.weights import without_values

    folder.mkdir()
    with without_values():
        model = _bare(case)
    torch.manual_seed(0)
    state = {
        key: torch.rand(value.shape) * 0.02 if value.is_meta else value.clone()
        for key, value in model.state_dict().items()
    }
    path = folder / CASES[case][1]
    if path.suffix == ".pth":
        torch.save(state, path)
        return
    save_file(state, path, metadata={"format": "pt"})
    if case.endswith("open_clip"):
        import open_clip

        config = {"model_cfg": open_clip.get_model_config("ViT-B-32"), "preprocess_cfg": {}}
        (folder / "open_clip_config.json").write_text(json.dumps(config))
    else:
        model.config.save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        config["architectures"] = ["CLIPModel"]
        (folder / "config.json").write_text(json.dumps(config))


def _bare(case: str) -> Any:
    if case.startswith("SAM"):
        from segment_anything import sam_model_registry

        return sam_model_registry[CASES[case][0].partition(":")[2]]()
    if case.endswith("open_clip"):
        import open_clip

        from mmadapt.zoo.providers import _open_clip_model

        return _open_clip_model(open_clip.get_model_config("ViT-B-32"))
    from transformers import CLIPConfig, CLIPModel

    return CLIPModel(CLIPConfig())


def by_its_library(case: str, folder: Path) -> Callable[[], Any]:
    """What users of the library write."""
    path = folder / CASES[case][1]
    if case.startswith("SAM"):
        from segment_anything import sam_model_registry

        size = CASES[case][0].partition(":")[2]
        return lambda: sam_model_registry[size](checkpoint=str(path))
    if case.endswith("open_clip"):
        import open_clip

        return lambda: open_clip.create_model("ViT-B-32", pretrained=str(path)).eval()
    from transformers import CLIPModel

    return lambda: CLIPModel.from_pretrained(folder)


def by_the_zoo(case: str) -> Callable[[], Any]:
    """`mmadapt.load` by name, of files whose digests are known."""
    import mmadapt as mm

    name = mm.zoo.register(entry(case)).name
    mm.zoo.get(name, offline=True)
    if case.startswith("SAM"):
        import segment_anything  # noqa: F401
    elif case.endswith("open_clip"):
        import open_clip  # noqa: F401
    else:
        from transformers import CLIPModel  # noqa: F401
    return lambda: mm.load(name, offline=True)


def measure(case: str, way: str, folder: Path) -> dict[str, float]:
    """CPU and wall seconds of one load in this process, and how much memory it has come to need."""
    import torch

    torch.set_num_threads(1)
    load = by_the_zoo(case) if way == "zoo" else by_its_library(case, folder)
    before = peak_memory()
    wall, cpu = time.perf_counter(), time.process_time()
    model = load()
    found = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
    found["memory"] = peak_memory() - before
    module = getattr(model, "model", model) if way == "zoo" else model
    touched = 0
    for parameter in module.parameters():  # a byte of every page: what a first pass has to bring in
        touched += int(parameter.detach().flatten().view(torch.uint8)[::4096].sum())
    assert touched > 0
    return {**found, "used": time.perf_counter() - wall, "used_cpu": time.process_time() - cpu}


def peak_memory() -> float:
    """Megabytes this process has needed at most, mapped files included."""
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1000


def main(only: str = "") -> None:
    with tempfile.TemporaryDirectory() as place:
        os.environ["MMADAPT_CACHE"] = f"{place}/cache"
        for case in CASES:
            if only in case:
                keep(case, compare(case, Path(place) / "weights"))
    result = json.loads(RESULTS.read_text())
    page = HERE.parent / "docs" / "zoo.md"
    page.write_text(fill(page.read_text(), {"load": table(result)}))


def compare(case: str, folder: Path) -> list[dict[str, Any]]:
    """Both ways of loading one model, medians of several processes."""
    import mmadapt as mm

    _, file, usual = CASES[case]
    write_weights(case, folder)
    mm.zoo.import_file(folder / file if file.endswith(".pth") else folder, entry(case))
    megabytes = (folder / file).stat().st_size / 1e6
    rows = []
    for way in ("library", "zoo"):
        found = [_process(case, way, folder) for _ in range(ROUNDS)]
        median = {key: round(statistics.median(f[key] for f in found), 3) for key in found[0]}
        rows.append({"model": case, "way": way, "usual": usual, "file": round(megabytes), **median})
        print(rows[-1], flush=True)
    mm.zoo.rm(entry(case).name)
    shutil.rmtree(folder)
    return rows


def keep(case: str, rows: list[dict[str, Any]]) -> None:
    """Write what was measured of one model, in the order of CASES."""
    import torch

    earlier = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    rows = [row for row in earlier if row["model"] != case] + rows
    rows.sort(key=lambda row: list(CASES).index(row["model"]))
    machine = f"{processor()}, 1 thread, torch {torch.__version__}"
    result = {"machine": machine, "rounds": ROUNDS, "rows": rows}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


def _process(case: str, way: str, folder: Path) -> dict[str, float]:
    command = [sys.executable, __file__, case, way, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def table(result: dict[str, Any]) -> str:
    """The table of the page, in Markdown."""
    lines = [
        "| model | file, MB | by its own library: CPU s | wall s | memory, MB | weights read: CPU s | "
        "`mm.load`: CPU s | wall s | memory, MB | weights read: CPU s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    rows = {(row["model"], row["way"]): row for row in result["rows"]}
    for model in dict.fromkeys(row["model"] for row in result["rows"]):
        own, ours = rows[model, "library"], rows[model, "zoo"]
        numbers = " | ".join(
            f"{r['cpu']:.2f} | {r['wall']:.2f} | {r['memory']:.0f} | {r['used_cpu']:.2f}"
            for r in (own, ours)
        )
        lines.append(f"| {model} (`{own['usual']}`) | {own['file']} | {numbers} |")
    note = (
        "Mapped weights are read when they are first used: the columns `weights read` are from the start of the load "
        "until a byte of every page was looked at. Wall seconds are of a machine shared with other work. "
        f"Medians of {result['rounds']} processes that had imported the library; random weights. "
        f"{result['machine']}."
    )
    return "\n".join([*lines, "", note])


if __name__ == "__main__":
    if len(sys.argv) == 4:
        print(json.dumps(measure(sys.argv[1], sys.argv[2], Path(sys.argv[3]))))
    else:
        main(sys.argv[2] if sys.argv[1:2] == ["--only"] else "")
