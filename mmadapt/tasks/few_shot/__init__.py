"""Few-shot image classification with a contrastive backbone.

from mmadapt.tasks import few_shot

data = few_shot.labelled(images, labels, names)
support, validation = few_shot.sample(data, shots=4, seed=1)
classifier = few_shot.zero_shot(clip, names, ("a photo of a {}",))
table = few_shot.compare(clip, data, test, templates=("a photo of a {}",), shots=(1, 4, 16))
"""

from mmadapt.tasks.few_shot.cached import CachedShots
from mmadapt.tasks.few_shot.classifier import ZeroShotClassifier, zero_shot
from mmadapt.tasks.few_shot.compare import Comparison, Result, Source, compare
from mmadapt.tasks.few_shot.data import Labelled, labelled, sample, vary
from mmadapt.tasks.few_shot.features import adapted, embed, features, pixels, remember, search
from mmadapt.tasks.few_shot.methods import METHODS
from mmadapt.tasks.few_shot.score import Score, score

__all__ = [
    "METHODS",
    "CachedShots",
    "Comparison",
    "Labelled",
    "Result",
    "Score",
    "Source",
    "ZeroShotClassifier",
    "adapted",
    "compare",
    "embed",
    "features",
    "labelled",
    "pixels",
    "remember",
    "sample",
    "score",
    "search",
    "vary",
    "zero_shot",
]
