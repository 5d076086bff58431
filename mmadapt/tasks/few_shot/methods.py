"""The methods a comparison runs: baselines, adapters and full fine-tuning, each from one problem."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.nn import functional as F

from mmadapt.adapter import Adapter, Bottleneck, ClipAdapter, LoRA, TipAdapter
from mmadapt.core.attach import attach, detach, disabled
from mmadapt.core.backbone import Backbone
from mmadapt.tasks.few_shot.classifier import ZeroShotClassifier
from mmadapt.tasks.few_shot.data import Labelled
from mmadapt.tasks.few_shot.features import adapted, embed, embed_pixels, pixels, remember, search
from mmadapt.tasks.few_shot.score import Score, score
from mmadapt.train.fit import fit


@dataclass
class Problem:
    """One draw of shots: what every method gets, and nothing else."""

    backbone: Backbone
    classifier: ZeroShotClassifier
    support: Labelled
    validation: Labelled
    test: Labelled
    seed: int
    #: the support images in `views` variations, the first of which are the images themselves
    views: Labelled
    #: frozen embeddings (N, D) of the four sets
    view_features: Tensor
    support_features: Tensor
    validation_features: Tensor
    test_features: Tensor
    #: accuracy on the source task of what the backbone is now; None where there is no source task
    source: Callable[[Backbone], Score | None] = lambda backbone: None
    progress: bool = False
    steps: int = 200

    @property
    def shots(self) -> int:
        """Images per class in the support set."""
        return len(self.support) // len(self.support.names)

    @property
    def labels(self) -> Tensor:
        """Labels of the support set (N,)."""
        return torch.from_numpy(self.support.labels)

    @property
    def view_labels(self) -> Tensor:
        """Labels of the views (V·N,), view by view."""
        return torch.from_numpy(self.views.labels)

    @property
    def validation_labels(self) -> Tensor:
        """Labels of the validation set (M,)."""
        return torch.from_numpy(self.validation.labels)

    def scored(self, logits: Tensor) -> Score:
        """Score of test logits."""
        return score(logits, torch.from_numpy(self.test.labels))


@dataclass
class Outcome:
    """What one method reached: test score, trained numbers, seconds, and the source task after it."""

    test: Score
    parameters: int = 0
    seconds: float = 0.0
    #: source task with the adaptation on, and with it taken away; None: the backbone is untouched
    source_on: Score | None = None
    source_off: Score | None = None
    untouched: bool = True
    details: dict[str, Any] = field(default_factory=dict)


def zero_shot_baseline(problem: Problem) -> Outcome:
    """The backbone and the class names alone."""
    return Outcome(problem.scored(problem.classifier(problem.test_features)))


def raw_pixels(problem: Problem) -> Outcome:
    """Logistic regression on raw pixels (no views): what the task gives away without any backbone."""
    flat = [
        numpy.stack([numpy.asarray(image) for image in part.images]).reshape(len(part), -1) / 255.0
        for part in (problem.support, problem.validation, problem.test)
    ]
    return _regression(problem, problem.support.labels, flat, (0.001, 0.01, 0.1, 1.0))


def linear_probe(problem: Problem) -> Outcome:
    """Logistic regression on the frozen, unit-length image embeddings (Radford et al. 2021)."""
    unit = [
        F.normalize(part, dim=-1).cpu().numpy()
        for part in (problem.view_features, problem.validation_features, problem.test_features)
    ]
    return _regression(problem, problem.views.labels, unit, (0.1, 1.0, 10.0, 100.0))


def _regression(
    problem: Problem,
    labels: numpy.ndarray,
    inputs: list[numpy.ndarray],
    strengths: tuple[float, ...],
) -> Outcome:
    """Fit on the first inputs, choose C on the second (the smallest among equals), test on the third."""
    import warnings

    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    started = time.perf_counter()
    size = len(problem.support.names) * (inputs[0].shape[1] + 1)
    # the optimum of an L2-penalised regression lies in the span of its inputs: work in their axes
    mean = inputs[0].mean(0)
    axes = numpy.linalg.svd(inputs[0] - mean, full_matrices=False)[2].T
    support, validation, test = ((part - mean) @ axes for part in inputs)
    best: tuple[float, float, LogisticRegression] | None = None
    with threadpool_limits(torch.get_num_threads()), warnings.catch_warnings():
        # weakly regularised fits on separable shots have no optimum to converge to
        warnings.simplefilter("ignore", ConvergenceWarning)
        for c in strengths:
            model = LogisticRegression(C=c, max_iter=200).fit(support, labels)
            reached = model.score(validation, problem.validation.labels) if len(validation) else 0.0
            if best is None or reached > best[0]:
                best = (reached, c, model)
    assert best is not None
    seconds = time.perf_counter() - started
    correct = int(numpy.sum(best[2].predict(test) == problem.test.labels))
    return Outcome(Score(correct, len(test)), size, seconds, details={"C": best[1]})


def tip_adapter(problem: Problem) -> Outcome:
    """Tip-Adapter: the shots, each averaged over its views, as a cache; α and β by validation."""
    return _tip(problem, train=False)


def tip_adapter_f(problem: Problem) -> Outcome:
    """Tip-Adapter-F: the cache's keys fine-tuned at the searched α and β, which are searched again."""
    return _tip(problem, train=True)


