"""The tables of `docs/performance.md`, made from `cost.json`."""

from __future__ import annotations

from typing import Any

from pages import fill

Row = dict[str, Any]


def write(document: str, results: dict[str, Any]) -> str:
    """`document` with every table made anew; a table whose parts are not measured stays."""
    made = {
        name: make(results)
        for name, (parts, make) in TABLES.items()
        if f"<!-- {name} table -->" in document and all(part in results for part in parts)
    }
    return fill(document, made)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _footer(part: dict[str, Any]) -> str:
    versions: dict[str, set[str]] = {}
    for found in part["versions"].values():
        for name, version in found.items():
            versions.setdefault(name, set()).add(version)
    listed = ", ".join(f"{name} {' and '.join(sorted(v))}" for name, v in sorted(versions.items()))
    where = f"{part['machine']}, {part['threads']} thread, {part['date']}"
    return f"\n{where}{'; ' + listed if listed else ''}."


def _ms(quarters: list[float]) -> str:
    low, middle, high = (f"{value:.3g}" if value < 1000 else f"{value:.0f}" for value in quarters)
    return f"{middle} ({low}–{high})"


def _ratio(quarters: list[float]) -> str:
    low, middle, high = (f"{value:.2f}" for value in quarters)
    return f"**{middle}** ({low}–{high})"


def _mib(count: int | None) -> str:
    return "–" if count is None else f"{count / 2**20:.3g}"


def _base(part: dict[str, Any], row: Row) -> Row:
    """The bare forward pass that a row is compared with."""
    wanted = ("timm", "bare") if row["base"] == "timm" else ("bare", "forward")
    return next(
        other
        for other in part["rows"]
        if other["process"] == row["process"] and (other["library"], other["case"]) == wanted
    )


def microseconds(part: dict[str, Any], row: Row) -> float | None:
    """Median CPU time a site adds to the forward pass."""
    if not row["sites"]:
        return None
    bare = _base(part, row)["forward"]["ms"][1]
    return 1000 * (row["forward"]["ratio"][1] - 1) * bare / row["sites"]


def _launch(results: dict[str, Any]) -> str:
    part = results["launch"]
    rows = []
    for row in part["rows"]:
        added = microseconds(part, row)
        step = row.get("step")
        rows.append(
            [
                row["library"] + (" (tf. 4)" if row["process"] == "adapterhub" else ""),
                row["case"],
                str(row["sites"] or "–"),
                _ms(row["forward"]["ms"]),
                _ratio(row["forward"]["ratio"]),
                "–" if added is None else f"{added:.0f}",
                "–" if step is None else _ms(step["ms"]),
                "–" if step is None else _ratio(step["ratio"]),
            ]
        )
    head = [
        "library", "set-up", "sites", "forward, ms", "× bare", "µs a site", "step, ms", "× full",
    ]  # fmt: skip
    return _table(head, rows) + "\n" + _footer(part)


def _vit_b(results: dict[str, Any]) -> str:
    part = results["vit_b"]
    rows = []
    for row in part["rows"]:
        step = row.get("step")
        rows.append(
            [
                row["library"] + (" (tf. 4)" if row["process"] == "adapterhub" else ""),
                row["case"],
                _ms(row["forward"]["ms"]),
                _ratio(row["forward"]["ratio"]),
                "–" if step is None else _ms(step["ms"]),
                "–" if step is None else _ratio(step["ratio"]),
                "–" if step is None else _mib(row["saved_bytes"]),
                "–" if step is None else _mib(row["peak_bytes"]),
            ]
        )
    head = [
        "library", "set-up", "forward, ms", "× bare", "step, ms", "× full",
        "kept for backward, MiB", "memory rises by, MiB",
    ]  # fmt: skip
    return _table(head, rows) + "\n" + _footer(part)


def _life(results: dict[str, Any]) -> str:
    part = results["life"]
    columns = list(dict.fromkeys((row["library"], row["what"]) for row in part["rows"]))
    cells: dict[str, dict[tuple[str, str], str]] = {}
    for row in part["rows"]:
        text = f"{row['bytes']:,} bytes" if "bytes" in row else _ms(row["ms"])
        cells.setdefault(row["act"], {})[row["library"], row["what"]] = text
    rows = [[act, *(found.get(column, "–") for column in columns)] for act, found in cells.items()]
    head = ["", *(f"{library}, {what}" for library, what in columns)]
    return _table(head, rows) + "\n" + _footer(part)


