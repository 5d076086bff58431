"""What a stream costs and loses: errors by how much sound it waits for, and CPU time of a chunk.

    python benchmarks/speech_stream.py [--write]

Writes `speech_stream.json` beside itself and puts the tables into docs/speech.md. The clips are those that
come with tiny/ctc; a model of the size of wav2vec 2.0 base with random weights hears noise, for its times
alone. Times are CPU time of one thread, so that other work on the machine hardly counts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy
import torch
from machine import processor
from pages import fill

import mmadapt as mm
from mmadapt.tasks import asr
from mmadapt.tasks.audio import Audio

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "speech_stream.json"
PAGE = HERE.parent / "docs" / "speech.md"
BACKBONE = "tiny/ctc"
CHUNK, BEFORE = 0.5, 2.0
AFTER = (0.0, 0.1, 0.25, 0.5, 1.0)
#: what a model whose words mean nothing waits for
LATER = 0.25
NOISE = 12  # seconds
ADAPTER = mm.ConvAdapter(32, kernel=15, causal=True)


def heard(listen: asr.Recogniser, clip: Audio, after: float) -> tuple[str, list[float]]:
    """What a stream makes of a clip, and the CPU seconds of each push that a chunk was heard in."""
    stream, times = asr.Stream(listen, asr.Chunks(CHUNK, BEFORE, after)), []
    size = round(CHUNK * clip.rate)
    for start in range(0, len(clip), size):
        frames, began = stream.greedy.frames, time.process_time()
        stream.push(clip.samples[start : start + size])
        if stream.greedy.frames > frames:
            times.append(time.process_time() - began)
    stream.end()
    return stream.transcript.text, times


def cost(adapted: bool, after: float, times: list[float]) -> dict[str, Any]:
    """The part of a row that is about time."""
    return {
        "after": after,
        "adapter": "ConvAdapter, causal" if adapted else None,
        "ms": round(1000 * statistics.median(times), 2),
        "ms_95": round(1000 * statistics.quantiles(times, n=20)[-1], 2),
        "chunks": len(times),
    }


def measure(after: float, adapted: bool) -> dict[str, Any]:
    """Stream every clip of known voices through the backbone, with an untrained adapter or without."""
    backbone = mm.load(BACKBONE)
    if adapted:
        mm.attach(backbone, ADAPTER, name="live", seed=0)
    listen = asr.Recogniser(backbone)
    clips, texts = asr.shipped(BACKBONE)["source test"]
    found = [heard(listen, clip, after) for clip in clips]
    score = asr.Score(tuple(texts), tuple(text for text, _ in found))
    return {
        "backbone": BACKBONE,
        **cost(adapted, after, [one for _, times in found for one in times]),
        "wer": round(score.wer, 4),
        "interval": [round(bound, 4) for bound in score.interval()],
    }


def measure_base(adapted: bool) -> dict[str, Any]:
    """Stream noise through a model of the size of wav2vec 2.0 base."""
    from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

    torch.manual_seed(0)
    model = Wav2Vec2ForCTC(Wav2Vec2Config()).eval()
    if adapted:
        mm.attach(model, ADAPTER, name="live", seed=0)
    letters = asr.Vocabulary(("<pad>", "|", *"abcdefghijklmnopqrstuvwxyz0123"))
    listen = asr.Recogniser(model, vocabulary=letters)
    rate = listen.features.rate
    noise = numpy.random.default_rng(0).standard_normal(NOISE * rate)
    _, times = heard(listen, Audio.of(0.1 * noise, rate), LATER)
    return {"backbone": "wav2vec 2.0 base, random", **cost(adapted, LATER, times)}


def run() -> dict[str, Any]:
    """Measure everything anew."""
    torch.set_num_threads(1)
    measure(0.5, adapted=False)  # what is paid once
    rows = []
    for adapted in (False, True):
        for after in AFTER:
            rows.append(measure(after, adapted))
            print(rows[-1], flush=True)
        rows.append(measure_base(adapted))
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
    rows = [row for row in known["rows"] if row["backbone"] == BACKBONE]
    for row in rows:
        if row["adapter"] is None:
            low, high = (100 * bound for bound in row["interval"])
            other = next(r for r in rows if r["after"] == row["after"] and r["adapter"])
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


def latency_table(known: dict[str, Any]) -> str:
    """Markdown, a row for each backbone with and without the adapter."""
    lines = [
        "| backbone | adapter | a chunk, CPU ms | 95 % of them within | from sound to text, s |",
        "|---|---|---|---|---|",
    ]
    for row in known["rows"]:
        if row["after"] == LATER:
            latest = known["chunk"] + LATER + row["ms_95"] / 1000
            lines.append(
                f"| {row['backbone']} | {row['adapter'] or 'none'} | {row['ms']:.0f} | "
                f"{row['ms_95']:.0f} | {latest:.2f} |"
            )
    return "\n".join(lines)


def write(document: str, known: dict[str, Any]) -> str:
    """The document with its tables between the markers."""
    return fill(document, {"stream": table(known), "latency": latency_table(known)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="run nothing, only write the tables")
    options = parser.parse_args()
    known = json.loads(RESULTS.read_text()) if options.write else run()
    PAGE.write_text(write(PAGE.read_text(), known))


if __name__ == "__main__":
    main()
