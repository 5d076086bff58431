"""Digit strings said by espeak-ng: the corpus of `tiny/ctc`, and speakers it has never heard.

    python zoo/recipes/spoken_digits.py NAME COUNT [--test] [--work DIR]

espeak-ng (GPL-3.0-or-later) is run as a program and nothing of it is kept; the clips are CC0. A string
of digits belongs to training or to testing by its digest, for every speaker alike, so no sentence
that is tested on was ever trained on. The same arguments give the same samples.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy

from mmadapt.tasks.audio import Audio

RATE = 8000
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
LENGTHS = (2, 2, 3, 3, 4, 4, 5, 5, 6, 8)

_TIMBRES = ("m1", "m2", "m3", "m5", "m7", "f2", "f3", "f4")
SPEAKERS: dict[str, tuple[str, ...]] = {
    "source": tuple(f"{accent}+{v}" for accent in ("en-us", "en-gb") for v in _TIMBRES),
    # a synthesiser of another kind
    "timbre": ("en-us+klatt4", "en-gb+klatt4"),
    "whisper": ("en-us+whisper", "en-us+whisperf"),
    # voices of other languages that read the English spelling by their own rules
    "german": ("de+m3", "de+f3"),
    "spanish": ("es+m3", "es+f3"),
}


@dataclass(frozen=True)
class Said:
    """One sentence and how it is to be said."""

    text: str
    voice: str
    speed: int
    pitch: int
    gap: int
    loudness: int


def held_out(text: str) -> bool:
    """Whether a sentence is kept for testing: a fifth of them are."""
    return hashlib.sha256(text.encode()).digest()[0] % 5 == 0


def sentences(name: str, count: int, test: bool) -> list[Said]:
    """So many sentences of a speaker group, all held out or none."""
    generator = random.Random(f"{name} {'test' if test else 'train'}")
    found: list[Said] = []
    while len(found) < count:
        text = " ".join(generator.choice(WORDS) for _ in range(generator.choice(LENGTHS)))
        if held_out(text) != test:
            continue
        found.append(
            Said(
                text,
                generator.choice(SPEAKERS[name]),
                speed=generator.randint(130, 190),
                pitch=generator.randint(35, 65),
                gap=generator.randint(0, 4),
                loudness=generator.randint(50, 130),
            )
        )
    return found


def say(said: Said) -> Audio:
    """The sentence as a clip of 8000 samples a second."""
    command = ["espeak-ng", "-v", said.voice, "-s", str(said.speed), "-p", str(said.pitch)]
    command += ["-g", str(said.gap), "-a", str(said.loudness), "-z", "--stdout", said.text]
    wave = subprocess.run(command, capture_output=True, check=True).stdout
    start = wave.find(b"data") + 8  # the header gives no length
    if start < 8:
        raise RuntimeError(f"espeak-ng said nothing: {' '.join(command)}")
    rate = int.from_bytes(wave[24:28], "little")
    samples = numpy.frombuffer(wave[start : start + (len(wave) - start) // 2 * 2], "<i2")
    clip = Audio.of(0.7 * samples.astype(numpy.float32) / 32768, rate, name=said.voice)
    return clip.resampled(RATE)


def corpus(
    name: str, count: int, test: bool = False, work: Path = Path("build/spoken_digits")
) -> tuple[list[Audio], list[str]]:
    """Clips and what is said in them; kept in the folder `work` and read from there the next time."""
    said = sentences(name, count, test)
    path = work / f"{name}-{'test' if test else 'train'}-{count}.npz"
    if not path.exists():
        if shutil.which("espeak-ng") is None:
            raise SystemExit("espeak-ng is not installed; on Debian: apt-get install espeak-ng")
        with ThreadPoolExecutor(2) as pool:
            clips = list(pool.map(say, said))
        work.mkdir(parents=True, exist_ok=True)
        # 12 bits: quieter than anything said here, and smaller files
        samples = [numpy.round(clip.samples * 2048).astype(numpy.int16) for clip in clips]
        partial = path.with_suffix(".partial.npz")
        numpy.savez(
            partial, samples=numpy.concatenate(samples), lengths=[len(one) for one in samples]
        )
        partial.rename(path)
    stored = numpy.load(path)
    ends = numpy.cumsum(stored["lengths"])[:-1]
    parts = numpy.split(stored["samples"].astype(numpy.float32) / 2048, ends)
    return [
        Audio(numpy.clip(part, -1, 1), RATE, f"{name} {place}: {one.voice}")
        for place, (part, one) in enumerate(zip(parts, said, strict=True))
    ], [one.text for one in said]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=SPEAKERS)
    parser.add_argument("count", type=int)
    parser.add_argument("--test", action="store_true")
    parser.add_argument("--work", type=Path, default=Path("build/spoken_digits"))
    options = parser.parse_args()
    clips, _ = corpus(options.name, options.count, options.test, options.work)
    seconds = sum(clip.seconds for clip in clips)
    print(f"{options.name}: {len(clips)} clips, {seconds:.0f} s, mean {seconds / len(clips):.2f} s")


if __name__ == "__main__":
    main()
