"""What the measurements decide: targets, predictions, and the table, all from the JSON alone."""

from __future__ import annotations

from typing import Any, NamedTuple

#: rows that many tokens have: memory binds
MANY = 65_536


class Verdict(NamedTuple):
    """A target, what was reached, and whether that is enough; None where nothing was measured."""

    target: str
    reached: str
    met: bool | None


def predicted(
    row: dict[str, Any], ceilings: dict[str, float], rows_a_tile: int, cluster: int
) -> float:
    """Microseconds of a forward pass, by arithmetic: memory, the second cache, or the tensor cores.

    The cache is taken to give 5.5e12 bytes a second, and the tensor cores 60 % of their best.
    """
    tokens, channels, width = row["tokens"], row["channels"], row["width"]
    memory = 4 * tokens * channels / ceilings["copy_bytes_per_second"]
    x = 4 if not cluster else 2  # Triton reads x twice, the cluster kernel once
    weights = 4 * width / (rows_a_tile * max(1, cluster))
    cache = tokens * channels * (x + weights) / 5.5e12
    products = 4 * tokens * channels * width / (0.6 * ceilings["flop_per_second"])
    return 1e6 * max(memory, cache, products) + 3


def verdicts(found: dict[str, Any]) -> list[Verdict]:
    """Every target of the work, in its order."""
    rows = [row for row in found["forward"] if row["norm"] and row["tokens"] >= MANY]
    return [
        _share("Triton forward, width ≤ 32, of the copy bandwidth", 0.75, "triton", rows, 32),
        _share("Triton forward, width 64, of the copy bandwidth", 0.60, "triton", rows, 64),
        _share("cluster forward of the copy bandwidth", 0.85, "cluster", rows, None),
        cluster_verdict(found),
        _times("forward and backward with a norm, of eager's speed", 2.1, "eager", found, True),
        _times("forward and backward without, of eager's speed", 1.7, "eager", found, False),
        _times("forward and backward, of torch.compile's speed", 1.8, "compiled", found, True),
        _mixed(found),
    ]


def cluster_verdict(found: dict[str, Any]) -> Verdict:
    """Whether the cluster kernel is 1.15 times as fast as Triton's at 768 and 1024 → 64."""
    ratios = {}
    for row in found["forward"]:
        shape = row["channels"], row["width"]
        if row["norm"] and row["tokens"] == MANY and shape in ((768, 64), (1024, 64)):
            for name, value in row["us"].items():
                if name.startswith("cluster"):
                    ratios.setdefault(name, []).append(row["us"]["triton"] / value)
    target = "cluster forward ≥ 1.15 × Triton's at 768 and 1024 → 64"
    worst = {name: min(each) for name, each in ratios.items() if len(each) == 2}
    if not worst:
        return Verdict(target, "not measured", None)
    best = max(worst, key=worst.__getitem__)
    met = worst[best] >= 1.15
    hint = f"; Thresholds(cluster={best.split()[1]})" if met else ""
    return Verdict(target, f"{worst[best]:.2f} in clusters of {best.split()[1]}{hint}", met)


def _share(
    what: str, least: float, path: str, rows: list[dict[str, Any]], width: int | None
) -> Verdict:
    shares = [
        max(share for name, share in row["share_of_copy"].items() if name.startswith(path))
        for row in rows
        if any(name.startswith(path) for name in row["share_of_copy"])
        and (width is None or (row["width"] <= 32 if width == 32 else row["width"] == width))
    ]
    target = f"{what} ≥ {least:.0%}"
    if not shares:
        return Verdict(target, "not measured", None)
    return Verdict(target, f"{min(shares):.0%} to {max(shares):.0%}", min(shares) >= least)


def _times(what: str, least: float, path: str, found: dict[str, Any], norm: bool) -> Verdict:
    ratios = [
        row["us"][path] / row["us"]["triton"]
        for row in found["step"]
        if row["norm"] == norm and row["tokens"] >= MANY and path in row["us"]
    ]
    target = f"{what} ≥ {least}"
    if not ratios:
        return Verdict(target, "not measured", None)
    return Verdict(target, f"{min(ratios):.2f} to {max(ratios):.2f}", min(ratios) >= least)


def _mixed(found: dict[str, Any]) -> Verdict:
    ratios = [r["us"]["triton"] / r["us"]["one"] for r in found["mixed"] if r["adapters"] == 64]
    target = "64 adapters in a batch ≤ 1.3 × the time of one"
    if not ratios:
        return Verdict(target, "not measured", None)
    return Verdict(target, f"{min(ratios):.2f} to {max(ratios):.2f}", max(ratios) <= 1.3)


def table(found: dict[str, Any]) -> str:
    """Markdown: every forward and step, then the targets."""
    names = ["triton", "cluster 1", "cluster 2", "cluster 4", "eager", "compiled"]
    lines = [f"{found['device']}, torch {found['torch']}. Microseconds, medians.", ""]
    for part, title in (("forward", "forward"), ("step", "forward and backward")):
        lines += _lines(
            [title, "norm", "tokens", *names, "of copy", "predicted"],
            [
                [
                    f"{row['channels']} → {row['width']}",
                    "yes" if row["norm"] else "no",
                    f"{row['tokens']:,}",
                    *(f"{row['us'][name]:.0f}" if name in row["us"] else "–" for name in names),
                    " / ".join(f"{v:.0%}" for v in row.get("share_of_copy", {}).values()) or "–",
                    " / ".join(f"{v:.0f}" for v in row.get("predicted_us", {}).values()) or "–",
                ]
                for row in found[part]
            ],
        )
    for part in ("mixed", "launch", "tiles", "vit_b"):
        rows = found[part]
        if rows:
            heads = list(dict.fromkeys(key for row in rows for key in _flat(row)))
            cells = [[_cell(_flat(row).get(head, "–")) for head in heads] for row in rows]
            lines += _lines([part, *heads], [["", *each] for each in cells])
    said = {True: "met", False: "**missed**", None: "–"}
    lines += _lines(
        ["target", "reached", ""], [[v.target, v.reached, said[v.met]] for v in verdicts(found)]
    )
    return "\n".join(lines)


def _lines(head: list[str], rows: list[list[str]]) -> list[str]:
    if not rows:
        return []
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows)] + [""]


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in row.items() if k != "us"} | row.get("us", {})


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
