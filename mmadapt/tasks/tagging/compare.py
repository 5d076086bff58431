"""What adapting `tiny/ast` gains far from its sounds, and what it costs them; with baselines."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch

from mmadapt.adapter import (
    Adapter,
    Bottleneck,
    ConvAdapter,
    ConvPass1d,
    DeepPrompts,
    Head,
    LoRA,
)
from mmadapt.core.attach import attach, disabled, set_active
from mmadapt.core.backbone import Backbone, unwrap_model
from mmadapt.errors import DataError
from mmadapt.tasks.audio.augment import SpecAugment
from mmadapt.tasks.tagging.data import Tagged, tagged
from mmadapt.tasks.tagging.loss import TaggingLoss, logits_of
from mmadapt.tasks.tagging.metrics import precision_recall
from mmadapt.tasks.tagging.scores import Scores
from mmadapt.tasks.tagging.sounds import HALL, NEW, SOURCE, STUDIO, sounds
from mmadapt.tasks.tagging.tagger import tensors
from mmadapt.train.fit import fit
from mmadapt.train.flags import eval_mode
from mmadapt.train.history import History

AUGMENT = SpecAugment(bins=8, frames=12)


@dataclass(frozen=True)
class Method:
    """What is trained, None for the whole model, and the peak learning rate."""

    adapters: tuple[Adapter, ...] | None
    rate: float
    #: whether the whole model starts from random numbers
    scratch: bool = False


#: widths give every adapter about as many parameters, 16 to 17 thousand; `benchmarks/sound_shift.py
#: --choose` chose the rates of four on clips of their own, ConvPass1d has ConvAdapter's, others none
METHODS: dict[str, Method] = {
    "Bottleneck": Method((Bottleneck.audio(16),), 1.3e-2),
    "ConvAdapter": Method((ConvAdapter(10, kernel=5),), 1.3e-2),
    "ConvPass1d": Method((ConvPass1d(7, dropout=0.0),), 1.3e-2),
    "LoRA": Method((LoRA(8),), 1.3e-2),
    "DeepPrompts": Method((DeepPrompts(32),), 1e-2),
    "full fine-tuning": Method(None, 5e-4),
    "from scratch": Method(None, 1e-3, scratch=True),
}


@dataclass(frozen=True)
class Task:
    """Where the backbone is taken: clips to train on for a seed, and others to test on.

    With `head` the classes are others, or meant otherwise, and a new output layer is trained too; else
    the backbone's own stays as it is.
    """

    draw: Callable[[int], Tagged]
    test: Callable[[], Tagged]
    head: bool
    frozen: bool = True  # whether the backbone as it is can say anything


def _clips(count: int, seed: int, kinds: Mapping[str, Any], place: Any) -> Tagged:
    return tagged(*sounds(count, seed, kinds, place), tuple(kinds))


TRAIN_SEED, TEST_SEED = 1_000, 50


def hall(shots: int = 10, test: int = 1300) -> Task:
    """The same kinds of sounds under echoes and noise."""
    return Task(
        lambda seed: _clips(13 * shots, TRAIN_SEED + seed, SOURCE, HALL),
        lambda: _clips(test, TEST_SEED, SOURCE, HALL),
        head=False,
    )


def new_kinds(shots: int, test: int = 1000) -> Task:
    """Ten kinds of sounds that are new, under echoes and noise."""
    return Task(
        lambda seed: _clips(10 * shots, TRAIN_SEED + seed, NEW, HALL),
        lambda: _clips(test, TEST_SEED, NEW, HALL),
        head=True,
        frozen=False,
    )


def source(test: int = 1300) -> Tagged:
    """Such as the backbone was trained on."""
    return _clips(test, TEST_SEED + 1, SOURCE, STUDIO)


@dataclass
class Result:
    """What one method reached with one seed; shares in [0, 1]."""

    method: str
    parameters: int
    seed: int
    accuracy: float
    mean_average_precision: float
    seconds: float = 0.0
    #: accuracy on the sounds it was trained for, with the adaptation on and off
    source_on: float | None = None
    source_off: float | None = None
    by_class: list[float | None] = field(default_factory=list)


class Prepared:
    """Clips as tensors, made once."""

    def __init__(self, m: Any, data: Tagged) -> None:
        self.data = data
        self.tensors = tensors(m, data)

    @torch.no_grad()
    def scores(self, m: Any) -> Scores:
        """Of a model with what is active in it."""
        model, values = unwrap_model(m), self.tensors["input_values"]
        with eval_mode(model):
            logits = torch.cat([logits_of(model(part)) for part in values.split(250)])
        return Scores(self.data.names, self.data.truth, logits.softmax(-1).numpy())


def adapt(
    m: Any, method: Method, train: Prepared, *, head: bool, seed: int, steps: int, batch: int
) -> tuple[History, float]:
    """Attach and train; the last is CPU seconds. The new output layer is an attachment of its own."""
    started, model = time.process_time(), unwrap_model(m)
    names = []
    if method.adapters is not None:
        attach(m, list(method.adapters), name="sounds", seed=seed)
        names.append("sounds")
    if head:
        attach(m, Head(names=train.data.names, norm=True), name="head", seed=seed)
        names.append("head")
    if names:
        set_active(m, *names)
    if method.adapters is None:
        for name, parameter in model.named_parameters():
            if not (head and name.startswith("classifier.")):
                parameter.requires_grad_(True)
    history = fit(
        m,
        train.tensors,
        loss=TaggingLoss(AUGMENT, seed=seed),
        steps=steps,
        batch_size=batch,
        lr=method.rate,
        seed=seed,
        progress=False,
    )
    return history, time.process_time() - started


def finish(
    m: Any,
    name: str,
    history: History,
    seconds: float,
    seed: int,
    test: Prepared,
    source: Prepared,
    head: bool,
) -> Result:
    """Measure an adapted model on new clips and on those it knows, with the adaptation on and off."""
    result = _result(name, history.parameters or 0, seed, test.scores(m), seconds)
    method = METHODS[name]
    if method.scratch:
        return result
    if method.adapters is None:
        result.source_on = _source(m, source, head)
        return result
    set_active(m, "sounds")  # the backbone's own head answers
    result.source_on = source.scores(m).accuracy
    with disabled(m):
        result.source_off = source.scores(m).accuracy
    set_active(m, *(["sounds", "head"] if head else ["sounds"]))
    return result


def _source(m: Any, source: Prepared, head: bool) -> float:
    if not head:
        return source.scores(m).accuracy
    with disabled(m):
        return source.scores(m).accuracy


def _result(name: str, parameters: int, seed: int, scores: Scores, seconds: float = 0.0) -> Result:
    recall = precision_recall(scores.truth, scores.answers)[1]
    return Result(
        name,
        parameters,
        seed,
        scores.accuracy,
        scores.mean_average_precision,
        seconds,
        by_class=[None if numpy.isnan(v) else round(float(v), 4) for v in recall],
    )


def random_backbone(m: Backbone, seed: int) -> Backbone:
    """The same model with weights that were never trained."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = type(m.model)(m.model.config)  # type: ignore[call-arg]
    return Backbone(model.eval(), m.preprocess)


