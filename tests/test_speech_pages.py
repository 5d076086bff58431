"""The page about speech runs as it is written, and so does its benchmark."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
from backbones import ALL, CONFORMER, LARGE, _hf_speech, _hf_whisper, mels, tokens, waves

import mmadapt as mm
from mmadapt.tasks import audio

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "speech_backbones.md"


def test_the_page_about_speech_runs_as_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 5
    monkeypatch.chdir(tmp_path)
    whisper: Any = _hf_whisper("ForConditionalGeneration")()
    whisper.generation_config.max_length = None
    noise = 0.1 * numpy.random.default_rng(3).standard_normal(8000)
    names: dict[str, Any] = {
        "ctc": ALL["hf_wav2vec2_bert"].fresh(),
        "whisper": whisper,
        "conformer": _hf_speech("Wav2Vec2Conformer", "ForCTC", **{**CONFORMER, **LARGE})(),
        "padded": waves(2),
        "mms": _hf_speech("Wav2Vec2", "ForCTC", **LARGE, adapter_attn_dim=3)(),
        "clip": audio.Audio.of(noise[:3000], 16_000),
        "long": audio.Audio.of(noise, 16_000),
        "llm": ALL["hf_llama"].fresh(),
        "spoken": mels(2),
        "ids": tokens(2),
    }
    for block in blocks:
        exec(block, names)
    assert list(mm.attachments(names["mms"])) == ["deu", "again"]
    assert [start for start, _ in names["parts"]] == pytest.approx([0, 0.24, 0.26])
    assert (tmp_path / "bridge.safetensors").is_file()


def test_a_conv_adapter_of_the_page_has_the_size_it_says() -> None:
    import torch
    import transformers

    with torch.device("meta"):
        model = transformers.Wav2Vec2Model(transformers.Wav2Vec2Config())
    size = sum(record["parameters"] for record in mm.plan(model, mm.ConvAdapter()).records())
    assert f"{size:,} in 12 blocks" in PAGE.read_text()


@pytest.mark.slow
def test_the_benchmark_measures_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    part = "whisper"
    script = ROOT / "benchmarks" / "speech_cost.py"
    command = [sys.executable, str(script), "--worker", part, "--quick", "--libraries", "mmadapt"]
    path = os.pathsep.join([str(ROOT), str(script.parent)])
    run = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": path}
    )
    found = json.loads(run.stdout.splitlines()[-1])
    by_name = {row["case"]: row for row in found["rows"]}
    assert list(by_name) == [
        "frozen",
        "LoRA on q, v",
        "Bottleneck beside the MLP",
        "ConvAdapter in the encoder",
    ]
    assert (
        "text" in by_name["frozen"]
        and "step" not in by_name["frozen"]
        and by_name["LoRA on q, v"]["trained"]
    )
    monkeypatch.syspath_prepend(str(script.parent))
    import speech_cost

    versions = {"torch": "2", "transformers": "5", "peft": "0"}
    card = {"date": "today", "machine": "one", "versions": versions, "rows": found["rows"]}
    page = speech_cost.write(PAGE.read_text(), {part: card})
    assert f"| {part} | mmadapt: LoRA on q, v |" in page and "Not measured" not in page
    assert speech_cost.write(page, {part: card}) == page
