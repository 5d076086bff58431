"""A CTC model with its features and vocabulary: from clips to words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy

from mmadapt.core.backbone import unwrap_model
from mmadapt.errors import BackboneError, DataError
from mmadapt.tasks.asr.batches import Batches
from mmadapt.tasks.asr.decode import Greedy, Transcript
from mmadapt.tasks.asr.score import Score
from mmadapt.tasks.asr.vocabulary import Unknown, Vocabulary
from mmadapt.tasks.audio.batch import alike, check_clips
from mmadapt.tasks.audio.clip import Audio
from mmadapt.tasks.audio.wave import WaveFeatures
from mmadapt.train.flags import eval_mode

if TYPE_CHECKING:
    from torch import Tensor


class Recogniser:
    """Writes down what a model with a CTC head hears, with whatever adapters are active.

    `features` make batches of clips, and are those of the model unless given; `vocabulary` is that of
    the backbone's tokenizer unless given.

        listen = asr.Recogniser(mm.load("tiny/ctc"))
        listen.transcribe([clip])[0].text
    """

    def __init__(
        self,
        m: Any,
        features: WaveFeatures | None = None,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        model: Any = unwrap_model(m)
        self.backbone, self.model = m, model
        if not hasattr(self.model, "lm_head"):
            raise BackboneError(
                f"{type(self.model).__name__} has no CTC head",
                "load the ForCTC class, such as transformers.Wav2Vec2ForCTC",
            )
        self.features = features or WaveFeatures.for_model(self.model)
        self.vocabulary = vocabulary or Vocabulary.of(m)
        rows = self.model.lm_head.out_features
        if rows != len(self.vocabulary):
            raise DataError(
                f"the model writes {rows} tokens, and the vocabulary has {len(self.vocabulary)}",
                "take the vocabulary the head was trained with",
            )

    @property
    def hop(self) -> int:
        """Samples from one frame to the next."""
        return int(numpy.prod(self.features.strides))

    @property
    def seconds(self) -> float:
        """Time from one frame to the next."""
        return self.hop / self.features.rate

    def batches(
        self,
        clips: Sequence[Audio],
        texts: Sequence[str],
        size: int = 8,
        seed: int = 0,
        unknown: Unknown = "refuse",
    ) -> Batches:
        """What `mm.fit(model, …, loss=asr.CTCLoss())` trains on."""
        return Batches(self.features, self.vocabulary, clips, texts, size, seed, unknown)

    def logits(self, clips: Sequence[Audio], batch_size: int = 16) -> list[Tensor]:
        """Of each clip (T, V) on the CPU, its padding cut off. Clips of like length go together."""
        checked = check_clips(clips, self.features.rate, self.features.least)
        found: dict[int, Tensor] = {}
        device = next(self.model.parameters()).device
        equal = not self.features.masked  # padding would be heard
        with eval_mode(self.model):
            for group in alike(checked, batch_size, equal):
                batch = self.features.batch([checked[place] for place in group])
                inputs = {name: value.to(device) for name, value in batch.inputs.items()}
                for place, row in zip(group, self.model(**inputs).logits, strict=True):
                    found[place] = row[: self.features.frames(len(checked[place]))].float().cpu()
        return [found[place] for place in range(len(checked))]

    def transcribe(self, clips: Sequence[Audio] | Audio, batch_size: int = 16) -> list[Transcript]:
        """What is said in each clip, heard whole."""
        clips = [clips] if isinstance(clips, Audio) else clips
        return [
            self.decoded(logits, clip)
            for logits, clip in zip(self.logits(clips, batch_size), clips, strict=True)
        ]

    def decoded(self, logits: Tensor, clip: Audio) -> Transcript:
        """The transcript of a clip's logits (T, V)."""
        words = Greedy(self.vocabulary, self.seconds).push(logits).words()
        return Transcript(words, clip.notes)

    def score(self, clips: Sequence[Audio], texts: Sequence[str], batch_size: int = 16) -> Score:
        """Error rates on clips whose texts are known."""
        heard = [one.text for one in self.transcribe(clips, batch_size)]
        return Score(tuple(texts), tuple(heard))

    def level(self, clip: Audio) -> tuple[Audio, WaveFeatures]:
        """The clip normalised as a whole, and the features that leave parts of it as they are."""
        if not self.features.normalise:
            return clip, self.features
        wave = clip.samples.astype(numpy.float64)
        wave = (wave - wave.mean()) / numpy.sqrt(wave.var() + 1e-7)
        return replace(clip, samples=wave.astype(numpy.float32)), replace(
            self.features, normalise=False
        )