def _tip(problem: Problem, train: bool) -> Outcome:
    classifier, started = problem.classifier, time.perf_counter()
    adapter = TipAdapter(entries=len(problem.support), train_keys=train)
    attachment = attach(classifier, adapter, name="tip", seed=problem.seed)
    try:
        count = len(problem.support)
        keys = problem.view_features.view(-1, count, problem.view_features.shape[1]).mean(0)
        remember(attachment, keys, problem.labels)
        held = (problem.validation_features, problem.validation_labels)
        residual, sharpness, _ = search(classifier, attachment, *held)
        if train:
            layer: Any = next(iter(attachment.layers.values()))
            if residual == 0.0:  # zero-shot won the search: give the keys a gradient all the same
                layer.residual.fill_(1.0)
            _fit_features(problem, classifier, _cross_entropy, 100, 1e-3, "Tip-Adapter-F")
            residual, sharpness, _ = search(classifier, attachment, *held)
        seconds = time.perf_counter() - started
        with torch.no_grad():
            reached = problem.scored(classifier(problem.test_features))
        details = {"residual": residual, "sharpness": sharpness}
        return Outcome(reached, attachment.num_parameters, seconds, details=details)
    finally:
        detach(classifier, "tip")


def _fit_features(
    problem: Problem, m: Any, loss: Callable[..., Tensor], steps: int, lr: float, label: str
) -> None:
    """Train what sits behind frozen embeddings, on the embeddings of the views."""
    fit(
        m,
        (problem.view_features, problem.view_labels),
        loss=loss,
        steps=steps,
        lr=lr,
        batch_size=64,
        seed=problem.seed,
        progress=problem.progress,
        label=label,
    )


