"""Train `tiny/ctc`: a small transformers Wav2Vec2ForCTC that knows digits said by sixteen voices.

    python zoo/recipes/tiny_ctc.py [--out zoo/tiny/ctc] [--work DIR] [--steps N]

One CPU thread, resumes from the last checkpoint in the work directory. Needs espeak-ng, which
`spoken_digits.py` beside this file calls; the sentences it holds out never enter training.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from spoken_digits import RATE, SPEAKERS, WORDS, corpus
from torch.nn import functional as F
from training import Run, options_of, train

from mmadapt.backbones.log_mel import build
from mmadapt.tasks import asr
from mmadapt.tasks.asr import clips as shipped
from mmadapt.tasks.audio import Audio, WaveFeatures

SEED = 0
BATCH = 8
STEPS = 2000
PEAK_LEARNING_RATE = 1.5e-3
CLIPS = 3000
TEST_CLIPS = {"source": 300, "timbre": 150, "whisper": 150, "german": 150, "spanish": 150}
#: sets that come with the weights: whose, training or test, and how many of the first clips
SHIPPED = {
    "source test": ("source", True, 60),
    "whisper train": ("whisper", False, 300),
    "whisper test": ("whisper", True, 60),
    "timbre test": ("timbre", True, 4),
    "german test": ("german", True, 4),
    "spanish test": ("spanish", True, 4),
}
TOKENS = ["<pad>", "|", *sorted(set("".join(WORDS)))]
CONFIG: dict[str, Any] = {
    "vocab_size": len(TOKENS), "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None,
    "hidden_size": 144, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 576,
    "conv_dim": (64,), "conv_kernel": (RATE // 40,), "conv_stride": (RATE // 50,),
    "feat_extract_norm": "layer", "do_stable_layer_norm": True,
    "num_conv_pos_embeddings": 31, "num_conv_pos_embedding_groups": 8,
    "hidden_dropout": 0.0, "activation_dropout": 0.0, "attention_dropout": 0.0,
    "feat_proj_dropout": 0.0, "final_dropout": 0.0, "layerdrop": 0.0,
    "apply_spec_augment": False, "mask_time_prob": 0.0, "mask_feature_prob": 0.0,
    "ctc_loss_reduction": "mean", "ctc_zero_infinity": True,
    "log_mel": {"rate": RATE, "low": 60.0, "floor": 1e-6},
}  # fmt: skip


def ids(text: str) -> list[int]:
    return [TOKENS.index("|" if letter == " " else letter) for letter in text]


class Training(Run):
    """CTC on batches of clips of like length, each made louder or softer."""

    def __init__(self, steps: int, work: Path) -> None:
        from transformers import Wav2Vec2Config

        torch.manual_seed(SEED)
        model = build(Wav2Vec2Config(**CONFIG))
        super().__init__({"model": model}, steps, PEAK_LEARNING_RATE, SEED)
        self.features = WaveFeatures.for_model(model)
        self.work = work
        self.clips, self.texts = corpus("source", CLIPS, work=work)
        self.order: list[list[int]] = []

    def losses(self) -> dict[str, torch.Tensor]:
        if not self.order:
            self.order = self.draw()
        places = self.order.pop()
        batch = self.features.batch([self.louder(self.clips[place]) for place in places])
        targets = [torch.tensor(ids(self.texts[place])) for place in places]
        self.model.train()
        chances = self.model(**batch.inputs).logits.log_softmax(-1).transpose(0, 1)
        frames = [self.features.frames(int(length)) for length in batch.lengths]
        sizes = [len(target) for target in targets]
        loss = F.ctc_loss(chances, torch.cat(targets), torch.tensor(frames), torch.tensor(sizes))
        return {"total": loss}

    def draw(self) -> list[list[int]]:
        """An epoch of batches: clips are sorted by length among 20 batches' worth of them."""
        order = torch.randperm(len(self.clips), generator=self.generator).tolist()
        batches: list[list[int]] = []
        for start in range(0, len(order), 20 * BATCH):
            near = sorted(order[start : start + 20 * BATCH], key=lambda i: len(self.clips[i]))
            batches += [near[i : i + BATCH] for i in range(0, len(near), BATCH)]
        shuffled = torch.randperm(len(batches), generator=self.generator).tolist()
        return [batches[place] for place in shuffled]

    def louder(self, clip: Audio) -> Audio:
        """By −12 to +6 dB, so that the level says nothing."""
        decibels = float(torch.empty(()).uniform_(-12, 6, generator=self.generator))
        return Audio(clip.samples * 10 ** (decibels / 20), clip.rate)

    def averaged_model(self) -> torch.nn.Module:
        from transformers import Wav2Vec2Config

        model = build(Wav2Vec2Config(**CONFIG))
        model.load_state_dict(self.averaged())
        return model.eval()


