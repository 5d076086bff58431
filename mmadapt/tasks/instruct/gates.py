"""How far gates are open: of an attachment now, and over its training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmadapt.core.attachment import Attachment
from mmadapt.core.figure import FAINT, SIGNED, cells, drawn, new_figure
from mmadapt.errors import AttachError
from mmadapt.ops.reference import ACTIVATIONS


def gates(attachment: Attachment) -> dict[str, Tensor]:
    """What the gates of every site multiply by, (heads,) or (1,) where a layer has one, by site name."""
    found, layers = {}, dict[str, Any](attachment.layers)
    for key, layer in layers.items():
        if hasattr(layer, "gate") and hasattr(layer, "activation"):
            site = key.partition("/")[2].rpartition(":")[0]
            found[site] = ACTIVATIONS[layer.activation](layer.gate.detach().float()).cpu()
    if not found:
        raise AttachError(
            f"{attachment.name!r} has no zero-initialised attention",
            "mm.LlamaAdapter and mm.ZeroInitAttention have gates",
        )
    return found


class GateRecord:
    """The gates now and then while training, for `mm.Evaluation`; watched is how far they are open.

    record = instruct.GateRecord(attachment)
    mm.fit(llama, data, loss=…, evaluation=mm.Evaluation(record, every=20))
    record.plot()
    """

    def __init__(self, attachment: Attachment, every: int = 1) -> None:
        self.attachment, self.every = attachment, every
        #: by site, what its gates were at each look, (looks, heads); the first before training
        self.values: dict[str, list[Tensor]] = {}
        self._look()

    def __call__(self, model: Any) -> dict[str, float]:
        self._look()
        return {"open": float(torch.cat([row[-1].abs() for row in self.values.values()]).mean())}

    def _look(self) -> None:
        for site, value in gates(self.attachment).items():
            self.values.setdefault(site, []).append(value)

    @drawn
    def plot(self) -> Any:
        """A matplotlib figure, a panel a layer and a line a head; steps as `every` counts them."""
        size = len(self.values)
        columns = min(4, size)
        rows = -(-size // columns)
        figure = new_figure(2.4 * columns, 2.1 * rows + 0.3)
        axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        colours = _shades(max(len(v[0]) for v in self.values.values()))
        for axis, (site, values) in zip(axes.flat, self.values.items(), strict=False):
            steps = [self.every * look for look in range(len(values))]
            for head, line in enumerate(torch.stack(values).T.tolist()):
                axis.plot(steps, line, color=colours[head], label=f"head {head}")
            axis.axhline(0, color=FAINT, linewidth=0.8, zorder=0)
            axis.set_title(site.removesuffix(".attn.heads"), fontsize=9)
        for axis in list(axes.flat)[size:]:
            axis.axis("off")
        for row in axes:
            row[0].set_ylabel("gate")
        for axis in axes[-1]:
            axis.set_xlabel("step")
        if len(axes.flat[0].lines) <= 9:
            handles = axes.flat[0].get_legend_handles_labels()
            figure.legend(*handles, loc="outside right center")
        return figure


@drawn
def gate_figure(attachment: Attachment) -> Any:
    """A matplotlib figure of how far every gate is open, a row a layer and a column a head."""
    found = gates(attachment)
    heads = max(map(len, found.values()))
    grid = torch.stack([value.expand(heads) for value in found.values()])
    figure = new_figure(1.6 + 0.62 * heads, 1.0 + 0.42 * len(found))
    axes = figure.add_subplot()
    reach = max(float(grid.abs().max()), 1e-6)
    names = [site.removesuffix(".attn.heads") for site in found]
    numbers = [str(head) for head in range(heads)]
    cells(axes, grid.numpy(), names, numbers, "gate", (-reach, reach), SIGNED, "+.2f")
    axes.set_xlabel("head")
    return figure


def _shades(count: int) -> list[Any]:
    from matplotlib import colormaps

    return [colormaps["viridis"](place / max(count - 0.5, 1)) for place in range(count)]