def _import(results: dict[str, Any]) -> str:
    part = results["import"]
    names = {"mmadapt.attach": "`import mmadapt; mmadapt.attach`"}
    rows = [
        [names.get(row["what"], f"`import {row['what']}`"), _ms(row["ms"]), str(row["modules"])]
        for row in part["rows"]
    ]
    return _table(["", "CPU ms", "modules"], rows) + "\n" + _footer(part)


# -- what was to be reached -----------------------------------------------------------------------


def find(part: dict[str, Any], library: str, case: str) -> Row:
    return next(r for r in part["rows"] if (r["library"], r["case"]) == (library, case))


def verdict(ours: list[float], theirs: list[float]) -> str:
    """By quartiles: whether ours is faster, slower, or not to be told apart."""
    if ours[2] < theirs[0]:
        return "faster"
    if ours[0] > theirs[2]:
        return "**slower**"
    lower = "lower" if ours[1] <= theirs[1] else "higher"
    return f"within the spread, median {lower}"


def _peers(results: dict[str, Any]) -> str:
    """Same method, same model: ours beside the faster of the peers, by ratios to the bare model."""
    rows = []
    for name, what in (("launch", "launch-bound"), ("vit_b", "ViT-B")):
        part = results[name]
        for row in part["rows"]:
            if row["library"] != "mmadapt":
                continue
            for kind in ("forward", "step"):
                others = [
                    other
                    for other in part["rows"]
                    if other["library"] in ("PEFT", "AdapterHub")
                    and other["case"] == row["case"]
                    and kind in other
                ]
                if not others or kind not in row:
                    continue
                peer = min(others, key=lambda other: other[kind]["ratio"][1])
                ours, theirs = row[kind]["ratio"], peer[kind]["ratio"]
                judged = verdict(ours, theirs)
                rows.append(
                    [what, row["case"], kind, _ratio(ours),
                     f"{peer['library']} {_ratio(theirs)}", judged]
                )  # fmt: skip
    return _table(["model", "method", "", "mmadapt", "the faster peer", "ours is"], rows)


def targets(results: dict[str, Any]) -> list[tuple[str, str, float, float]]:
    """(what, unit, reached, at most) of every numeric target."""
    launch = results["launch"]

    def ratio(case: str) -> float:
        return find(launch, "mmadapt", case)["forward"]["ratio"][1]

    def worst(act: str) -> float:
        rows = results["life"]["rows"]
        return max(r["ms"][1] for r in rows if r["library"] == "mmadapt" and r["act"] == act)

    imported = next(r for r in results["import"]["rows"] if r["what"] == "mmadapt")
    return [
        ("one bottleneck a layer, launch-bound", "×", ratio("bottleneck behind each MLP"), 1.15),
        ("LoRA on q and v, launch-bound", "×", ratio("LoRA on q, v"), 1.25),
        ("`import mmadapt`", "ms", imported["ms"][1], 30.0),
        ("attach, ViT-B", "ms", worst("attach"), 30.0),
        ("load, ViT-B", "ms", worst("load"), 20.0),
        ("switch, 2 attached", "ms", worst("switch, 2 attached"), 0.2),
        ("switch, 33 attached", "ms", worst("switch, 33 attached"), 0.2),
        ("switch while training, 33 attached", "ms", worst("switch while training"), 0.2),
        ("4 bottlenecks mixed in the batch", "×",
         ratio("4 bottlenecks (Pfeiffer) mixed in the batch"), 1.25),
        ("4 LoRA mixed in the batch", "×", ratio("4 LoRA mixed in the batch"), 1.25),
        ("4 bottlenecks mixed, same rows again", "×",
         ratio("4 bottlenecks (Pfeiffer) mixed, same rows again"), 1.25),
        ("4 LoRA mixed, same rows again", "×", ratio("4 LoRA mixed, same rows again"), 1.25),
    ]  # fmt: skip


def _targets(results: dict[str, Any]) -> str:
    rows = [
        [what, f"≤ {limit:g} {unit}", f"{value:.3g} {unit}",
         "reached" if value <= limit else "**not reached**"]
        for what, unit, value, limit in targets(results)
    ]  # fmt: skip
    return _table(["", "to reach", "median", ""], rows)


TABLES = {
    "targets": (("launch", "life", "import"), _targets),
    "peers": (("launch", "vit_b"), _peers),
    "launch-bound": (("launch",), _launch),
    "ViT-B": (("vit_b",), _vit_b),
    "life-cycle": (("life",), _life),
    "import": (("import",), _import),
}
