"""Pictures of clips, tags and scores, as matplotlib figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy

from mmadapt.core.figure import AMOUNT, GREY, HEAT, LINES, cells, drawn, new_figure
from mmadapt.tasks.audio.figure import draw_wave
from mmadapt.tasks.tagging import metrics

if TYPE_CHECKING:
    from mmadapt.tasks.audio.clip import Audio
    from mmadapt.tasks.audio.spectrum import SpectrumFeatures
    from mmadapt.tasks.tagging.scores import Scores
    from mmadapt.tasks.tagging.tags import Tags

#: the first evaluation is what the others are compared with
COLOURS = (GREY, *LINES)


@drawn
def clips_figure(
    clips: Sequence[Audio], features: SpectrumFeatures, names: Sequence[str] = (), columns: int = 7
) -> Any:
    """What a spectrogram model sees of each clip, all in one scale; low sounds at the bottom."""
    from matplotlib import colormaps

    titles = names or [clip.name for clip in clips]
    rows = -(-len(clips) // columns)
    figure = new_figure(1.3 * columns, 1.25 * rows)
    colours = colormaps[HEAT].resampled(24)  # noise in fine shades would make large files
    axes = figure.subplots(rows, columns, squeeze=False).flat
    batch = features.batch(clips)
    seen = batch.inputs["input_values"].numpy()
    low, high = numpy.percentile(seen, [2, 99.8])
    for place, axis in enumerate(axes):
        axis.axis("off")
        if place < len(clips):
            picture = seen[place, : int(batch.lengths[place])].T
            axis.imshow(
                picture, origin="lower", aspect="auto", cmap=colours, vmin=low, vmax=high,
                interpolation="nearest",
            )  # fmt: skip
            axis.set_title(titles[place], fontsize=8)
    return figure


@drawn
def confusion_matrix(scores: Scores) -> Any:
    """Rows are the truth, in % of its clips; classes that are found worst stand first."""
    counts = scores.confusion
    clips = counts.sum(1)
    share = 100 * counts / numpy.maximum(clips, 1)[:, None]
    order = numpy.argsort(numpy.where(clips > 0, numpy.diag(share), 101), kind="stable")
    names, share = [scores.names[k] for k in order], share[order][:, order]
    size = 2.2 + 0.36 * len(names)
    figure = new_figure(size + 0.6, size)
    axes = figure.add_subplot()
    label = "% of the class's clips"
    cells(axes, share, names, names, label, (0, 100), write=".0f", least=0.5, slant=60)
    axes.set_xlabel("taken for")
    axes.set_ylabel("it was")
    axes.set_title(f"{100 * scores.accuracy:.1f} % of {len(scores)} clips", loc="left")
    return figure


@drawn
def class_bars(scores: Mapping[str, Scores]) -> Any:
    """Each class's recall (average precision where clips have several tags), a colour an evaluation."""
    several = any(one.several for one in scores.values())
    names = next(iter(scores.values())).names
    found = [
        100 * (one.average_precisions if several else metrics.precision_recall(one.truth, one.answers)[1])
        for one in scores.values()
    ]  # fmt: skip
    order = numpy.argsort(numpy.nan_to_num(found[0], nan=101.0), kind="stable")
    figure = new_figure(8, 3.2)
    axes = figure.add_subplot()
    width = 0.8 / len(found)
    for place, (label, values) in enumerate(zip(scores, found, strict=True)):
        at = numpy.arange(len(names)) + (place - (len(found) - 1) / 2) * width
        colour = COLOURS[place % len(COLOURS)]
        axes.bar(at, numpy.nan_to_num(values[order]), width, label=label, color=colour)
    axes.set_xticks(range(len(names)), [names[k] for k in order], rotation=45, ha="right")
    axes.set_ylabel("average precision %" if several else "% of the class found")
    axes.set_ylim(0, 100)
    if any(scores):
        figure.legend(loc="outside upper center", ncols=len(scores))
    return figure


@drawn
def timeline(tags: Tags, count: int = 6) -> Any:
    """A clip's wave over the probabilities of its likeliest classes, window by window."""
    figure = new_figure(8, 2.6 + 0.22 * count)
    wave, map_ = figure.subplots(2, 1, sharex=True, height_ratios=(1, 1.3))
    draw_wave(wave, tags.clip)
    draw_classes(map_, tags, count)
    map_.set_xlim(0, tags.clip.seconds)
    map_.set_xlabel("seconds")
    return figure


def draw_classes(axes: Any, tags: Tags, count: int = 6) -> None:
    """The probabilities of a clip's likeliest classes along time, window by window."""
    chosen = likeliest(tags, count)
    starts = numpy.array(tags.starts)
    middles = starts + tags.seconds / 2
    edges = numpy.concatenate([[starts[0]], (middles[1:] + middles[:-1]) / 2, [tags.clip.seconds]])
    image = axes.pcolormesh(
        edges, numpy.arange(len(chosen) + 1), tags.each[:, chosen].T, cmap=AMOUNT, vmin=0, vmax=1
    )
    axes.set_yticks(numpy.arange(len(chosen)) + 0.5, [tags.names[k] for k in chosen])
    axes.invert_yaxis()
    bar = axes.figure.colorbar(image, ax=axes, label="probability", pad=0.01)
    bar.outline.set_visible(False)


def likeliest(tags: Tags, count: int) -> list[int]:
    """The classes that are likeliest in some window."""
    return [int(k) for k in numpy.argsort(-tags.each.max(0), kind="stable")[:count]]
