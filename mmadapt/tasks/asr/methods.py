"""Ways to teach a CTC model new speakers, each at the rate that `benchmarks/speech_rates.py` chose."""

from __future__ import annotations

import time
from dataclasses import dataclass

from mmadapt.adapter import Adapter, Bottleneck, ConvAdapter, LoRA, Unlock
from mmadapt.core.attach import attach
from mmadapt.core.attachment import Attachment
from mmadapt.core.backbone import unwrap_model
from mmadapt.errors import DataError, did_you_mean
from mmadapt.tasks.asr.loss import CTCLoss
from mmadapt.tasks.asr.recogniser import Recogniser
from mmadapt.tasks.audio.clip import Audio
from mmadapt.train.fit import fit
from mmadapt.train.history import History


@dataclass(frozen=True)
class Method:
    """What is trained, None for the whole model, and the peak learning rate."""

    adapter: Adapter | None
    rate: float
    #: its sites, where they are not the adapter's own
    at: tuple[str, ...] | None = None


#: of every bias in the encoder's blocks
BIASES = tuple(
    f"audio.layers[*].{part}.bias"
    for part in ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.up", "mlp.down", "norm1", "norm2")
)

#: every matrix in the encoder's blocks
MATRICES = tuple(
    f"audio.layers[*].{part}"
    for part in ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.up", "mlp.down")
)

#: on tiny/ctc LoRA, Bottleneck and ConvAdapter have as many parameters, within 1 %, LoRA everywhere
#: 4 % more
METHODS: dict[str, Method] = {
    "head only": Method(Unlock(), 9.6e-2, at=("logits", "logits.bias")),
    "biases": Method(Unlock(), 0.192, at=BIASES),
    "LoRA": Method(LoRA(26), 1.2e-2),
    "LoRA everywhere": Method(LoRA(6, at=MATRICES), 1.2e-2),
    "Bottleneck": Method(Bottleneck(51, placement="parallel", at=("audio.layers[*].mlp",)), 2.4e-2),
    "ConvAdapter": Method(ConvAdapter(32, kernel=15), 4.8e-2),
    "full fine-tuning": Method(None, 3e-3),
}


@dataclass(frozen=True)
class Taught:
    """What came of one method: its attachment, None for the whole model, its history and CPU seconds."""

    attachment: Attachment | None
    history: History
    seconds: float


def teach(
    listen: Recogniser,
    method: str,
    clips: list[Audio],
    texts: list[str],
    *,
    steps: int,
    name: str = "speech",
    size: int = 8,
    seed: int = 0,
    rate: float | None = None,
    progress: bool = False,
) -> Taught:
    """Attach what the method says and train it on the clips, at its own rate unless one is given."""
    if method not in METHODS:
        raise DataError(f"no method is called {method!r}", did_you_mean(method, METHODS))
    chosen, attachment = METHODS[method], None
    batches = listen.batches(clips, texts, size=size, seed=seed)
    started = time.process_time()
    if chosen.adapter is None:
        unwrap_model(listen.backbone).requires_grad_(True)
    else:
        attachment = attach(listen.backbone, chosen.adapter, name=name, at=chosen.at, seed=seed)
    history = fit(
        listen.backbone,
        batches,
        loss=CTCLoss(listen.vocabulary.blank),
        steps=steps,
        lr=chosen.rate if rate is None else rate,
        seed=seed,
        progress=progress,
        label=method,
    )
    return Taught(attachment, history, time.process_time() - started)
