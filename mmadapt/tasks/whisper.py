"""What Whisper takes and learns from: log-mel spectrograms of 30 seconds, and tokens.

features = WhisperFeatures.for_model(model)
mm.attach(model, [mm.ConvAdapter(), mm.Bottleneck(32, at="text.layers[*].mlp")])
batch = features.batch(clips, tokenizer(texts).input_ids)
mm.fit(model, [batch.inputs])                        # the model's own loss, padding left out
model.generate(features.batch(clips).inputs["input_features"])
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from mmadapt.core.backbone import unwrap_model
from mmadapt.errors import BackboneError, DataError
from mmadapt.tasks.audio.batch import Batch, check_clips
from mmadapt.tasks.audio.clip import Audio
from mmadapt.tasks.audio.levels import SILENT, decibels
from mmadapt.tasks.audio.windows import windows

if TYPE_CHECKING:
    import numpy
    from torch import Tensor

#: what a loss leaves out
IGNORED = -100
_HOP, _LEAST = 160, 400
_TOKENS = "give what the tokenizer made of it: tokenizer(text).input_ids"


@dataclass(frozen=True)
class WhisperFeatures:
    """How clips become a batch (B, mel bins, frames) for Whisper.

    Whisper hears `seconds` at once, silence behind a shorter clip included. transformers' own features
    cut a longer one without a word; here it is refused, unless `long="cut"` asks for its beginning.
    """

    mel_bins: int = 80
    seconds: float = 30.0
    #: most tokens of a text, the one that starts it and is told to the decoder included
    most_tokens: int = 448
    #: the token that the model itself puts before a text it learns from
    start: int | None = None
    vocabulary: int | None = None
    long: Literal["refuse", "cut"] = "refuse"
    rate: int = 16_000

    def __post_init__(self) -> None:
        if self.long not in ("refuse", "cut"):
            raise DataError(f"long is {self.long!r}, expected 'refuse' or 'cut'")

    @classmethod
    def for_model(cls, m: Any, **changes: Any) -> WhisperFeatures:
        """Those that a Whisper of transformers takes."""
        model = unwrap_model(m)
        config: Any = getattr(model, "config", None)
        if getattr(config, "model_type", "") != "whisper":
            raise BackboneError(
                f"{type(model).__name__} is no Whisper",
                "WaveFeatures and SpectrumFeatures of mmadapt.tasks.audio are for other encoders",
            )
        options = {
            "mel_bins": config.num_mel_bins,
            "seconds": 2 * config.max_source_positions * _HOP / 16_000,
            "most_tokens": config.max_target_positions,
            "start": config.decoder_start_token_id,
            "vocabulary": config.vocab_size,
        }
        return cls(**{**options, **changes})

    @property
    def samples(self) -> int:
        """How many samples Whisper hears at once."""
        return round(self.seconds * self.rate)

    def batch(self, clips: Sequence[Audio], tokens: Any = None) -> Batch:
        """`input_features` of the clips, with `labels` where their tokens are given.

        Warns of silent clips that have tokens.
        """
        from transformers import WhisperFeatureExtractor

        checked = check_clips(clips, self.rate, _LEAST)
        for place, clip in enumerate(checked):
            if len(clip) > self.samples and self.long == "refuse":
                raise DataError(
                    f"clip {place}{f' ({clip.name})' if clip.name else ''} lasts {clip.seconds:.1f} s, and "
                    f"Whisper hears {self.seconds:g} s at once; the rest would be cut without a word",
                    f"audio.windows(clip, {self.seconds:g}, {self.seconds:g}) gives its parts, "
                    "generate_parts(model, clip) their texts, and WhisperFeatures.for_model(model, "
                    'long="cut") takes its beginning',
                )
        extractor = WhisperFeatureExtractor(feature_size=self.mel_bins)
        made = extractor(
            [clip.samples[: self.samples] for clip in checked],
            sampling_rate=self.rate,
            max_length=self.samples,
            return_tensors="pt",
        )
        import torch

        inputs = {"input_features": made["input_features"]}
        if tokens is not None:
            inputs["labels"] = self.labels(tokens)
            if len(inputs["labels"]) != len(checked):
                raise DataError(
                    f"{len(checked)} clips have the tokens of {len(inputs['labels'])} texts"
                )
            _warn_of_silence([clip.samples[: self.samples] for clip in checked], inputs["labels"])
        frames = [min(len(clip), self.samples) // _HOP for clip in checked]
        return Batch(inputs, torch.tensor(frames))

    def labels(self, texts: Iterable[Any]) -> Tensor:
        """Tokens of each text (B, N) for the model's loss, padded with −100, which it leaves out.

        The model puts its start token before them, so one that stands there is taken off.
        """
        import torch

        rows = [_numbers(place, text) for place, text in enumerate(texts)]
        rows = [row[1:] if row and row[0] == self.start else row for row in rows]
        for place, row in enumerate(rows):
            self._check_tokens(place, row)
        if not rows:
            raise DataError("there are no texts")
        whole = torch.full((len(rows), max(map(len, rows))), IGNORED)
        for place, row in enumerate(rows):
            whole[place, : len(row)] = torch.tensor(row)
        return whole

    def _check_tokens(self, place: int, row: list[Any]) -> None:
        if not row:
            raise DataError(f"text {place} has no tokens", _TOKENS)
        if any(not isinstance(token, int) for token in row):
            raise DataError(f"text {place} holds {row[0]!r}, expected ids of tokens", _TOKENS)
        if len(row) > self.most_tokens:
            raise DataError(
                f"text {place} has {len(row)} tokens, and Whisper's decoder takes {self.most_tokens}",
                "cut the clip and its text into parts",
            )
        top = self.vocabulary
        wrong = [t for t in row if t != IGNORED and (t < 0 or (top is not None and t >= top))]
        if wrong:
            most = "" if top is None else f" to {top - 1}"
            raise DataError(
                f"text {place} has the token {wrong[0]}, and the model knows those from 0{most}",
                "use the tokenizer of this model",
            )


def _numbers(place: int, text: Any) -> list[Any]:
    import torch

    try:
        return torch.as_tensor(text).flatten().tolist()
    except (TypeError, ValueError, RuntimeError):
        raise DataError(f"text {place} is {text!r}, expected ids of tokens", _TOKENS) from None


def _warn_of_silence(heard: list[numpy.ndarray], labels: Tensor) -> None:
    for place, samples in enumerate(heard):
        if decibels(samples) < SILENT:
            count = int((labels[place] != IGNORED).sum())
            warnings.warn(
                f"clip {place} is silent, and Whisper learns to write {count} tokens for it: leave it out "
                "unless they say that nothing was said",
                stacklevel=3,
            )


def generate_parts(
    m: Any,
    clip: Audio,
    hop: float | None = None,
    features: WhisperFeatures | None = None,
    **options: Any,
) -> list[tuple[float, Tensor]]:
    """(start in seconds, tokens) of each part of a clip of any length, as `model.generate` gives them.

    Parts are as long as Whisper hears at once and begin every `hop` seconds, by default where the one
    before ends: a word that is cut in two may be lost or said twice. With a smaller `hop` parts overlap,
    and joining their texts is yours. `options` go to `generate`.
    """
    model: Any = unwrap_model(m)
    features = features or WhisperFeatures.for_model(model)
    device = next(model.parameters()).device
    found = []
    for start, part in windows(clip, features.seconds, features.seconds if hop is None else hop):
        if len(part) < _LEAST:  # less than a frame is left
            continue
        heard = features.batch([part]).inputs["input_features"].to(device, model.dtype)
        found.append((start, model.generate(heard, **options)[0]))
    return found