def recogniser(run: Training) -> asr.Recogniser:
    """The averaged fp16 weights, ready to be heard."""
    vocabulary = asr.Vocabulary(tuple(TOKENS))
    return asr.Recogniser(run.averaged_model(), vocabulary=vocabulary)


def measure(run: Training, work: Path) -> dict[str, Any]:
    """Measure the averaged fp16 weights on sentences that training never heard."""
    listen = recogniser(run)
    found: dict[str, Any] = {"wer": {}, "wer_95": {}, "cer": {}, "n": {}}
    for name in SPEAKERS:
        clips, texts = corpus(name, TEST_CLIPS[name], test=True, work=work)
        score = listen.score(clips, texts)
        found["wer"][name] = round(score.wer, 4)
        found["wer_95"][name] = [round(bound, 4) for bound in score.interval()]
        found["cer"][name] = round(score.cer, 4)
        found["n"][name] = len(clips)
    return {
        **found,
        "definitions": {
            "wer": "changes of words over words said, all clips together; over 1 where words are added",
            "cer": "the same of characters, spaces counted",
            "wer_95": "95 % bounds from drawing the clips anew 1000 times",
            "source": "the sixteen voices of training, sentences it never heard",
            "timbre": "a synthesiser of another kind, never heard in training",
            "whisper": "whispered, never heard in training",
            "german": "English spelling read by a German voice, never heard in training",
            "spanish": "English spelling read by a Spanish voice, never heard in training",
        },
        "training_loss": "CTC, the mean over the number of characters",
        "weights": "averaged over steps, after rounding to fp16",
        "selection": "one seed, last step; nothing was chosen on these clips",
        "generator": "espeak-ng 1.51, run by zoo/recipes/spoken_digits.py",
        "training_seed": SEED,
        "steps": run.steps,
        "batch": BATCH,
        "cpu_seconds": round(run.cpu_seconds),
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "torch": torch.__version__,
    }


def write(run: Training, out: Path, work: Path) -> None:
    """Write weights, configuration, vocabulary, measurements and a few clips."""
    from safetensors.torch import save_file

    model = run.averaged_model()
    model.config.architectures = ["Wav2Vec2ForCTC"]
    model.config.save_pretrained(out)
    halves = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    save_file(halves, out / "model.safetensors", metadata={"format": "pt"})
    vocabulary = {token: number for number, token in enumerate(TOKENS)}
    (out / "vocab.json").write_text(json.dumps(vocabulary, indent=1) + "\n")
    sets = {}
    for name, (kind, test, count) in SHIPPED.items():
        clips, texts = corpus(kind, TEST_CLIPS[kind] if test else 300, test, work)
        sets[name] = (clips[:count], texts[:count])
    shipped.write(out, sets, licence="CC0-1.0", generator="espeak-ng 1.51, digits in English")
    metrics = measure(run, work)
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    print(json.dumps(metrics["wer"], indent=2))


def look(run: Run) -> str:
    """Error rate on a few more held-out sentences."""
    assert isinstance(run, Training)
    clips, texts = corpus("source", 360, test=True, work=run.work)
    return f"WER {recogniser(run).score(clips[300:], texts[300:]).wer:.4f}"


def main() -> None:
    options = options_of("ctc", STEPS)
    run = Training(options.steps, options.work)
    train(run, options.work / "checkpoint.pt", look)
    write(run, options.out, options.work)


if __name__ == "__main__":
    main()
