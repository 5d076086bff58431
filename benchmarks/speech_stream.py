"""What a stream costs and loses: errors by how much sound it waits for, and CPU time of a chunk.

    python benchmarks/speech_stream.py [--write]

Writes `speech_stream.json` beside itself and puts the table into docs/speech.md. The clips are those that
come with tiny/ctc. Times are CPU time of one thread, so that other work on the machine hardly counts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from machine import processor
from pages import fill

import mmadapt as mm
from mmadapt.tasks import asr

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "speech_stream.json"
PAGE = HERE.parent / "docs" / "speech.md"
BACKBONE = "tiny/ctc"
CHUNK, BEFORE = 0.5, 2.0
AFTER = (0.0, 0.1, 0.25, 0.5, 1.0)


def measure(after: float, adapter: mm.ConvAdapter | None) -> dict[str, Any]:
    """Stream every clip of known voices through the backbone, with an untrained adapter or without."""
    backbone = mm.load(BACKBONE)
    if adapter is not None:
        mm.attach(backbone, adapter, name="live", seed=0)
    listen = asr.Recogniser(backbone)
    clips, texts = asr.shipped(BACKBONE)["source test"]
    heard, times = [], []
    for clip in clips:
        stream = asr.Stream(listen, asr.Chunks(CHUNK, BEFORE, after))
        size = round(CHUNK * clip.rate)
        for start in range(0, len(clip), size):
            frames, began = stream.greedy.frames, time.process_time()
            stream.push(clip.samples[start : start + size])
            if stream.greedy.frames > frames:  # a chunk was heard
                times.append(time.process_time() - began)
        stream.end()
        heard.append(stream.transcript.text)
    score = asr.Score(tuple(texts), tuple(heard))
    return {
        "after": after,
        "adapter": None if adapter is None else "ConvAdapter, causal",
        "wer": round(score.wer, 4),
        "interval": [round(bound, 4) for bound in score.interval()],
        "ms": round(1000 * statistics.median(times), 2),
        "chunks": len(times),
    }


def run() -> dict[str, Any]:
    """Measure everything anew."""
    torch.set_num_threads(1)
    measure(0.5, None)  # what is paid once
    rows = []
    for after in AFTER:
        for adapter in (None, mm.ConvAdapter(32, kernel=15, causal=True)):
            rows.append(measure(after, adapter))
            print(rows[-1], flush=True)
    known = {
        "machine": f"{processor()}, CPU time of 1 thread, torch {torch.__version__}",
        "weights": mm.zoo.entry(BACKBONE).sha256,
        "chunk": CHUNK,
        "before": BEFORE,
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(known, indent=1) + "\n")
    return known


def table(known: dict[str, Any]) -> str:
    """Markdown, a row for each time waited."""
    lines = [
        "| waits for, s | WER % | 95 % | a chunk, CPU ms | with a causal ConvAdapter |",
        "|---|---|---|---|---|",
    ]
    for row in known["rows"]:
        if row["adapter"] is None:
            low, high = (100 * bound for bound in row["interval"])
            other = next(r for r in known["rows"] if r["after"] == row["after"] and r["adapter"])
            lines.append(
                f"| {row['after']:g} | {100 * row['wer']:.1f} | {low:.1f} to {high:.1f} | "
                f"{row['ms']:.0f} | {other['ms']:.0f} |"
            )
    lines.append(
        f"\nChunks of {known['chunk']:g} s, heard with up to {known['before']:g} s before them; the 60 clips of "
        f"known voices that come with tiny/ctc. Medians. {known['machine']}. "
        "`python benchmarks/speech_stream.py` writes it."
    )
    return "\n".join(lines)


def write(document: str, known: dict[str, Any]) -> str:
    """The document with its table between the markers."""
    return fill(document, {"stream": table(known)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="run nothing, only write the table")
    options = parser.parse_args()
    known = json.loads(RESULTS.read_text()) if options.write else run()
    PAGE.write_text(write(PAGE.read_text(), known))


if __name__ == "__main__":
    main()