def _cross_entropy(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    inputs, labels = batch
    return F.cross_entropy(model(inputs), labels.to(inputs.device))


def clip_adapter(problem: Problem) -> Outcome:
    """CLIP-Adapter on cached embeddings; the ratio is chosen on validation images."""
    started, backbone, best = time.perf_counter(), problem.backbone, None

    def loss(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        frozen, labels = batch
        return _cross_entropy(problem.classifier, (adapted(backbone, frozen), labels))

    for ratio in (0.2, 0.4, 0.6, 0.8):
        attachment = attach(
            backbone, ClipAdapter(ratio=ratio), name="clip-adapter", seed=problem.seed, replace=True
        )
        _fit_features(problem, backbone, loss, 200, 3e-3, f"CLIP-Adapter {ratio}")
        with torch.no_grad():
            logits = problem.classifier(adapted(backbone, problem.validation_features))
        reached = score(logits, problem.validation_labels).accuracy
        if best is None or reached > best[0]:
            state = {name: p.detach().clone() for name, p in attachment.named_parameters()}
            best = (reached, ratio, state)
    assert best is not None
    try:
        attachment = attach(
            backbone,
            ClipAdapter(ratio=best[1]),
            name="clip-adapter",
            seed=problem.seed,
            replace=True,
        )
        with torch.no_grad():
            for name, parameter in attachment.named_parameters():
                parameter.copy_(best[2][name])
            seconds = time.perf_counter() - started
            reached = problem.scored(problem.classifier(adapted(backbone, problem.test_features)))
        return _with_source(
            problem,
            Outcome(reached, attachment.num_parameters, seconds, details={"ratio": best[1]}),
        )
    finally:
        detach(backbone, "clip-adapter")


def in_tower(adapter: Adapter, at: Any, lr: float, name: str) -> Callable[[Problem], Outcome]:
    """A method that adapts the image tower from within, trained on the shots' pixels."""

    def run(problem: Problem) -> Outcome:
        started, backbone = time.perf_counter(), problem.backbone
        attachment = attach(backbone, adapter, name=name, at=at, seed=problem.seed)
        try:
            history = _fit_pixels(problem, backbone, lr, name)
            seconds = time.perf_counter() - started
            reached = problem.scored(problem.classifier(embed(backbone, problem.test.images)))
            details = {"losses": history.losses}
            outcome = Outcome(reached, attachment.num_parameters, seconds, details=details)
            return _with_source(problem, outcome)
        finally:
            detach(backbone, name)

    run.__doc__ = f"{adapter!r} at {at}."
    return run


def _fit_pixels(problem: Problem, backbone: Backbone, lr: float, label: str):
    def loss(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        views, labels = batch
        return _cross_entropy(problem.classifier, (embed_pixels(backbone, views), labels))

    return fit(
        backbone,
        (pixels(backbone, problem.views.images), problem.view_labels),
        loss=loss,
        steps=problem.steps,
        lr=lr,
        batch_size=40,
        seed=problem.seed,
        progress=problem.progress,
        label=label,
    )


def full_fine_tuning(problem: Problem) -> Outcome:
    """Every weight of the image tower, in a copy of the backbone."""
    started = time.perf_counter()
    model = copy.deepcopy(problem.backbone.model)
    copied = Backbone(
        model, problem.backbone.preprocess, problem.backbone.tokenize, problem.backbone.anatomy
    )
    anatomy = problem.backbone.anatomy
    assert anatomy is not None
    tower = model.get_submodule(anatomy.towers["vision"])
    model.requires_grad_(False)
    tower.requires_grad_(True)
    _fit_pixels(problem, copied, 5e-4, "full fine-tuning")
    seconds = time.perf_counter() - started
    size = sum(parameter.numel() for parameter in tower.parameters())
    reached = problem.scored(problem.classifier(embed(copied, problem.test.images)))
    return Outcome(reached, size, seconds, problem.source(copied), None, untouched=False)


def _with_source(problem: Problem, outcome: Outcome) -> Outcome:
    """Score the source task with the adapter on, and off."""
    outcome.untouched = False
    outcome.source_on = problem.source(problem.backbone)
    with disabled(problem.backbone):
        outcome.source_off = problem.source(problem.backbone)
    return outcome


_BLOCKS = "vision.layers[*]"

#: name in tables -> method; a user's own joins by being put here or passed to `compare`
METHODS: dict[str, Callable[[Problem], Outcome]] = {
    "zero-shot": zero_shot_baseline,
    "raw pixels + LR": raw_pixels,
    "linear probe": linear_probe,
    "Tip-Adapter": tip_adapter,
    "Tip-Adapter-F": tip_adapter_f,
    "CLIP-Adapter": clip_adapter,
    "LoRA (q, v)": in_tower(LoRA(8), (f"{_BLOCKS}.attn.q", f"{_BLOCKS}.attn.v"), 3e-3, "lora"),
    "LoRA (MLP)": in_tower(LoRA(8), (f"{_BLOCKS}.mlp.up", f"{_BLOCKS}.mlp.down"), 3e-3, "lora-mlp"),
    "Bottleneck": in_tower(Bottleneck(16), f"{_BLOCKS}.mlp", 5e-3, "bottleneck"),
    "Bottleneck, parallel": in_tower(
        Bottleneck(16, placement="parallel"), f"{_BLOCKS}.mlp", 5e-3, "parallel"
    ),
    "full fine-tuning": full_fine_tuning,
}