def run_frozen(m: Any, test: Prepared, source: Prepared) -> Result:
    """The backbone as it is."""
    result = _result("frozen", 0, 0, test.scores(m))
    result.source_on = result.source_off = source.scores(m).accuracy
    return result


def run_statistics(train: Prepared, test: Prepared, seed: int) -> Result:
    """Logistic regression on the mean and deviation of every mel bin: no backbone at all."""

    def statistics(part: Prepared) -> numpy.ndarray:
        values = part.tensors["input_values"]
        return torch.cat([values.mean(1), values.std(1)], 1).numpy()

    return _regression("mel statistics + LR", statistics, train, test, seed)


def run_probe(m: Any, train: Prepared, test: Prepared, seed: int) -> Result:
    """Logistic regression on what the frozen backbone's own head reads."""
    model: Any = unwrap_model(m)

    @torch.no_grad()
    def pooled(part: Prepared) -> numpy.ndarray:
        encoder = model.audio_spectrogram_transformer
        values = part.tensors["input_values"]
        return torch.cat([encoder(v).pooler_output for v in values.split(250)]).numpy()

    return _regression("linear probe", pooled, train, test, seed)


def _regression(
    name: str,
    features: Callable[[Prepared], numpy.ndarray],
    train: Prepared,
    test: Prepared,
    seed: int,
) -> Result:
    """C is chosen by cross-validation on the training clips."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits

    started, data = time.process_time(), train.data
    folds = min(5, int(numpy.bincount(data.labels).min()))
    if folds < 2:
        raise DataError("choosing C needs 2 clips of every class or more")
    search = GridSearchCV(
        make_pipeline(StandardScaler(), LogisticRegression(max_iter=500)),
        {"logisticregression__C": [0.003, 0.03, 0.3, 3.0]},
        cv=folds,
    )
    with threadpool_limits(torch.get_num_threads()), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # weak penalties do not converge
        inputs = features(train)
        search.fit(inputs, data.labels)
        found = search.predict_proba(features(test))
    scores = Scores(data.names, test.data.truth, found)
    size = (inputs.shape[1] + 1) * len(data.names)
    return _result(name, size, seed, scores, time.process_time() - started)
