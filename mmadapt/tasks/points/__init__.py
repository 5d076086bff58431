"""Clouds of points: generated solids to learn from, and pictures of what Any2Point makes of one.

from mmadapt.tasks import points

train = points.solids(20, "train", seed=0)             # 200 clouds of ten kinds, shapes of test held out
test = points.solids(50, "test", seed=1)
cloud = points.unit_clouds(xyz)                        # one's own: centred, within the unit ball
points.cloud_figure(train.clouds[0])                   # the cloud, its centres, its virtual images
"""

from mmadapt.tasks.points.cloud import unit_clouds
from mmadapt.tasks.points.figure import cloud_figure, cloud_table
from mmadapt.tasks.points.solids import SOLIDS, SPLITS, Solids, solids

__all__ = [
    "SOLIDS",
    "SPLITS",
    "Solids",
    "cloud_figure",
    "cloud_table",
    "solids",
    "unit_clouds",
]
