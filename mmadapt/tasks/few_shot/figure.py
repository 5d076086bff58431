"""Pictures of a comparison."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mmadapt.core.figure import BLUE, GREY, drawn, new_figure

if TYPE_CHECKING:
    from mmadapt.tasks.few_shot.compare import Comparison

_BASELINES = ("zero-shot", "raw pixels + LR", "linear probe", "full fine-tuning")


@drawn
def accuracy_figure(comparison: Comparison) -> Any:
    """Bars with the spread over seeds for one number of shots, lines over shots for several."""
    figure = new_figure(7.5, 4.2)
    axes = figure.add_subplot()
    shots = sorted({result.shots for result in comparison.results})
    if len(shots) == 1:
        results = sorted(comparison.results, key=lambda result: result.accuracy)
        colours = [GREY if r.method in _BASELINES else BLUE for r in results]
        values = [100 * result.accuracy for result in results]
        spreads = [100 * result.spread for result in results]
        axes.barh(
            [result.method for result in results],
            values,
            xerr=spreads if any(spreads) else None,
            color=colours,
            error_kw={"elinewidth": 1, "capsize": 2},
        )
        for place, (value, spread) in enumerate(zip(values, spreads, strict=True)):
            axes.text(value + spread + 1, place, f"{value:.1f}", va="center", fontsize=8)
        axes.set_xlim(0, max(100.0, *values))
        axes.set_xlabel(f"test accuracy %, {shots[0]} shots a class (grey: baselines)")
    else:
        for method in dict.fromkeys(result.method for result in comparison.results):
            found = [result for result in comparison.results if result.method == method]
            axes.errorbar(
                [result.shots for result in found],
                [100 * result.accuracy for result in found],
                yerr=[100 * result.spread for result in found],
                label=method,
                capsize=2,
                linestyle="--" if method in _BASELINES else "-",
                color=GREY if method == "zero-shot" else None,
                marker="o",
                markersize=3,
            )
        axes.set_xscale("log", base=2)
        axes.set_xticks(shots, [str(k) for k in shots])
        axes.set_xlabel("shots a class (dashed: baselines)")
        axes.set_ylabel("test accuracy %")
        axes.legend(ncols=2)
    return figure
