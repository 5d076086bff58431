"""What is in a sound: one class a clip, or several tags, from seconds or from hours.

from mmadapt.tasks import tagging

data = tagging.tagged(clips, labels, names)
mm.attach(ast, [mm.ConvAdapter(16, kernel=5), mm.Head(names=names)], name="street")
mm.fit(ast, tagging.tensors(ast, data), loss=tagging.TaggingLoss())
tagging.evaluate(ast, test)                         # accuracy, mAP, F1; .figure() .by_class .mistakes
tagging.Tagger(ast).tag(recording)                  # and where in it
"""

from mmadapt.tasks.tagging.data import Tagged, tagged
from mmadapt.tasks.tagging.figure import class_bars, clips_figure
from mmadapt.tasks.tagging.loss import TaggingLoss
from mmadapt.tasks.tagging.metrics import average_precision
from mmadapt.tasks.tagging.pooled import PooledEncoder
from mmadapt.tasks.tagging.scores import Scores, by_class, evaluate, side_by_side
from mmadapt.tasks.tagging.tagger import Tagger, features_for, tensors
from mmadapt.tasks.tagging.tags import Tags

__all__ = [
    "PooledEncoder",
    "Scores",
    "Tagged",
    "Tagger",
    "TaggingLoss",
    "Tags",
    "average_precision",
    "by_class",
    "class_bars",
    "clips_figure",
    "evaluate",
    "features_for",
    "side_by_side",
    "tagged",
    "tensors",
]
